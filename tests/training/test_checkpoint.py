"""Checkpoints: exact, verified, and safe against damage, kills, full disks and folders that cannot be written."""

import hashlib
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.training import checkpoint
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.state import TrainState, init_state

OPTIMIZER = optax.chain(
    optax.add_decayed_weights(0.1, mask={"embed": {"embedding": True}, "norm": {"scale": False}}),
    optax.adam(1e-3),
)


def make_state(seed: int) -> TrainState:
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "embed": {"embedding": jax.random.normal(keys[0], (8, 16))},
        "norm": {"scale": jax.random.normal(keys[1], (16,), jnp.bfloat16)},
    }
    state = init_state(params, OPTIMIZER, jax.random.key(seed + 100, impl="rbg"))
    return TrainState(state.step + seed, state.params, jax.tree.map(lambda x: x + 1, state.opt_state), state.key)


def make_source(seed: int) -> dict:
    return {"position": seed, "buffer": np.arange(3 * seed, dtype=np.int64), "fraction": 0.1 * seed}


def same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def fill(folder: Path, *steps: int, limit: int | None = None) -> None:
    with Checkpoints(folder, save_total_limit=limit) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), make_source(step), {"loss": step / 3})


def restored_is(folder: Path, step: int, rejected: dict[int, str]) -> None:
    """The newest sound checkpoint is `step`, exact; the others were rejected for these reasons."""
    got = Checkpoints(folder).restore(jax.eval_shape(lambda: make_state(0)))
    assert got is not None and got.step == step
    same(got.state, make_state(step))
    assert got.source["position"] == step and got.source["fraction"] == 0.1 * step
    np.testing.assert_array_equal(got.source["buffer"], np.arange(3 * step))
    assert got.meta == {"loss": step / 3}
    assert {bad.step: bad.reason for bad in got.rejected} == rejected


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    fill(folder, 10, 20, 30)
    return folder


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "run"))


def files(step_folder: Path) -> list[Path]:
    return sorted(path for path in step_folder.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_was_saved_comes_back_bit_for_bit(folder):
    restored_is(folder, 30, {})
    assert Checkpoints(folder).steps() == [10, 20, 30]


def test_nothing_saved_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.restore(make_state(0)) is None and checkpoints.steps() == []
    checkpoints.close()
    assert not (tmp_path / "none").exists()


def test_sums_are_what_sha256sum_checks(folder):
    step = folder / "30"
    lines = (step / checkpoint.SUMS).read_text().splitlines()
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((step / name).read_bytes()).hexdigest() == digest
    assert len(lines) == len(files(step)) - 1 >= 10
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "--quiet", "-c", checkpoint.SUMS], cwd=step).returncode == 0


def test_a_flipped_bit_in_any_file_is_found(folder):
    for path in files(folder / "30"):
        before = path.read_bytes()
        flip(path)
        assert checkpoint.verify(epath.Path(folder / "30")) is not None, path
        path.write_bytes(before)
    assert checkpoint.verify(epath.Path(folder / "30")) is None


def largest(step_folder: Path) -> Path:
    """Of what was saved: with little data in few files the list of their checksums may be larger."""
    saved = (path for path in files(step_folder) if path.name != checkpoint.SUMS)
    return max(saved, key=lambda path: path.stat().st_size)


def flipped(folder: Path) -> str:
    flip(largest(folder / "30"))
    return f"{largest(folder / '30').relative_to(folder / '30')} is not what was saved (its SHA-256 differs)"


