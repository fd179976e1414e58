"""Documents end to end, cut into rows: examples of continued pre-training from encoded texts."""

from __future__ import annotations

import numpy as np

from jaxalign.data.examples import Examples, Ragged


def wrap(examples: Examples, row_length: int, seed: int | None = None) -> Examples:
    """One stream of all documents, each with the EOS that it was encoded with, as rows of exactly `row_length` tokens.

    A row is one document for the model: positions begin at 0 in every row, and a token sees what precedes it in its
    row, the documents before its own among it. Row r reads tokens `r * row_length` and on of the stream and predicts
    the token after each, so that every token is predicted once, save for the stream's very first, which nothing
    precedes. (TRL's `wrapped` leaves out the first token of every row.) What a document does not train on is not a
    target here either; its first token, which has something before it now, is one where its second token is.

    Args:
      examples: of the kind `sft`.
      row_length: tokens of a row; the last row may have fewer.
      seed: of the documents' order; None keeps theirs.

    Returns:
      An example per row: `input_ids` and `loss_mask` of `row_length + 1` tokens, the first of which is the last of the
      row before, and int32 `carried` `[1]`, the number of such tokens: 1, in the first row 0. `rows` stay the files
      that the texts are from.

    Raises:
      ValueError: no token is a target.
    """
    order = np.arange(len(examples)) if seed is None else np.random.default_rng(seed).permutation(len(examples))
    tokens, masks = [], []
    for i in order:
        example = examples[int(i)]
        mask = np.array(example["loss_mask"], bool)
        mask[:1] = mask[1:2]
        tokens.append(example["input_ids"])
        masks.append(mask)
    stream, mask = np.concatenate(tokens), np.concatenate(masks)
    mask[0] = False
    starts = np.arange(0, max(len(stream) - 1, 1), row_length)
    ends = np.minimum(starts + row_length + 1, len(stream))
    targets = np.asarray([mask[start + 1 : end].sum() for start, end in zip(starts, ends, strict=True)], np.int64)
    rows = np.flatnonzero(targets)  # a row without targets, of prompts alone, would teach nothing
    if not len(rows):
        raise ValueError("packing_strategy=wrapped: no token of these documents would be trained on")
    slices = [slice(starts[row], ends[row]) for row in rows]
    offsets = np.cumsum([0, *(ends[rows] - starts[rows])])
    arrays = {
        "input_ids": _ragged(np.concatenate([stream[each] for each in slices]).astype(np.int32), offsets),
        "loss_mask": _ragged(np.concatenate([mask[each] for each in slices]).astype(np.uint8), offsets),
        "carried": _ragged((starts[rows] > 0).astype(np.int32), np.arange(len(rows) + 1)),
    }
    zeros = np.zeros(len(rows), np.int64)
    columns = {"targets": targets[rows], "cut": zeros, "key": zeros, "bad": zeros.astype(bool)}
    return Examples(arrays, columns, {}, np.arange(len(rows)), examples.rows)


def _ragged(values: np.ndarray, offsets: np.ndarray) -> Ragged:
    return Ragged(((values, offsets),), np.zeros(1, np.int64))
