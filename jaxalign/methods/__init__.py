"""One file, one method."""

from jaxalign.methods import preference, sft

METHODS = {"sft": sft, "preference": preference}

__all__ = ["METHODS", "preference", "sft"]