def truncated(folder: Path) -> str:
    name = largest(folder / "30")
    os.truncate(name, name.stat().st_size // 2)
    return f"{name.relative_to(folder / '30')} is not what was saved (its SHA-256 differs)"


def deleted(folder: Path) -> str:
    name = largest(folder / "30")
    name.unlink()
    return f"{name.relative_to(folder / '30')} is missing"


def sums_cut(folder: Path) -> str:
    path = folder / "30" / checkpoint.SUMS
    kept, cut = path.read_text().splitlines()[:-1], path.read_text().splitlines()[-1]
    path.write_text("".join(f"{line}\n" for line in kept))
    return f"{cut.split('  ')[1]} is not in {checkpoint.SUMS}"


def sums_missing(folder: Path) -> str:
    (folder / "30" / checkpoint.SUMS).unlink()
    return checkpoint.UNFINISHED


@pytest.mark.parametrize("damage", [flipped, truncated, deleted, sums_cut, sums_missing])
def test_damage_to_the_newest_is_reported_and_the_step_before_used(folder, damage, caplog):
    reason = damage(folder)
    restored_is(folder, 20, {30: reason})
    assert f"30 is not used: {reason}" in caplog.text


def test_damage_to_two(folder):
    reasons = {30: flipped(folder)}
    flip(folder / "20" / "meta" / "metadata")
    reasons[20] = "meta/metadata is not what was saved (its SHA-256 differs)"
    restored_is(folder, 10, reasons)


def test_all_damaged_is_an_error_that_lists_them(folder):
    for step in (10, 20, 30):
        (folder / str(step) / "meta" / "metadata").unlink()
    with pytest.raises(
        ValueError, match=r"all 3 checkpoints are damaged in .*: 30: meta/metadata is missing; 20: .*10:"
    ):
        Checkpoints(folder).restore(make_state(0))


def test_a_first_save_that_did_not_finish_is_nothing_but_several_are_damage(folder):
    for step in (10, 20, 30):
        (folder / str(step) / checkpoint.SUMS).unlink()
    with pytest.raises(ValueError, match="all 3 checkpoints are damaged"):
        Checkpoints(folder).restore(make_state(0))
    for step in (20, 30):
        shutil.rmtree(folder / str(step))
    assert Checkpoints(folder).restore(make_state(0)) is None


def test_a_step_asked_for_is_that_or_an_error(folder):
    got = Checkpoints(folder).restore(make_state(0), 20)
    assert got is not None and got.step == 20
    flip(largest(folder / "20"))
    with pytest.raises(ValueError, match="checkpoint 20 is damaged"):
        Checkpoints(folder).restore(make_state(0), 20)
    with pytest.raises(ValueError, match=r"checkpoint 5 is damaged in .*: 5: it does not exist"):
        Checkpoints(folder).restore(make_state(0), 5)


def test_saving_a_damaged_step_again_moves_it_aside(folder):
    flip(largest(folder / "30"))
    fill(folder, 30)
    restored_is(folder, 30, {})
    assert (folder / "30.damaged").is_dir()
    flip(largest(folder / "30"))
    fill(folder, 30)
    restored_is(folder, 30, {})
    assert (folder / "30.damaged.1").is_dir() and Checkpoints(folder).steps() == [10, 20, 30]


def test_saving_an_unfinished_step_again_replaces_it(folder):
    (folder / "30" / checkpoint.SUMS).unlink()
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(25, make_state(25), make_source(25), {"loss": 25 / 3})
        checkpoints.save(30, make_state(30), make_source(30), {"loss": 30 / 3})
    restored_is(folder, 30, {})
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "25", "30"]


def test_saving_a_sound_step_again_is_an_error(folder):
    with Checkpoints(folder) as checkpoints, pytest.raises(ValueError, match="step 30 is saved already"):
        checkpoints.save(30, make_state(30), {}, {})
    restored_is(folder, 30, {})


def test_what_a_kill_inside_a_save_leaves_is_reported_and_cleared_away(folder, caplog):
    left = folder / "40.orbax-checkpoint-tmp"
    shutil.copytree(folder / "30", left)
    (left / checkpoint.SUMS).unlink()
    largest(left).unlink()
    restored_is(folder, 30, {40: checkpoint.UNFINISHED})
    assert f"40 is not used: {checkpoint.UNFINISHED}" in caplog.text
    fill(folder, 50)
    restored_is(folder, 50, {})
    assert not left.exists()


def test_a_kill_inside_the_first_save_leaves_nothing(folder, tmp_path):
    shutil.copytree(folder / "30", tmp_path / "first" / "30.orbax-checkpoint-tmp")
    assert Checkpoints(tmp_path / "first").restore(make_state(0)) is None


def test_a_kill_between_commit_and_checksums_falls_back(tmp_path, monkeypatch):
    fill(tmp_path, 1, limit=1)

    def killed(path):
        raise SystemExit("as if killed here")

    monkeypatch.setattr(checkpoint, "write_sums", killed)
    checkpoints = Checkpoints(tmp_path, save_total_limit=1)
    checkpoints.save(2, make_state(2), make_source(2), {"loss": 2 / 3})
    with pytest.raises(OSError, match="cannot save checkpoint 2"):
        checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    restored_is(tmp_path, 1, {2: checkpoint.UNFINISHED})
    monkeypatch.undo()
    fill(tmp_path, 2, limit=1)
    restored_is(tmp_path, 2, {})
    assert Checkpoints(tmp_path).steps() == [2]


def test_a_kill_while_an_old_one_is_deleted_leaves_no_false_alarm(folder):
    (folder / "10" / checkpoint.SUMS).unlink()
    largest(folder / "10").unlink()
    restored_is(folder, 30, {})
    fill(folder, 40, limit=5)
    assert sorted(path.name for path in folder.iterdir()) == ["20", "30", "40"]


def test_the_last_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, save_total_limit=2) as checkpoints:
        for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2), (6, 6)):
            checkpoints.save(step, make_state(step), {}, {}, keep=(best,))
            checkpoints.wait()
            assert checkpoints.steps() == sorted({best, *range(max(1, step - 1), step + 1)})


def test_newer_damaged_ones_do_not_count_among_the_last(folder):
    flip(largest(folder / "30"))
    fill(folder, 22, 24, limit=1)
    restored_is(folder, 24, {30: verify_reason(folder / "30")})
    assert Checkpoints(folder).steps() == [24, 30]


