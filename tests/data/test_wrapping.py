"""Documents end to end in rows: every token of the stream is predicted once, from its own row."""

import numpy as np
import pytest

from jaxalign.data import from_list, wrap
from jaxalign.methods import sft

EOS = 2


def texts(sizes, *, prompts=()):
    """Documents of unlike tokens that end with EOS; those with a prompt do not train on it."""
    found, start = [], 100
    for number, size in enumerate(sizes):
        ids = np.append(np.arange(start, start + size - 1), EOS).astype(np.int32)
        mask = np.arange(size) >= dict(prompts).get(number, 1)
        found.append({"input_ids": ids, "loss_mask": mask})
        start += size
    return from_list(found)


def predicted(batch):
    """(source token, position, target) of every prediction, and which tokens of its row each source sees."""
    rows, asked = batch.rows, batch.predictions
    found = []
    for m, r, p in np.argwhere(asked.completions >= 0):
        source = asked.sources[m, r, p]
        found.append((int(rows.tokens[m, r, source]), int(rows.positions[m, r, source]), int(asked.targets[m, r, p])))
    return found


def test_no_token_is_lost_or_trained_twice():
    sizes, length = [5, 1 + 7, 2, 20, 3, 9], 8
    rows = wrap(texts(sizes), length)
    stream = np.concatenate([example["input_ids"] for example in texts(sizes)])
    batch = sft.make_batch(sft.Config(), list(rows), micro_batch_size=2, length=length)
    # Token t of the stream is predicted by token t - 1, which lies at position (t - 1) mod 8 of row (t - 1) // 8. The
    # rows are full: 47 tokens are 46 predictions in 5 rows of 8 and one of 6.
    wanted = [(int(stream[t - 1]), (t - 1) % length, int(stream[t])) for t in range(1, len(stream))]
    assert predicted(batch) == wanted
    assert [len(row["input_ids"]) for row in rows] == [9, 9, 9, 9, 9, 7]
    assert (np.asarray(batch.rows.documents) > 0).sum() == len(stream) - 1
    assert sum(sft.count_tokens(row) for row in rows) == len(stream)
    # One document per row, so that the documents of a row see each other.
    assert set(np.unique(batch.rows.documents)) == {0, 1} and not np.any(batch.rows.branches)
    assert rows.lengths["completion"].sum() == len(stream) - 1


def test_prompts_stay_untrained_and_rows_of_prompts_alone_are_left_out():
    # 4 tokens of which 2 are prompt, then 13 of which 12 are: with rows of 4, the targets are 2, 3 | none | none | 16.
    examples = texts([4, 13], prompts=[(0, 2), (1, 12)])
    rows = wrap(examples, 4)
    batch = sft.make_batch(sft.Config(), list(rows), length=4)
    stream = np.concatenate([example["input_ids"] for example in examples])
    assert {(source, target) for source, _, target in predicted(batch)} == {
        (int(stream[t - 1]), int(stream[t])) for t in (2, 3, 16)
    }
    assert len(rows) == 2 and [int(row["carried"][0]) for row in rows] == [0, 1]
    with pytest.raises(ValueError, match="no token of these documents"):
        nothing = {"input_ids": np.arange(5, dtype=np.int32), "loss_mask": np.zeros(5, bool)}
        wrap(from_list([nothing]), 4)


def test_the_order_follows_the_seed():
    sizes = [3] * 9
    first, again, other = (wrap(texts(sizes), 6, seed)[1]["input_ids"] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    everything = np.concatenate([row["input_ids"][int(row["carried"][0]) :] for row in wrap(texts(sizes), 6, 1)])
    plain = np.concatenate([row["input_ids"] for row in texts(sizes)])
    assert np.array_equal(np.sort(everything), np.sort(plain))
