"""A connection from every process of a run to process 0: a roll call at the start, then word of who stops and why.

It carries no data. Process 0 listens on the port after the coordinator's. At the roll call each process says its
number; only when all have come, each with a number of its own, does process 0 let them go on. After that the
connections stay open: one that closes without a farewell is a process that died, and process 0 tells the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

FAREWELL = 5.0  # seconds that a process which stops with an error waits for process 0 to have told the others
Message = dict[str, Any]


@dataclass
class Line:
    """One process's end of the connections.

    Attributes:
      process: number of this one.
      names: of all processes by number, `process 2 (host, pid 41)`.
      peers: process 0's connections, by the other's number; on the others the one to process 0, by 0.
      lost: exit code when another process died.
      stop: ends this process: (exit code, text for the user).
    """

    process: int
    names: dict[int, str]
    peers: dict[int, Peer]
    lost: int
    stop: Callable[[int, str], None]
    _gone: set[int] = field(default_factory=set)
    _leaving: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def watch(self) -> None:
        """Begins to listen, in threads that end with the process."""
        for number, peer in self.peers.items():
            threading.Thread(target=self._listen, args=(number, peer), name="line", daemon=True).start()

    def leave(self, code: int, text: str) -> None:
        """Says farewell: the others go on when the code is 0, else they stop with this code too.

        After an error the connection closes with the process, which should end soon: process 0 waits for that, because
        jax aborts whoever outlives process 0. With `lost`, somebody else is probably the cause: who that is gets time
        to show first, and then this does not return.
        """
        if code == self.lost:
            time.sleep(FAREWELL)
        with self._lock:
            if self._leaving:
                threading.Event().wait()  # the process ends in another thread
            self._leaving = True
        self._tell({"from": self.process, "code": code, "text": text}, self.peers)
        if code and self.process == 0:
            self._see_off()
        if not code:
            for peer in self.peers.values():
                peer.close()

    def _listen(self, number: int, peer: Peer) -> None:
        message = peer.receive()
        if message is None or not message["code"]:
            self._gone.add(number)
        if message is None:
            message = {"from": number, "code": self.lost, "text": "it died without a word; its own log says more"}
        with self._lock:
            if self._leaving or not message["code"]:
                return
            self._leaving = True
        if self.process == 0:  # the one whom everybody listens to, and whom they need as long as they speak
            self._tell(message, [other for other in self.peers if other not in (message["from"], number)])
            with contextlib.suppress(TimeoutError):
                peer.receive(time.monotonic() + FAREWELL)
            self._gone.add(number)
            self._see_off()
        self.stop(int(message["code"]), f"{self.names[message['from']]} stopped the run: {message['text']}")

    def _tell(self, message: Message, others: Iterable[int]) -> None:
        for other in others:
            self.peers[other].send(message)

    def _see_off(self) -> None:
        """Waits a while for the others to close their ends."""
        end = time.monotonic() + FAREWELL
        while time.monotonic() < end and set(self.peers) - self._gone:
            time.sleep(0.05)


class Peer:
    """A socket that carries one JSON object per line."""

    def __init__(self, connection: socket.socket):
        self._socket, self._rest = connection, b""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, message: Message) -> None:
        """Sends, as far as somebody is there to listen."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self, end: float | None = None) -> Message | None:
        """The next message; None when the other is gone.

        Raises:
          TimeoutError: it did not come by `end` (of `time.monotonic`).
        """
        while b"\n" not in self._rest:
            try:
                self._socket.settimeout(None if end is None else max(end - time.monotonic(), 0.01))
                part = self._socket.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError:
                return None
            if not part:
                return None
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\n")
        try:
            found = json.loads(text)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


def open_line(coordinator: str, count: int, process: int, seconds: float, *, lost: int) -> Line:
    """The roll call.

    Args:
      coordinator: `host:port` of process 0; the line takes the port after it.
      count: number of processes.
      process: number of this one.
      seconds: that all may take to come.
      lost: exit code for when another process dies later.

    Raises:
      ValueError: not all came in time (they are named), two gave the same number, or they disagree on the count.
    """
    host, port = check_address(coordinator, "coordinator")
    end, own = time.monotonic() + seconds, f"process {process} ({socket.gethostname()}, pid {os.getpid()})"
    if process:
        peer, names = _report(host, port + 1, count, process, own, end, seconds)
        return Line(process, names, {0: peer}, lost, _stop)
    peers, names = _call_roll(port + 1, count, own, end, seconds)
    return Line(0, names, peers, lost, _stop)