def verify_reason(path: Path) -> str:
    return str(checkpoint.verify(epath.Path(path)))


def test_a_limit_under_one_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="save_total_limit"):
        Checkpoints(tmp_path, save_total_limit=0)


def test_the_state_may_be_donated_and_buffers_changed_while_the_save_runs(tmp_path):
    size = 1 << 20
    state = {"w": jnp.arange(size, dtype=jnp.float32)}
    buffer = np.arange(size, dtype=np.float32)
    advance = jax.jit(lambda state: {"w": state["w"] * 0 - 1}, donate_argnums=0)
    advance(jax.tree.map(jnp.copy, state))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"buffer": buffer}, {})
        for _ in range(3):
            state = advance(state)
        buffer[:] = -1
        jax.block_until_ready(state)
        got = checkpoints.restore(state)
    assert got is not None
    np.testing.assert_array_equal(got.state["w"], np.arange(size))
    np.testing.assert_array_equal(got.source["buffer"], np.arange(size))


def test_the_state_is_born_on_the_sharding_asked_for(tmp_path):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    state = make_state(3)
    fill(tmp_path, 3)
    for spec in (
        PartitionSpec(),
        PartitionSpec("fsdp"),
        PartitionSpec(None, "tensor"),
        PartitionSpec(("fsdp", "tensor")),
    ):

        def place(x, spec=spec):
            sharding = NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec())
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        got = Checkpoints(tmp_path).restore(jax.tree.map(place, state))
        assert got is not None
        same(got.state, state)
        assert got.state.params["embed"]["embedding"].sharding == NamedSharding(mesh, spec)
        assert got.state.key.sharding.is_fully_replicated


def test_a_sharded_state_is_saved_whole_and_restored_on_one_device(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    state = make_state(5)
    sharded = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp") if x.ndim == 2 else PartitionSpec())),
        state,
    )
    kept = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, PartitionSpec("fsdp")))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, sharded, {"average": kept}, {})
        got = checkpoints.restore(jax.eval_shape(lambda: state))
    assert got is not None
    same(got.state, state)
    assert got.source["average"].sharding == kept.sharding
    np.testing.assert_array_equal(got.source["average"], np.arange(16.0))


def test_parameters_alone_without_the_source(folder):
    like = {"params": jax.eval_shape(lambda: make_state(0).params)}
    got = Checkpoints(folder).restore(like, source=False)
    assert got is not None and got.source is None
    same(got.state, {"params": make_state(30).params})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {**p, "extra": jnp.zeros(2)}, "it has no params/extra"),
        (lambda p: {"embed": p["embed"]}, "it has params/norm/scale, which the run has not"),
        (
            lambda p: {**p, "norm": {"scale": jnp.zeros(15, jnp.bfloat16)}},
            r"params/norm/scale is bfloat16\[16\] there, bfloat16\[15\] here",
        ),
        (lambda p: {**p, "norm": {"scale": jnp.zeros(16)}}, r"is bfloat16\[16\] there, float32\[16\] here"),
    ],
)
def test_a_state_that_does_not_fit_is_named(folder, change, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(folder).restore({"params": change(make_state(0).params)})


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(OSError, match=r"cannot save checkpoint 1 in .*file/checkpoints"):
        checkpoints.save(1, make_state(1), {}, {})
        checkpoints.wait()
    checkpoints.close()
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a file system that nobody can write")
def test_a_read_only_file_system_is_named():
    checkpoints = Checkpoints("/proc/self/checkpoints")
    with pytest.raises(OSError, match="cannot save checkpoint 1 in /proc/self/checkpoints"):
        checkpoints.save(1, make_state(1), {}, {})
        checkpoints.wait()
    checkpoints.close()


@pytest.fixture
def file_limit():
    """Writes beyond 256 KiB in a file fail, as they would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails_in_the_background_is_reported_and_what_was_saved_stays(folder, file_limit):
    checkpoints = Checkpoints(folder, save_total_limit=1)
    large = {"w": jax.random.normal(jax.random.key(0), (1 << 18,))}
    checkpoints.save(40, large, {}, {})
    with pytest.raises(OSError, match=r"cannot save checkpoint 40 in .*Checkpoints saved before are untouched"):
        checkpoints.wait()
    restored_is(folder, 30, {})
    assert sorted(path.name for path in folder.iterdir()) == ["10", "20", "30"]
    # A later, smaller save goes through.
    checkpoints.save(50, make_state(50), make_source(50), {"loss": 50 / 3})
    checkpoints.close()
    restored_is(folder, 50, {})


def test_a_failed_save_is_reported_by_the_next_save_too(folder, file_limit):
    checkpoints = Checkpoints(folder)
    checkpoints.save(40, {"w": jax.random.normal(jax.random.key(0), (1 << 18,))}, {}, {})
    with pytest.raises(OSError, match="cannot save checkpoint 40"):
        checkpoints.save(50, make_state(50), {}, {})
    checkpoints.close()
