"""What the kernel offers to confine a process, by system call: namespaces, a private root, Landlock, limits.

Runs inside the launched process (see `launcher`), so it imports the standard library alone. Every layer is tried by
itself and says whether it holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
import sys
from collections.abc import Iterable, Mapping
from typing import Any

LINUX = sys.platform == "linux"
# Of dynamic system users (systemd), so no person and no long-lived service has them.
FIRST_UID, UIDS = 61184, 4336
# Read by Python and by the libraries that it loads; all else, home folders and data included, is out of sight.
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/nix/store")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_RDONLY, _NOSUID, _NODEV, _BIND, _REC, _PRIVATE, _DETACH = 1, 2, 4, 4096, 16384, 1 << 18, 2
_PDEATHSIG, _SUBREAPER, _NO_NEW_PRIVS = 1, 36, 38
_MOUNT_SETATTR, _RECURSIVE, _AT_FDCWD = 442, 0x8000, -100
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> int:
    """A function of libc; raises OSError where it returns −1 or does not exist."""
    try:
        function = getattr(_libc, name)
    except AttributeError as error:
        raise OSError(f"this libc has no {name}") from error
    converted = [
        ctypes.c_long(value) if isinstance(value, int) else os.fsencode(value) if isinstance(value, str) else value
        for value in arguments
    ]
    result = function(*converted)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def die_with_parent(signal_number: int) -> None:
    """Asks the kernel for this signal when the parent (its thread, on Linux) ends."""
    if LINUX:
        _call("prctl", _PDEATHSIG, signal_number, 0, 0, 0)


def adopt_orphans() -> None:
    """Makes this process the parent of its descendants whose own parent has ended."""
    if LINUX:
        _call("prctl", _SUBREAPER, 1, 0, 0, 0)


def enter_pid_namespace() -> bool:
    """The next child is process 1 of a namespace: when it ends, the kernel ends all that are in it.

    Without root this takes a user namespace as well, in which the user keeps its number. False where the kernel
    refuses both.
    """
    if not LINUX:
        return False
    uid, gid = os.geteuid(), os.getegid()
    try:
        _call("unshare", _NEWPID if uid == 0 else _NEWUSER | _NEWPID)
    except OSError:
        return False
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return True


def confine(spec: Mapping[str, Any], *, in_pid_namespace: bool) -> dict[str, Any]:
    """Takes everything from this process that the code to be run does not need.

    Args:
      spec: `folder`, `readable`, `limits`, `uid`, `without` as `sandbox` sends them.
      in_pid_namespace: whether `enter_pid_namespace` succeeded.

    Returns:
      What holds, as `sandbox.describe_sandbox` reports it; `box` is the only folder that can be written to.
    """
    without, limits, box = spec["without"], spec["limits"], spec["folder"]
    readable = [*existing([*spec["readable"], *SYSTEM]), *existing(DEVICES)]
    active = {"processes": "namespace" if in_pid_namespace else "followed", "network": "open", "files": []}
    may_unshare = in_pid_namespace and "namespaces" not in without
    uid = spec["uid"] if os.geteuid() == 0 else None
    if may_unshare and _succeeds(_unshare_network):
        active["network"] = "none"
    if may_unshare and _succeeds(_private_root, box, readable, uid, limits["disk_mb"]):
        active["files"].append("private root")
        box = "/box"
    if uid is not None:
        uid = uid if _reachable(readable) and _succeeds(_become, uid, box) else None
    active["user"] = "own" if uid is not None else "shared"
    # The kernel counts processes per user, since 5.14 per user namespace; of a shared user all that it runs elsewhere.
    own_count = uid is not None or (may_unshare and os.geteuid() != 0 and _kernel() >= (5, 14))
    others = 0 if own_count else _processes_of_user()
    active["limits"] = set_limits({**limits, "processes": limits["processes"] + others})
    if "NPROC" not in active["limits"]:
        os.nice(19)  # whoever counts the processes must come first, however many there are
    if LINUX:
        _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
        _succeeds(_drop_capabilities)
    if LINUX and "landlock" not in without:
        version = _landlock([path for path in readable if path not in DEVICES], existing(DEVICES), box)
        active["files"] += ["landlock"] if version else []
        if version >= 4 and active["network"] == "open":
            active["network"] = "no TCP"
    os.chdir(box)
    os.environ.update(HOME=box, TMPDIR=box)
    return {**active, "box": box}


def existing(paths: Iterable[str]) -> list[str]:
    """Those that exist, without those inside another one."""
    found = []
    for path in sorted({os.path.normpath(path) for path in paths if os.path.exists(path)}):
        if not any(path.startswith(f"{parent}/") for parent in found):
            found.append(path)
    return found


def set_limits(limits: Mapping[str, int]) -> list[str]:
    """Sets the resource limits, of each process by itself; returns the names of those that the system takes."""
    megabyte = 2**20
    wanted = {
        "CPU": limits["cpu_seconds"],
        "AS": limits["memory_mb"] * megabyte,
        "FSIZE": limits["file_mb"] * megabyte,
        "NOFILE": limits["open_files"],
        "CORE": 0,
        **({"NPROC": limits["processes"]} if os.geteuid() else {}),  # does not bind root
    }
    return [name for name, value in wanted.items() if _succeeds(_limit, name, value)]


def _limit(name: str, value: int) -> None:
    kind = getattr(resource, f"RLIMIT_{name}")
    highest = resource.getrlimit(kind)[1]
    value = value if highest == resource.RLIM_INFINITY else min(value, highest)
    resource.setrlimit(kind, (value, value))


def _succeeds(function, *arguments: Any) -> bool:
    try:
        function(*arguments)
    except (OSError, ValueError):
        return False
    return True


def _kernel() -> tuple[int, int]:
    major, minor, *_ = os.uname().release.split("-")[0].split(".")
    return int(major), int(minor)


def _processes_of_user() -> int:
    """Processes and threads of this user, and as many again, since it goes on starting some."""
    uid, found = os.geteuid(), 0
    for name in filter(str.isdigit, os.listdir("/proc") if LINUX else ()):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == uid:
                found += len(os.listdir(f"/proc/{name}/task"))
    return 2 * found if LINUX else 2**20


def _unshare_network() -> None:
    _call("unshare", _NEWNET | _NEWIPC | _NEWUTS)


def _reachable(paths: Iterable[str]) -> bool:
    """Whether another user may enter the folders above these paths."""
    parents = {parent for path in paths for parent in _parents(path)}
    return all(os.stat(parent).st_mode & 0o001 for parent in parents)


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) or "/" for n in range(1, len(parts))]


def _become(uid: int, box: str) -> None:
    """Gives root's rights up for those of a user that owns nothing but the box."""
    os.chown(box, uid, uid)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _drop_capabilities() -> None:
    # Version 3 of the interface; three sets of 64 bits, all empty.
    _call("capset", ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0)), ctypes.create_string_buffer(24))


