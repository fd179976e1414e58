"""The cache of reference log-probs: kept in parts, shared, continued after a kill, and never believed blindly."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.data.examples import Examples, Ragged
from jaxalign.methods import preference
from jaxalign.methods.offline import Layout
from jaxalign.methods.reference import cache_key, precompute
from jaxalign.sharding import MeshConfig, make_mesh
from tests.layouts import ragged_pairs

CONFIG, MESH, SIZE = preference.Config(), make_mesh(MeshConfig()), 4
PAIRS = ragged_pairs(11, seed=2)  # parts of 4, 4 and 3 pairs; batches of 3 across their ends


def ragged(arrays):
    return Ragged(((np.concatenate(arrays), np.cumsum([0, *(len(each) for each in arrays)])),), np.zeros(1, np.int64))


def encoded(pairs):
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Examples({name: ragged([pair[name] for pair in pairs]) for name in names}, {}, {}, np.arange(len(pairs)))


class Reference:
    """Log-probs that tell where each token is; stops like a killed process after some batches."""

    def __init__(self, batches=1000):
        self.batches, self.calls = batches, 0

    def __call__(self, batch):
        if self.calls == self.batches:
            raise KeyboardInterrupt
        self.calls += 1
        asked = batch.predictions
        logps = -asked.targets - asked.steps / 100
        return batch.__class__(batch.rows, asked, batch.present, {"ref_logps": jnp.asarray(logps, jnp.float32)})


def run(folder, reference, pairs=PAIRS, fingerprint="model"):
    examples, layout = encoded(pairs), Layout(3, 3, 128, shards=8)
    key = cache_key(examples, fingerprint)
    found = precompute(preference, CONFIG, examples, layout, MESH, reference, folder, key, size=SIZE)
    return found, folder / key


def check(found, pairs=PAIRS):
    assert len(found) == len(pairs)
    for i, pair in enumerate(pairs):
        for side in ("chosen", "rejected"):
            wanted = -pair[f"{side}_ids"] - np.arange(len(pair[f"{side}_ids"])) / 100
            np.testing.assert_allclose(found[i][f"ref_{side}_logps"], wanted, rtol=1e-6)


def test_computed_once_and_shared(tmp_path):
    first, second = Reference(), Reference()
    check(run(tmp_path, first)[0])
    found, folder = run(tmp_path, second)
    check(found)
    assert (first.calls, second.calls) == (4, 0)
    assert sorted(path.name for path in folder.iterdir()) == ["000000.logps", "000001.logps", "000002.logps"]
    assert run(tmp_path, Reference(), fingerprint="another")[1] != folder


def test_a_killed_run_goes_on_with_the_next_part(tmp_path):
    """Two batches are 6 pairs, so one part is done; the other 7 pairs take three batches more."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Reference(batches=2))
    again = Reference()
    check(run(tmp_path, again)[0])
    assert again.calls == 3


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": flip,
    "a lost end": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "an empty file": lambda path: path.write_bytes(b""),
    "no header": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_part_is_reported_and_computed_anew(kind, tmp_path, caplog):
    victim = run(tmp_path, Reference())[1] / "000001.logps"
    DAMAGE[kind](victim)
    again = Reference()
    with caplog.at_level(logging.WARNING, logger="jaxalign"):
        check(run(tmp_path, again)[0])
    assert again.calls == 2  # four pairs in batches of three
    assert str(victim) in caplog.text and "computed anew" in caplog.text
    sound = Reference()
    run(tmp_path, sound)
    assert sound.calls == 0


def test_a_part_of_other_rows_is_not_believed(tmp_path, caplog):
    """Same lengths, other tokens: only the key in the file tells."""
    other = [{name: ids + 1 for name, ids in pair.items()} for pair in PAIRS]
    foreign = run(tmp_path, Reference(), other)[1]
    folder = run(tmp_path, Reference())[1]
    (folder / "000002.logps").write_bytes((foreign / "000002.logps").read_bytes())
    with caplog.at_level(logging.WARNING, logger="jaxalign"):
        check(run(tmp_path, Reference())[0])
    assert "other rows or another reference" in caplog.text
