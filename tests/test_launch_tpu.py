"""The launcher of Cloud TPU slices, without a cloud."""

import re
import subprocess
import sys

import pytest

from tests.launching import CONFIG, ROOT, Cloud


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path)


STATE, NODE = "queued-resources describe", r"tpu-vm describe .*value\(state\)"
READY = [(STATE, 0, "ACTIVE\n"), (NODE, 0, "READY\n"), ("networkEndpoints", 0, "2\n")]
# How process 0 is followed, and how the first machine and all of them are asked.
FOLLOW, FIRST, ALL = "tail -n .* -F", "(?s)worker=0 .*ended ", "(?s)worker=all .*ended "
NOT_THERE = ("queued-resources describe", 1, "ERROR: NOT_FOUND: Resource was not found\n")


def tpu(cloud, *more: str) -> tuple[int, str]:
    command = ["launch/tpu_vm.sh", "--name", "n", "--zone", "z", "--type", "v5p-16", "--bucket", "gs://b/runs/", *more]
    return cloud.run(*command, CONFIG, "log.report_to=[wandb]", JAXALIGN_POLL="0", JAXALIGN_TRIES="2")


def test_tpu_gets_a_slice_installs_starts_and_follows(cloud):
    wait = ("queued-resources describe", 0, "PROVISIONING\n")
    cloud.answer(NOT_THERE, wait, *READY, (ALL, 0, "ended 0\nended 0\n"))
    code, output = tpu(cloud, "--spot", "--project", "p")
    assert code == 0, output
    (created,) = cloud.calls("queued-resources create")
    assert created == (
        "gcloud compute tpus queued-resources create n --zone z --project p --node-id n --accelerator-type v5p-16 "
        "--runtime-version v2-alpha-tpuv5 --spot"
    )
    (copied,) = cloud.calls("tpu-vm scp")
    assert "--worker=all" in copied and "jaxalign.tgz" in copied
    calls = [each["call"] for each in cloud.records() if "ssh" in each["call"]]
    assert [each[-2] for each in calls] == ["--worker=all"] * 2 + ["--worker=0"] * 2 + ["--worker=all"]
    install, start, follow, *_ = calls
    assert "jaxalign-src[tpu,gcs]" in install[-1] and "tail -n +1 -F run.log" in follow[-1]
    assert "JAXALIGN_PROCESSES=auto" in start[-1] and "runs_dir=gs://b/runs" in start[-1]
    assert "log.report_to=\\[wandb\\]" in start[-1]
    assert not cloud.calls("delete") and "the slice stays" in output


def test_tpu_refused_by_quota_stops_at_once(cloud):
    cloud.answer(NOT_THERE, ("create", 1, "ERROR: RESOURCE_EXHAUSTED: Quota 'TPUV5PPerProject' exceeded\n"))
    code, output = tpu(cloud)
    assert code == 1 and "Quota 'TPUV5PPerProject' exceeded" in output and "nothing was created" in output
    assert len(cloud.calls("create")) == 1 and not cloud.calls("ssh")


def test_tpu_without_a_login_stops_at_once(cloud):
    cloud.answer(("describe", 1, "ERROR: (gcloud) You do not currently have an active account selected.\n"))
    code, output = tpu(cloud)
    assert code == 1 and "active account" in output and not cloud.calls("create|ssh")


def test_tpu_taken_away_is_recreated_and_the_run_continues(cloud):
    cloud.answer(
        *[(STATE, 0, "ACTIVE\n")] * 2,
        *(NOT_THERE, (STATE, 0, "ACTIVE\n")),
        *[(NODE, 0, "READY\n"), (NODE, 0, "PREEMPTED\n"), (NODE, 0, "READY\n")],
        ("networkEndpoints", 0, "1\n"),
        *[(FOLLOW, 255, "Connection closed\n"), (FOLLOW, 0, "")],
        *[(FIRST, 255, ""), (FIRST, 0, "ended 0\n")],
        (ALL, 0, "ended 0\n"),
    )
    code, output = tpu(cloud)
    assert code == 0, output
    steps = cloud.calls("delete|create|nohup")
    assert [re.findall("delete|create|nohup", step)[0] for step in steps] == ["nohup", "delete", "create", "nohup"]
    assert "--force --quiet" in steps[1] and "the slice is PREEMPTED" in output


