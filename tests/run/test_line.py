"""The roll call of a run's processes, and word of who stops: here between threads, over real sockets."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxalign.run.line import Line, Peer, check_address, open_line
from tests.together import free_port

LOST = 75


@pytest.fixture
def coordinator() -> str:
    """An address whose port, and the one after it, are free."""
    return f"127.0.0.1:{free_port()}"


def call_roll(coordinator: str, *processes: tuple[int, int], seconds: float = 10) -> list[Line | str]:
    """What becomes of processes (number, count) that start at the same time: a line, or the error's text."""

    def start(number: int, count: int) -> Line | str:
        try:
            return open_line(coordinator, count, number, seconds, lost=LOST)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(lambda process: start(*process), processes))


def together(coordinator: str, count: int) -> tuple[list[Line], list[tuple[int, int, str]]]:
    """Lines of so many processes that listen, and where they write (process, code, text) when they would end."""
    lines = [line for line in call_roll(coordinator, *((i, count) for i in range(count))) if isinstance(line, Line)]
    assert len(lines) == count
    ended: list[tuple[int, int, str]] = []
    for line in lines:

        def stop(code: int, text: str, line: Line = line) -> None:
            ended.append((line.process, code, text))
            hang_up(line)

        line.stop = stop
        line.watch()
    return lines, ended


def hang_up(line: Line) -> None:
    """What the kernel does when a process ends."""
    for peer in line.peers.values():
        peer._socket.shutdown(socket.SHUT_RDWR)
        peer.close()


def wait_for(ended: list, count: int) -> dict[int, tuple[int, str]]:
    limit = time.monotonic() + 10
    while len(ended) < count and time.monotonic() < limit:
        time.sleep(0.01)
    return {process: (code, text) for process, code, text in ended}


def test_all_come_and_go(coordinator):
    lines, ended = together(coordinator, 4)
    assert [line.process for line in lines] == [0, 1, 2, 3] and set(lines[2].names) == {0, 1, 2, 3}
    leaving = [threading.Thread(target=line.leave, args=(0, "")) for line in lines]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join(5)
    time.sleep(0.3)
    assert not ended


@pytest.mark.parametrize("who", [0, 2])
def test_the_others_are_told_of_an_error(coordinator, who: int):
    lines, ended = together(coordinator, 4)
    leaving = threading.Thread(target=lines[who].leave, args=(1, "data/x.jsonl: no rows"))
    leaving.start()
    if who:
        time.sleep(0.5)
        assert 0 not in {process for process, _, _ in ended}  # it waits until the other has ended
        hang_up(lines[who])
    found = wait_for(ended, 3)
    leaving.join(10)
    if not who:
        hang_up(lines[0])
    assert set(found) == {0, 1, 2, 3} - {who}
    for code, text in found.values():
        assert code == 1 and text.startswith(f"process {who} (") and text.endswith("data/x.jsonl: no rows")


@pytest.mark.parametrize("who", [0, 3])
def test_the_dead_are_named(coordinator, who: int):
    lines, ended = together(coordinator, 4)
    lines[who]._leaving = True  # the threads of what was killed do nothing
    hang_up(lines[who])
    found = wait_for(ended, 3)
    assert set(found) == {0, 1, 2, 3} - {who}
    assert all(code == LOST and f"process {who} (" in text and "died" in text for code, text in found.values())


def test_who_is_missing_is_said_in_time(coordinator):
    start = time.monotonic()
    found = call_roll(coordinator, (0, 4), (2, 4), seconds=2)
    assert time.monotonic() - start < 8
    for text in found:
        assert "after 2 s there is no process 1, 3, of 4" in str(text) and "process 2 (" in str(text)


def test_two_with_one_number(coordinator):
    found = [str(each) for each in call_roll(coordinator, (0, 4), (1, 4), (1, 4), (2, 4), seconds=3)]
    told = [text for text in found if "two processes have the number 1: process 1 (" in text]
    assert len(told) >= 2 and found[0] in told  # the rest were there before or came too late, and stop as well
    assert not [text for text in found if text.startswith("Line(")]


def test_two_counts(coordinator):
    zero, one = call_roll(coordinator, (0, 2), (1, 3), seconds=5)
    assert "says that there are 3 processes, process 0 says 2" in str(zero) == str(one)


def test_two_first_processes_on_one_machine(coordinator):
    found = call_roll(coordinator, (0, 2), (0, 2), seconds=2)
    assert sum("another process 0" in str(each) for each in found) == 1


def test_nobody_at_the_coordinators_address(coordinator):
    start = time.monotonic()
    (text,) = call_roll(coordinator, (1, 2), seconds=1)
    assert f"did not reach process 0 at 127.0.0.1:{int(coordinator.split(':')[1]) + 1} within 1 s" in str(text)
    assert time.monotonic() - start < 6


def test_a_stranger_at_the_port_is_not_taken_for_a_process(coordinator):
    def strange() -> None:
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b""):
            for _ in range(100):
                try:
                    with socket.create_connection(("127.0.0.1", int(coordinator.split(":")[1]) + 1)) as each:
                        each.sendall(noise)
                        break
                except OSError:
                    time.sleep(0.02)

    thread = threading.Thread(target=strange)
    thread.start()
    waiting = threading.Timer(1.0, lambda: results.extend(call_roll(coordinator, (1, 2))))
    results: list[Line | str] = []
    waiting.start()
    found = call_roll(coordinator, (0, 2))
    thread.join()
    waiting.join()
    for line in [*found, *results]:
        assert isinstance(line, Line)
        hang_up(line)


@pytest.mark.parametrize("address", ["here", ":80", "a:b", "a:0", "a:65535", "a:-1"])
def test_an_address_is_host_and_port(address: str):
    with pytest.raises(ValueError, match=r"JAXALIGN_COORDINATOR=.*write host:port"):
        check_address(address, "JAXALIGN_COORDINATOR")


def test_an_ipv6_address():
    assert check_address("[::1]:80", "x") == ("::1", 80)


def test_a_message_in_pieces():
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)
    for part in (b'{"co', b'de": 1}\n{"code"', b": 2}\n"):
        ours.sendall(part)
    assert [peer.receive(), peer.receive()] == [{"code": 1}, {"code": 2}]
    ours.close()
    assert peer.receive() is None
    peer.close()


def test_a_connection_to_oneself_is_not_taken_for_process_0(coordinator, monkeypatch):
    connect, own = socket.create_connection, []

    def to_itself(address: tuple[str, int], timeout: float) -> socket.socket:
        """What happens by chance while nobody listens on a port of those that the kernel deals out."""
        if own:
            return connect(address, timeout)
        own.append(connect(address, timeout, source_address=address))
        return own[0]

    monkeypatch.setattr(socket, "create_connection", to_itself)
    first: list[Line | str] = []
    later = threading.Timer(0.5, lambda: first.extend(call_roll(coordinator, (0, 2))))
    later.start()
    (second,) = call_roll(coordinator, (1, 2))
    later.join()
    assert own and own[0].fileno() == -1  # closed
    for line in (*first, second):
        assert isinstance(line, Line), line
        hang_up(line)
