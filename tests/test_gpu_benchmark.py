"""`benchmarks/gpu.py` on a tiny shape: what it counts by hand and by the packed rows, and that its command runs."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import jax
import pytest

from jaxalign.models import build
from jaxalign.models.families import from_hf
from jaxalign.run.hardware import peak_of

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return tuple(import_module(name) for name in ("gpu", "gpu_cases", "gpu_ours", "ours"))


def test_counts_by_hand(scripts):
    """One layer of 64 × 16 × (2 × 4 + 2 × 2) + 3 × 64 × 160 = 43,008 weights; 4 heads of 16; a head of 512 × 64."""
    gpu, cases, *_ = scripts
    work = cases.WORK["tiny"]
    # 95 tokens of each of 4 documents: 2 × 43,008 × 95 + 4 × 4 × 16 × 95 × 96 / 2 + 2 × 512 × 64 × 95, three times.
    assert gpu.counts("tiny", "sft", work) == (4, 380, 12 * (8_171_520 + 1_167_360 + 6_225_920), 0)
    # 15 steps read 75,776 weights and, of 4 slots, 15 × 32 + (1 + ... + 15) keys and values of 2 × 2 × 16 numbers.
    assert gpu.counts("tiny", "decode", work).moved == 2 * (15 * 75_776 + 4 * (480 + 120) * 64)
    assert gpu.counts("tiny", "decode", work).tokens == 60


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_counts_are_those_of_the_packed_rows(scripts, task):
    gpu, cases, measured, ours = scripts
    args = cases.arguments("").parse_args(["--shape", "tiny", "--task", task])
    work = cases.WORK["tiny"]
    *_, (batch, _) = measured.examples(args, work)
    counted = gpu.counts("tiny", task, work)
    assert counted.tokens == int((batch.rows.documents > 0).sum())
    assert counted.flops == ours.least_flops(task, build(from_hf(cases.SHAPES["tiny"])), batch)
    if task == "dpo":
        # A second copy of 4 prompts of 32 tokens.
        assert gpu.counts("tiny", task, work, shared=False).tokens == counted.tokens + 128


def test_figures(scripts):
    """Half of the peak, and a quarter of the bandwidth once the first token's call is taken off."""
    gpu, *_ = scripts
    peaks = {"peak_flops": 1e12, "peak_bandwidth": 8e9}
    trained = gpu.figures("sft", gpu.Counted(4, 100, 2e12, 0), {"seconds": [9.0, 4.0, 4.0]}, peaks)
    assert (trained["mfu"], trained["tokens_per_second"]) == (0.5, 25)
    drawn = gpu.figures("decode", gpu.Counted(4, 60, 1.0, 4e9), {"seconds": [2.5], "first_token_seconds": [0.5]}, peaks)
    assert (drawn["of_bandwidth_floor"], drawn["tokens_per_second"]) == (0.25, 30)
    unknown = gpu.figures("sft", gpu.Counted(4, 100, 2e12, 0), {"seconds": [4.0]}, {"peak_flops": None})
    assert "mfu" not in unknown and unknown["seconds"] == 4


@pytest.mark.slow
def test_the_command(tmp_path):
    results = tmp_path / "results.jsonl"
    command = [sys.executable, FOLDER / "gpu.py", "--shapes", "tiny", "--tasks", "dpo", "--steps", "1"]
    command += ["--trl-python", "missing", "--results", results]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TRL is left out" in done.stdout
    (record,) = map(json.loads, results.read_text().splitlines())
    assert record["loss"] == pytest.approx(0.693, abs=0.05)  # two equal models, so log 2, and few small updates
    assert 0 < record["figures"]["mfu"] < 1


def test_decoding_is_measured(scripts, capsys):
    _, cases, measured, _ = scripts
    args = cases.arguments("").parse_args(["--shape", "tiny", "--task", "decode", "--steps", "3"])
    mesh = measured.make_mesh(measured.MeshConfig(), jax.devices()[:1])
    found = measured.decode(args, cases.WORK["tiny"], mesh)
    assert len(found["seconds"]) == len(found["first_token_seconds"]) == 1


@pytest.mark.parametrize(
    ("kind", "flops", "bandwidth"),
    [
        ("NVIDIA H200", 989e12, 4.8e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA H100 PCIe", 756e12, 2e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12),
        ("NVIDIA L4", 121e12, 0.3e12),
        ("NVIDIA L40S", 362e12, 0.864e12),
        ("NVIDIA GeForce RTX 4090", 165e12, 1.008e12),
        ("NVIDIA B200", 2250e12, 8e12),
        ("TPU v5 lite", 197e12, 0.819e12),
        ("TPU7x", 1153.5e12, 3.69e12),
    ],
)
def test_peaks_by_the_names_that_devices_have(kind, flops, bandwidth):
    assert peak_of(kind) == (flops, bandwidth)


def test_an_unknown_device_has_no_peak():
    assert peak_of("NVIDIA GeForce GT 1030") is None
