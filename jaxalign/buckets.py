"""Files in buckets: `gs://`, `s3://`, and whatever else fsspec knows by a URL."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from jaxalign.extras import install

# What a file's entry says of its content, of one file system or another: when it changes, the file did.
STAMPS = ("etag", "ETag", "md5Hash", "crc32c", "generation", "mtime", "LastModified", "created")
# Scheme -> what has to be installed for it.
EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}


def is_url(path: object) -> bool:
    """Whether a path is in a bucket."""
    return "://" in str(path)


def scratch() -> Path:
    """This machine's folder for copies of what is in buckets: `JAXALIGN_SCRATCH`, else one in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    return Path(os.environ.get("JAXALIGN_SCRATCH") or Path(cache) / "jaxalign" / "buckets")


@contextlib.contextmanager
def naming(url: str, what: str) -> Iterator[None]:
    """Errors of any file system as one OSError that names the bucket and what to do.

    Raises:
      FileNotFoundError: there is no such file, or no such bucket.
      OSError: no permission, no login, no connection.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{url}: there is no such file or bucket") from error
    except ImportError as error:
        scheme = url.partition("://")[0]
        how = install(EXTRAS[scheme]) if scheme in EXTRAS else error
        raise OSError(f"{url}: {scheme}:// needs a package: {how}") from error
    except OSError as error:
        raise OSError(f"{_told(url, what)}{error}") from error
    except Exception as error:  # every file system has its own
        if isinstance(error, ValueError) and "rotocol" in str(error):
            raise ValueError(f"{url}: unknown kind of URL ({error})") from error
        raise OSError(f"{_told(url, what)}{type(error).__name__}: {error}") from error


def open_url(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    with naming(url, "opened"):
        return fsspec.core.url_to_fs(url)


def expand(pattern: str) -> list[str]:
    """URLs of the files that a URL with wildcards stands for, sorted; one without stands for itself."""
    if not any(sign in pattern for sign in "*?["):
        return [pattern]
    system, path = open_url(pattern)
    with naming(pattern, "listed"):
        return [system.unstrip_protocol(each) for each in sorted(system.glob(path)) if system.isfile(each)]


def fetch(url: str, names: Sequence[str] = ("*",)) -> Path:
    """A copy on this machine of a file, or of a folder's files; made once for each state of what is there.

    Args:
      url: of the file or folder.
      names: of a folder only files right in it with such names (`*.json`).

    Raises:
      FileNotFoundError: there is nothing.
      OSError: it cannot be read; names the bucket.
    """
    system, root = open_url(url.rstrip("/"))
    with naming(url, "read"):
        entries = _entries(system, root, names)
        described = json.dumps([url, [[name, _stamp(entry)] for name, entry in sorted(entries.items())]])
        place = scratch() / "copies" / hashlib.sha256(described.encode()).hexdigest()[:24]
        target = place / "files"
        with _alone(place):
            if not target.exists():
                partial = place / "partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                for name, entry in entries.items():
                    system.get_file(entry["name"], str(partial / name))
                partial.replace(target)
    name = PurePosixPath(root).name
    single = list(entries) == [name] and entries[name]["name"] == root
    return target / name if single else target


def upload(folder: Path, url: str, names: Iterable[str]) -> None:
    """Copies files, in this order, from a folder to the same names below a URL.

    Raises:
      OSError: it cannot be written; names the bucket.
    """
    system, root = open_url(url)
    with naming(url, "written"):
        for name in names:
            target = f"{root}/{name}"
            # Buckets have no folders; what is a file system does.
            system.makedirs(target.rpartition("/")[0], exist_ok=True)
            system.put_file(str(folder / name), target)


def listing(url: str) -> dict[str, dict[str, Any]]:
    """Entries of all files below a URL by their names relative to it; empty where there is nothing."""
    system, root = open_url(url)
    with naming(url, "listed"):
        try:
            system.invalidate_cache()
            found = system.find(root, detail=True)
        except FileNotFoundError:
            return {}
        base = system._strip_protocol(root).rstrip("/") + "/"
        return {name.removeprefix(base): entry for name, entry in found.items() if name.startswith(base)}


def download(url: str, names: Iterable[str], folder: Path) -> None:
    """Copies files from below a URL into a folder."""
    system, root = open_url(url)
    with naming(url, "read"):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            system.get_file(f"{root}/{name}", str(folder / name))


def delete(url: str, names: Iterable[str]) -> None:
    """Deletes files below a URL, in this order; what is not there is no error."""
    system, root = open_url(url)
    with naming(url, "written"):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                system.rm_file(f"{root}/{name}")


def check_writable(url: str) -> None:
    """Raises OSError, naming the bucket, if nothing can be written below a URL."""
    system, root = open_url(url)
    with naming(url, "written"):
        probe = f"{root}/.probe-{os.uname().nodename}-{os.getpid()}"
        system.makedirs(root, exist_ok=True)
        system.pipe_file(probe, b"")
        system.rm_file(probe)


def _entries(system: Any, root: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Files to copy, by their names below the copy's folder."""
    system.invalidate_cache()
    info = system.info(root)
    if info["type"] != "directory":
        return {PurePosixPath(root).name: {**info, "name": root}}
    found = {PurePosixPath(each["name"]).name: each for each in system.ls(root, detail=True) if each["type"] == "file"}
    found = {name: each for name, each in found.items() if any(fnmatch.fnmatch(name, pattern) for pattern in names)}
    if not found:
        raise FileNotFoundError(root)
    return found


def _stamp(entry: dict[str, Any]) -> list[str]:
    return [str(entry.get("size")), *(str(entry[name]) for name in STAMPS if name in entry)]


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Of several processes of this machine only one copies at a time."""
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _told(url: str, what: str) -> str:
    return (
        f"{url} cannot be {what}: check that the bucket exists and that this machine's account may use it (for gs://: "
        "gcloud auth application-default login, or the machine's service account; for s3://: AWS's credentials). It "
        "said: "
    )