def check_address(address: str, name: str) -> tuple[str, int]:
    """Host and port of `host:port`; raises ValueError, naming the variable."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise ValueError(
            f"{name}={address!r}: write host:port, for example 10.0.0.2:8476 (the port after it is used too)"
        )
    return host.strip("[]"), int(port)


def _call_roll(port: int, count: int, own: str, end: float, seconds: float) -> tuple[dict[int, Peer], dict[int, str]]:
    peers: dict[int, Peer] = {}
    names = {0: own}
    with _listening(port) as server:
        problem = None
        while len(names) < count and problem is None:
            ready, _, _ = select.select([server], [], [], max(end - time.monotonic(), 0))
            if not ready:
                missing = ", ".join(str(i) for i in range(count) if i not in names)
                came = ", ".join(names[i] for i in sorted(names))
                problem = f"after {seconds:.0f} s there is no process {missing}, of {count}; there are {came}"
                break
            peer = Peer(server.accept()[0])
            problem = _admit(peer, count, names, peers, end)
    told = {"problem": problem, "names": {str(i): name for i, name in names.items()}}
    for peer in peers.values():
        peer.send(told)
    if problem is not None:
        for peer in peers.values():
            peer.close()
        raise ValueError(f"the processes did not come together: {problem}")
    return peers, names


def _admit(peer: Peer, count: int, names: dict[int, str], peers: dict[int, Peer], end: float) -> str | None:
    """Takes up a process that reports; what is wrong with it, if anything."""
    try:
        said = peer.receive(min(end, time.monotonic() + 5))
    except TimeoutError:
        said = None
    if said is None or not {"process", "count", "name"} <= set(said):
        peer.close()  # a port scan, or somebody who gave up
        return None
    problem = None
    if said["count"] != count:
        problem = f"{said['name']} says that there are {said['count']} processes, process 0 says {count}"
    elif said["process"] in names:
        problem = f"two processes have the number {said['process']}: {names[said['process']]} and {said['name']}"
    if problem is not None:
        peer.send({"problem": problem, "names": {}})
        peer.close()
        return problem
    names[said["process"]], peers[said["process"]] = said["name"], peer
    return None


def _report(
    host: str, port: int, count: int, process: int, own: str, end: float, seconds: float
) -> tuple[Peer, dict[int, str]]:
    where, why = f"process 0 at {host}:{port}", "no answer"
    while time.monotonic() < end:
        try:
            connection = socket.create_connection((host, port), timeout=5)
        except OSError as error:
            why = str(error)
            time.sleep(0.2)
            continue
        if connection.getsockname() == connection.getpeername():
            # Nobody listens on this machine yet, and the kernel has given our end the very port that it was to reach.
            # A plain close would keep process 0 off that port for a minute.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
            continue
        peer = Peer(connection)
        peer.send({"process": process, "count": count, "name": own})
        try:
            said = peer.receive(end + 5)  # process 0 keeps the time, and says who is missing
        except TimeoutError:
            peer.close()
            break
        if said is None or not {"problem", "names"} <= set(said):
            peer.close()
            why = "it closed the connection" if said is None else "it is something else that answers"
            time.sleep(0.2)
            continue
        if said["problem"] is not None:
            peer.close()
            raise ValueError(f"the processes did not come together: {said['problem']}")
        return peer, {int(number): name for number, name in said["names"].items()}
    raise ValueError(
        f"{own} did not reach {where} within {seconds:.0f} s ({why}): is process 0 running, is this its address, "
        "and are this port and the one before open?"
    )


def _listening(port: int) -> socket.socket:
    try:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port}: {error.strerror}. Another run (or another process 0) of this "
            "machine uses it: end it, or take another port"
        ) from error


def _stop(code: int, text: str) -> None:
    """Ends the process where the main thread may wait for ever in a collective."""
    sys.stdout.flush()
    os.write(2, f"error: {text}\n".encode())
    os._exit(code)
