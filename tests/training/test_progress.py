"""The progress bar shows what is known and nothing else."""

import io

from rich.console import Console

from jaxalign.training.progress import progress_bar, shown


def test_numbers_that_are_absent_are_not_shown():
    assert shown({}) == ""
    assert shown({"loss": 0.12345, "other": 3.0}) == "loss 0.1235"
    full = {"device_memory_gib": 12.34, "mfu": 0.423, "tokens_per_second": 12345.6, "loss": 2.0}
    assert shown(full) == "loss 2.0000  tokens/s 12,346  MFU 42.3%  memory 12.3 GiB"


def test_the_bar_draws_steps_and_numbers():
    text = io.StringIO()
    with progress_bar(20, 5, Console(file=text, force_terminal=True, width=120)) as update:
        update(6, {"loss": 1.5})
    assert "6/20" in text.getvalue() and "loss 1.5000" in text.getvalue()
