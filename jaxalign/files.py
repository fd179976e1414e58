"""Files written whole or not at all, and errors that name what could not be written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT}


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one, never a half.

    Raises:
      OSError: it cannot be written; names it, and says what to do. The old one is still there.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with writing(path):
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises errors of the file system again with the path of what was to be written: a failed `write` knows none."""
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        cure = "free space" if number in FULL else "mend that"
        text = f"cannot write: {os.strerror(number)}. Nothing saved before is lost: {cure}, then give the same command"
        raise OSError(number, text, str(path)) from error


def _number(error: Exception) -> int | None:
    """The system's number of an error; libraries in Rust (tokenizers, safetensors) say it in the text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