def _private_root(folder: str, readable: Iterable[str], uid: int | None, disk_mb: int) -> None:
    """A root file system with the readable paths and one writable folder, /box, in memory; nothing else exists."""
    _call("unshare", _NEWNS)
    _call("mount", None, "/", None, _REC | _PRIVATE, None)
    _call("mount", "tmpfs", folder, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    try:
        for path in readable:
            _bind(path, folder + path)
        box = f"{folder}/box"
        os.mkdir(box)
        if not os.path.exists(f"{folder}/tmp"):  # what is readable may lie there
            os.symlink("box", f"{folder}/tmp")
        owner = f",uid={uid},gid={uid}" if uid is not None else ""
        _call("mount", "tmpfs", box, "tmpfs", _NOSUID | _NODEV, f"size={disk_mb}m,nr_inodes=4096,mode=700{owner}")
        _set_mount(folder, _RDONLY | _NOSUID | _NODEV, 0)
        os.chdir(folder)
        _call("pivot_root", ".", ".")
    except OSError:
        os.chdir("/")
        _succeeds(_call, "umount2", folder, _DETACH)
        raise
    _call("umount2", ".", _DETACH)
    os.chdir("/")


def _bind(path: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    if os.path.islink(path) and os.path.isdir(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _call("mount", path, target, None, _BIND | _REC, None)
    _set_mount(target, _RDONLY | _NOSUID, _RECURSIVE)


def _set_mount(target: str, attributes: int, flags: int) -> None:
    buffer = ctypes.create_string_buffer(struct.pack("QQQQ", attributes, 0, 0, 0), 32)
    _call("syscall", _MOUNT_SETATTR, _AT_FDCWD, target, flags, buffer, 32)


def _landlock(readable: Iterable[str], devices: Iterable[str], box: str) -> int:
    """Denies this process and its children all files but these; the version of the interface, 0 without one.

    From version 4 on also TCP, from 6 on also signals and abstract sockets to processes outside.
    """
    try:
        version = _call("syscall", _LANDLOCK_CREATE, None, 0, 1)
    except OSError:
        return 0
    # Rights by version: 13 of the first, then renaming across folders, truncation, ioctl on devices.
    rights = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    execute, write_file, read_file, read_folder, truncate = 1, 2, 4, 8, rights & (1 << 14)
    attributes = struct.pack("QQQ", rights, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _call("syscall", _LANDLOCK_CREATE, ctypes.create_string_buffer(attributes), len(attributes), 0)
    allowed = {
        **dict.fromkeys(readable, execute | read_file | read_folder),
        **dict.fromkeys(devices, read_file | write_file | truncate),
        box: rights,
    }
    for path, access in allowed.items():
        # A file takes no folder's rights.
        access &= rights if os.path.isdir(path) else execute | write_file | read_file | truncate
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", access, file), 12)
        _call("syscall", _LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(file)
    _call("syscall", _LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)
    return version
