"""What tested code cannot do: pass without passing, go on, use more than its share, reach what is not its own."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from jaxalign.rewards.sandbox import (
    LAYERS,
    Limits,
    Program,
    SandboxError,
    describe_sandbox,
    run_program,
    run_programs,
)

WITHOUT = [(), ("landlock",), ("namespaces",), LAYERS]
every_layer = pytest.mark.parametrize("without", WITHOUT, ids=lambda names: f"without {' and '.join(names) or 'none'}")
linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
ADD = "def add(a, b):\n    return a + b\n"
# A name that its children inherit and that is seen from outside; at most 15 bytes.
MARKED = "import ctypes, os, time\nctypes.CDLL(None).prctl(15, b'{name}')\n"


def marked(code: str) -> tuple[str, str]:
    name = f"jx-{uuid.uuid4().hex[:10]}"
    return MARKED.replace("{name}", name) + code, name


def alive(name: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "comm").read_text().strip() == name:
                found.append(path.name)
        except OSError:
            continue
    return found


def wait_for(condition) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@every_layer
def test_each_test_counts_by_itself(without):
    tests = ["assert add(1, 2) == 3", "assert add(1, 2) == 4", "add(1)", "assert add('a', 'b') == 'ab'", "1 +"]
    outcome = run_program(Program(ADD, tests), without=without)
    assert outcome.passed == (True, False, False, True, False)
    assert outcome.ended == "finished" and outcome.error is None
    assert [error and error.split(":")[0] for error in outcome.errors] == [
        *(None, "AssertionError", "TypeError", None, "SyntaxError")
    ]


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "raise SystemExit",
        "def add(a, b):\n    raise SystemExit(0)",
        "import os\ndef add(a, b):\n    os._exit(0)",
        # What a harness might be waiting for, on every descriptor there is.
        "import os\nfor fd in range(1, 64):\n    for text in ('passed', '{\"test\": 0, \"error\": null}'):\n"
        "        try:\n            os.write(fd, ('\\n' + '0' * 32 + ' ' + text + '\\n').encode())\n"
        "        except OSError:\n            pass\nos._exit(0)",
        "import builtins\nbuiltins.compile = builtins.exec = lambda *a: None\n"
        "def add(a, b):\n    return 'something else'",
        "import os\nos.close(3)\ndef add(a, b):\n    return a + b",
        "1 +",
        "while True\n    pass",
        "import numpy_that_is_not_there",
    ],
)
def test_ending_or_printing_is_not_passing(code):
    outcome = run_program(Program(code, ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]))
    assert outcome.passed == (False, False)


@every_layer
def test_a_loop_without_end(without):
    tests = ["assert add(1, 2) == 3", "while True: pass", "assert add(1, 2) == 3"]
    start = time.monotonic()
    outcome = run_program(Program(ADD, tests), Limits(seconds=0.4), without=without)
    assert outcome.ended == "time limit" and outcome.passed == (True, False, False)
    assert time.monotonic() - start < 5


def test_processor_time_is_bounded():
    start = time.monotonic()
    outcome = run_program(Program("while True: pass", ["pass"]), Limits(seconds=30, cpu_seconds=1))
    assert outcome.passed == (False,) and "time limit" not in outcome.ended
    assert time.monotonic() - start < 15


@linux
def test_a_fork_bomb():
    if describe_sandbox()["processes"] != "namespace":
        pytest.skip("this kernel gives no process namespaces")
    code, name = marked("while True:\n    try:\n        os.fork()\n    except OSError:\n        time.sleep(0.01)")
    outcome = run_program(Program(code, ["pass"]), Limits(seconds=0.6, processes=12))
    assert outcome.passed == (False,) and outcome.ended in ("time limit", "process limit")
    assert not alive(name)


@linux
@pytest.mark.parametrize("without", [("namespaces",), LAYERS])
def test_processes_are_counted_without_namespaces(without):
    # One new process every few milliseconds, and not twice as many: nothing but our own count holds this one up.
    code, name = marked(
        "while True:\n    try:\n        if os.fork() == 0:\n            break\n    except OSError:\n        pass\n"
        "    time.sleep(0.004)\ntime.sleep(60)"
    )
    outcome = run_program(Program(code, ["pass"]), Limits(seconds=20, processes=12), without=without)
    assert outcome.passed == (False,) and outcome.ended == "process limit"
    assert not alive(name)


@linux
@every_layer
def test_a_detached_grandchild_is_dead_afterwards(without):
    code, name = marked(
        "import signal\n"
        "if os.fork() == 0:\n    os.setsid()\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    if os.fork() == 0:\n        for fd in range(64):\n            try:\n                os.close(fd)\n"
        "            except OSError:\n                pass\n        time.sleep(60)\n    os._exit(0)\n"
        "os.wait()"
    )
    start = time.monotonic()
    outcome = run_program(Program(code, ["pass"]), without=without)
    assert outcome.passed == (True,) and outcome.ended == "finished"
    assert not alive(name)
    assert time.monotonic() - start < 8


@linux
@pytest.mark.parametrize("without", [(), LAYERS])
def test_nothing_outlives_a_killed_run(without, tmp_path):
    code, name = marked("os.fork()\nos.setsid() if os.fork() == 0 else None\ntime.sleep(60)")
    run = f"run_program(Program({code!r}, ['pass']), without={without})"
    command = [sys.executable, "-c", f"from jaxalign.rewards import Program, run_program\n{run}"]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        try:
            assert wait_for(lambda: len(alive(name)) == 4)
        finally:
            process.kill()
    assert wait_for(lambda: not alive(name) and not list(tmp_path.iterdir()))


@linux
def test_it_cannot_kill_what_is_outside():
    if describe_sandbox()["processes"] != "namespace":
        pytest.skip("this kernel gives no process namespaces, and the second program would end the tests")
    outcome = run_program(Program(f"import os, signal\nos.kill({os.getpid()}, 0)", ["pass"]))
    assert outcome.error and outcome.error.startswith(("ProcessLookupError", "PermissionError"))
    assert run_program(Program("import os, signal\nos.kill(-1, signal.SIGKILL)", ["pass"])).ended != "time limit"


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not bound the address space")
@every_layer
def test_allocation_without_end(without):
    code = "held = []\ndef grow():\n    while True:\n        held.append(bytearray(10**6))\ndef small():\n    return 1"
    tests = ["bytearray(10**10)", "grow()", "held.clear(); assert small() == 1"]
    outcome = run_program(Program(code, tests), Limits(memory_mb=128), without=without)
    assert outcome.passed == (False, False, True)
    assert [str(error)[:11] for error in outcome.errors[:2]] == ["MemoryError", "MemoryError"]


@linux
@every_layer
def test_memory_of_all_processes_together(without):
    code = (
        "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n"
        "        held = b'x' * 40_000_000\n        time.sleep(60)\ntime.sleep(60)"
    )
    outcome = run_program(Program(code, ["pass"]), Limits(seconds=20, memory_mb=100), without=without)
    assert outcome.ended == "memory limit" and outcome.passed == (False,)


@every_layer
def test_a_flood_of_output(without):
    code = "import os\nprint('first line')\nwhile True:\n    os.write(1, b'x' * 4096)\n    os.write(2, b'y' * 4096)"
    outcome = run_program(Program(code, ["pass"]), Limits(seconds=0.4, output_kb=8), without=without)
    assert outcome.ended == "time limit" and len(outcome.output) <= 8 * 1024
    flood = "import os\nos.write(3, b'x' * 2**22)"
    assert run_program(Program(flood, ["pass"]), Limits(seconds=5), without=without).passed == (False,)


@every_layer
def test_files_outside_are_out_of_reach(without, tmp_path, monkeypatch):
    if not describe_sandbox(without)["files"]:
        pytest.skip("nothing is left that keeps it from this user's files")
    monkeypatch.setenv("JAXALIGN_SECRET", "in the environment")
    secret, made = tmp_path / "secret", tmp_path / "made"
    secret.write_text("a key")
    secret.chmod(0o666)
    tmp_path.chmod(0o777)
    code = (
        "import os, pathlib\n"
        f"secret, made = pathlib.Path({str(secret)!r}), pathlib.Path({str(made)!r})\n"
        "def refused(action):\n    try:\n        action()\n    except OSError:\n        return True\n"
    )
    own = "pathlib.Path('notes').write_text('mine'); assert pathlib.Path(os.environ['HOME'], 'notes').exists()"
    tests = [
        own,
        "import tempfile; tempfile.TemporaryFile().write(b'mine')",
        "assert refused(lambda: made.write_text('x'))",
        "assert refused(lambda: secret.read_text())",
        "assert refused(lambda: secret.write_text('x'))",
        "assert refused(secret.unlink)",
        f"assert refused(lambda: pathlib.Path({str(Path(__file__))!r}).read_text())",
        "assert refused(lambda: open('/etc/passwd').read())",
        "assert refused(lambda: open(os.__file__, 'a'))",
        "assert refused(lambda: os.listdir('/proc'))",
        "assert 'JAXALIGN_SECRET' not in os.environ",
        "os.chdir('/'); assert refused(lambda: open('escaped', 'w'))",
    ]
    outcome = run_program(Program(code, tests), without=without)
    assert outcome.passed == (True,) * len(tests), outcome.errors
    assert not made.exists() and secret.read_text() == "a key" and not Path("/escaped").exists()


def test_disk_is_bounded():
    write = "def write(name, mb):\n    with open(name, 'wb') as file:\n        file.write(bytes(mb * 2**20))\n"
    tests = ["write('a', 3)", "write('b', 5)", "for i in range(9): write(str(i), 3)"]
    outcome = run_program(Program(write, tests), Limits(file_mb=4, disk_mb=16))
    in_memory = "private root" in describe_sandbox()["files"]
    assert outcome.passed == (True, False, not in_memory)


@every_layer
def test_the_network_is_out_of_reach(without):
    if describe_sandbox(without)["network"] == "open":
        pytest.skip("nothing is left that keeps it from the network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)"
        outcome = run_program(Program(code, ["pass"]), without=without)
        assert outcome.passed == (False,)
        assert outcome.error and outcome.error.startswith(("OSError", "PermissionError", "ConnectionRefusedError"))
        with pytest.raises(TimeoutError):
            server.accept()


@every_layer
def test_its_folder_is_deleted(without, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os\nos.makedirs('deep/er')\nopen('deep/er/x', 'w').close()\nos.chmod('deep/er', 0)\nos.chmod('deep', 0)"
    )
    assert run_program(Program(code, ["pass"]), without=without).passed == (True,)
    assert list(tmp_path.iterdir()) == []


def test_the_order_of_a_set_does_not_change():
    program = Program("print({str(i) for i in range(50)})", ["pass"])
    first, second = run_program(program), run_program(program)
    assert first.output == second.output != ""


def test_installed_packages_are_seen_only_when_asked_for():
    program = Program("import numpy", ["assert int(numpy.arange(4).sum()) == 6"])
    assert run_program(program).passed == (False,)
    assert run_program(program, Limits(memory_mb=1024), site_packages=True).passed == (True,)


def test_many_at_once_and_in_order():
    code = "import time\ntime.sleep(0.5)\nnumber = {}"
    programs = [Program(code.replace("{}", str(i)), [f"assert number == {i}"]) for i in range(6)]
    start = time.monotonic()
    outcomes = run_programs([*programs, Program("number = 1", ["assert number == 2"])], workers=7)
    passed = [outcome.passed for outcome in outcomes if not isinstance(outcome, SandboxError)]
    assert passed == [*([(True,)] * 6), (False,)]
    assert time.monotonic() - start < 6 * 0.5


def test_a_sandbox_that_does_not_work_is_an_error_and_no_verdict(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SandboxError, match="status 1"):
        run_program(Program("", ["pass"]), without=())
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(SandboxError, match="cannot start Python"):
        run_program(Program("", ["pass"]), without=())


def test_limits_that_allow_nothing_are_refused():
    with pytest.raises(ValueError, match="seconds=0"):
        Limits(seconds=0)
    with pytest.raises(ValueError, match="jail"):
        run_program(Program("", ["pass"]), without=("jail",))