@pytest.mark.parametrize("step", ["tpu-vm scp", "uv pip install"])
def test_tpu_taken_away_while_installing_is_started_again(cloud, step: str):
    cloud.answer(*READY, (step, 1, "Connection closed\n"), (step, 0, ""), (ALL, 0, "ended 0\nended 0\n"))
    code, output = tpu(cloud)
    assert code == 0 and len(cloud.calls(step)) == 2 and "starting again (1 of 20)" in output
    cloud.answer(*READY, (step, 1, "Connection closed\n"))
    assert tpu(cloud, "--restarts", "1")[0] == 75 and len(cloud.calls(step)) == 2 + 2


@pytest.mark.parametrize(
    ("answer", "code", "starts"),
    [
        ("ended 1\nended 75\n", 1, 1),
        ("ended 143\nended 143\n", 143, 2),
        ("ended 0\nrunning\n", 75, 2),  # a process that hangs
        ("ended 0\n", 75, 2),  # a machine that does not answer
        ("ended 0\ngone\n", 75, 2),  # a machine that was started anew
        ("ended 1\ngone\n", 1, 1),
    ],
)
def test_tpu_starts_again_only_where_that_helps(cloud, answer: str, code: int, starts: int):
    cloud.answer(*READY, (ALL, 0, answer))
    found, output = tpu(cloud, "--restarts", "1", "--delete")
    assert found == code, output
    assert len(cloud.calls("nohup")) == starts and len(cloud.calls("delete n")) == 1
    assert len(cloud.calls("kill -KILL")) == (2 if "running" in answer else 0)


def test_tpu_counts_no_lost_connection(cloud):
    """The run goes on without the connection: what was lost is following it, and that is no restart."""
    under_way = ("(?s)worker=all .*nohup", 0, "under way\nunder way\n")
    cloud.answer(
        *READY,
        # The first start; then all connections break, twice, and process 0 alone, once.
        *[("(?s)worker=all .*nohup", 0, ""), under_way, under_way],
        *[(FIRST, 255, ""), (FIRST, 255, ""), (FIRST, 0, "step 7\nrunning\n"), (FIRST, 0, "ended 0\n")],
        (ALL, 0, "ended 0\nended 0\n"),
    )
    code, output = tpu(cloud, "--restarts", "1")
    assert code == 0, output
    assert [re.findall("tail -n (\\S+)", call)[0] for call in cloud.calls(FOLLOW)] == ["+1", "+1", "+1", "10"]


# A slice of two machines that are folders here: files are copied, commands are run. What would be fetched is not.
SLICE = r"""#!/bin/bash
case "$3 $4 $*" in
  queued-resources*) echo ACTIVE ;;
  *networkEndpoints*) echo 2 ;;
  *"tpu-vm describe"*) echo READY ;;
esac
for word in "$@"; do
  case $word in
    --worker=all) machines="0 1" ;;
    --worker=0) machines=0 ;;
    --command=*) command=${word#--command=} ;;
    *.tgz | *.yaml) files+=("$word") ;;
  esac
done
for machine in ${machines:-}; do
  [[ $4 == ssh ]] || cp "${files[@]}" "$HOMES/$machine"
  (cd "$HOMES/$machine" && export HOME=$PWD && [[ $4 != ssh ]] || bash -c "$command")
done
"""
UV = '#!/bin/bash\nif [ "$1" = venv ]; then mkdir -p .jaxalign/bin && cp "$JAXALIGN" .jaxalign/bin/jaxalign; fi\n'
# Opens what the config names, as a run does; tells where the model is.
OPENS = """#!{python}
import sys, time
from pathlib import Path
import yaml
config = yaml.safe_load(Path(sys.argv[2]).read_text())
for path in (config["data"]["path"], config["data"]["eval_path"]):
    print(path, len(Path(path).read_text().splitlines()), "rows", flush=True)
print("overrides:", *sys.argv[3:], flush=True)
time.sleep(1)
sys.exit(143)
"""


