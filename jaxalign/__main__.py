"""`python -m jaxalign` is `jaxalign`."""

from jaxalign.cli import main

main()