def test_what_tpu_machines_run(cloud, tmp_path):
    """The repository arrives, and what a config names in it is found; started detached, once; its status comes back."""
    (tmp_path / "jaxalign").write_text(OPENS.format(python=sys.executable))
    (tmp_path / "jaxalign").chmod(0o755)
    for machine in ("0", "1"):
        uv = tmp_path / machine / ".local/bin/uv"
        uv.parent.mkdir(parents=True)
        uv.write_text(UV)
        uv.chmod(0o755)
    for tool, text in {
        "gcloud": SLICE,
        "python3": "#!/bin/bash\n",
        "sleep": "#!/bin/bash\nexec /bin/sleep 0.3\n",
    }.items():
        cloud.write(tool, text)
    (cloud.bin / "jaxalign").unlink()
    command = ["launch/tpu_vm.sh", "--name", "n", "--zone", "z", "--type", "v5p-16", "--bucket", "gs://b", "--restarts"]
    homes = {"HOMES": str(tmp_path), "JAXALIGN": str(tmp_path / "jaxalign")}
    code, output = cloud.run(*command, "0", CONFIG, "a=[b c]", **homes, JAXALIGN_POLL="0")
    assert code == 143, output
    rows = len((ROOT / "data/concise/train.jsonl").read_text().splitlines())
    assert f"data/concise/train.jsonl {rows} rows" in output and "overrides: runs_dir=gs://b a=[b c]" in output
    for machine in ("0", "1"):
        home = tmp_path / machine
        assert (home / "run.status").read_text() == "143\n" and (home / "run.log").stat().st_size
        # A model beside the repository, not in it, does not come along.
        assert not (home / "jaxalign-src/models").exists()


def test_a_machine_is_left_alone_while_its_run_is_under_way(cloud, tmp_path):
    cloud.answer(*READY, (FIRST, 0, "ended 0\n"), (ALL, 0, "ended 0\nrunning\n"))
    tpu(cloud, "--restarts", "0")
    commands = [each["call"][-1].removeprefix("--command=") for each in cloud.records() if "ssh" in each["call"]]
    start, status, stop = commands[1], commands[-2], commands[-1]
    worker = tmp_path / "jaxalign-src/launch/worker.sh"
    worker.parent.mkdir(parents=True)
    worker.write_text("#!/bin/bash\necho begun\nwhile :; do sleep 0.05; done\n")
    worker.chmod(0o755)

    def remote(command: str) -> list[str]:
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, text=True, capture_output=True, timeout=30)
        return done.stdout.splitlines()

    try:
        assert remote(status) == ["gone"] and remote(start) == []
        assert remote(start) == ["under way"] and remote(status) == ["begun", "running"]
    finally:
        remote(stop)
    # Killed at once, but there until whoever adopted it has noticed.
    assert any(remote(f"sleep 0.1; {status}") == ["gone"] for _ in range(100)) and remote(stop) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--name", "n"], "--zone and --type"),
        (["--name", "n", "--zone", "z", "--type", "t", "--bucket", "/disk", CONFIG], "share no disk"),
        (["--name", "n", "--zone", "z", "--type", "t", "--bucket", "gs://b", "no.yaml"], "no.yaml: no such file"),
        (["--nmae", "n"], "--nmae: no such option"),
    ],
)
def test_tpu_names_what_is_missing(cloud, arguments: list[str], told: str):
    code, output = cloud.run("launch/tpu_vm.sh", *arguments)
    assert code == 2 and told in output and not cloud.calls()
