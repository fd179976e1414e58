"""Rows and predictions against a direct reading of the documents they were made from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.methods.row_length import choose_length, choose_rollout_length
from jaxalign.packing import Document, build, efficiency, pack, pieces_of, plan
from jaxalign.placing import Piece, bucket, first_fit, place, share_out
from tests.layouts import tiny_config


def document(trunk, *branches):
    ids = iter(range(1, 10_000))
    return Document(
        np.array([next(ids) for _ in range(trunk)], np.int32),
        tuple(np.array([next(ids) for _ in range(n)], np.int32) for n in branches),
    )


def test_a_pair_by_hand():
    pair = Document(
        np.array([5, 6, 7]),
        (np.array([8, 9]), np.array([3, 2, 1])),
        fields={"ref_logps": (np.array([-1.0, -2]), np.array([-3.0, -4, -5]))},
    )
    batch = pack([pair], completions=2, length=8)
    np.testing.assert_array_equal(batch.rows.tokens[0, 0], [5, 6, 7, 8, 3, 2, 0, 0])  # 9 and 1 are only targets
    np.testing.assert_array_equal(batch.rows.positions[0, 0], [0, 1, 2, 3, 3, 4, 0, 0])
    np.testing.assert_array_equal(batch.rows.documents[0, 0], [1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(batch.rows.branches[0, 0], [0, 0, 0, 1, 2, 2, 0, 0])
    np.testing.assert_array_equal(batch.predictions.sources[0, 0, :5], [2, 3, 2, 4, 5])
    np.testing.assert_array_equal(batch.predictions.targets[0, 0, :5], [8, 9, 3, 2, 1])
    np.testing.assert_array_equal(batch.predictions.completions[0, 0, :6], [0, 0, 1, 1, 1, -1])
    np.testing.assert_array_equal(batch.predictions.steps[0, 0, :5], [0, 1, 0, 1, 2])
    np.testing.assert_array_equal(batch.fields["ref_logps"][0, 0, :6], [-1, -2, -3, -4, -5, 0])
    np.testing.assert_array_equal(batch.present, [[1, 1]])


def test_a_pair_whose_prompt_is_predicted_by_hand():
    pair = Document(
        np.array([5, 6, 7]),
        (np.array([8, 9]), np.array([3])),
        np.array([False, True, True]),
        {"ref_logps": (np.array([-1.0, -2]), np.array([-3.0]))},
    )
    batch = pack([document(2, 1, 1), pair], completions=2, length=12, micro_batch_size=3)
    asked = batch.predictions
    # Numbers 0 to 5 are the completions of three places; the second document's prompt is 6 + 1.
    row = asked.completions[0, 0]
    np.testing.assert_array_equal(row[row >= 0], [2, 2, 3, 7, 7, 0, 1])  # the longer document comes first
    np.testing.assert_array_equal(asked.sources[0, 0, :5], [2, 3, 2, 0, 1])
    np.testing.assert_array_equal(asked.targets[0, 0, :5], [8, 9, 3, 6, 7])
    np.testing.assert_array_equal(asked.steps[0, 0, :5], [0, 1, 0, 0, 1])
    np.testing.assert_array_equal(batch.fields["ref_logps"][0, 0, :5], [-1, -2, -3, 0, 0])
    np.testing.assert_array_equal(batch.present, [[1, 1, 1, 1, 0, 0]])
    apart = pack([pair], completions=2, length=4, share_prompt=False)
    found = [apart.predictions.completions[0, r] for r in range(2)]
    assert sorted(each[each >= 0].tolist() for each in found) == [[0, 0, 2, 2], [1]]  # with the chosen completion only
    assert [piece.predictions for piece in pieces_of(pair, False)] == [4, 1]


def test_completions_that_are_read_by_hand():
    ranked = Document(
        np.array([5, 6]),
        (np.array([8, 9]), np.array([3]), np.array([4, 2, 1])),
        fields={"ranks": (np.array([1.0]), np.array([0.0]), np.array([2.0]))},
        read_last=True,
    )
    batch = pack([ranked, document(1, 1)], completions=4, length=12, micro_batch_size=1)
    np.testing.assert_array_equal(batch.rows.tokens[0, 0], [5, 6, 8, 9, 3, 4, 2, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.rows.positions[0, 0, :8], [0, 1, 2, 3, 2, 2, 3, 4])
    np.testing.assert_array_equal(batch.rows.branches[0, 0, :8], [0, 0, 1, 1, 2, 3, 3, 3])
    np.testing.assert_array_equal(batch.predictions.sources[0, 0, :3], [3, 4, 7])
    np.testing.assert_array_equal(batch.predictions.completions[0, 0, :4], [0, 1, 2, -1])
    np.testing.assert_array_equal(batch.fields["ranks"][0, 0, :3], [1, 0, 2])
    np.testing.assert_array_equal(batch.present, [[1, 1, 1, 0], [1, 0, 0, 0]])
    apart = pack([ranked], completions=4, length=5, share_prompt=False)
    np.testing.assert_array_equal(apart.present, [[1, 1, 1, 0]])
    rows, asked = apart.rows, apart.predictions
    read = {
        int(asked.completions[0, r, i]): rows.tokens[0, r, : asked.sources[0, r, i] + 1].tolist()
        for r, i in zip(*np.nonzero(asked.completions[0] >= 0), strict=True)
    }
    assert read == {0: [5, 6, 8, 9], 1: [5, 6, 3], 2: [5, 6, 4, 2, 1]}


def test_a_plain_document_by_hand():
    chat = Document(np.array([4, 5, 6, 7, 8, 9]), targets=np.array([False, False, True, True, False, False]))
    batch = pack([chat], completions=1, length=4)
    np.testing.assert_array_equal(batch.rows.tokens[0, 0], [4, 5, 6, 0])  # nothing after the last target's source
    np.testing.assert_array_equal(batch.predictions.sources[0, 0, :3], [1, 2, 0])
    np.testing.assert_array_equal(batch.predictions.targets[0, 0, :2], [6, 7])
    np.testing.assert_array_equal(batch.predictions.completions[0, 0, :3], [0, 0, -1])


lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 5), st.booleans(), st.integers(1, 3), st.integers(98, 300))
def test_every_target_follows_its_own_history(sizes, micro_batch_size, share, shards, length):
    documents = [document(*size) for size in sizes]
    batch = pack(
        documents, completions=2, micro_batch_size=micro_batch_size, length=length, share_prompt=share, shards=shards
    )
    assert batch.rows.tokens.shape[1] % shards == 0
    seen = set()
    rows, asked = batch.rows, batch.predictions
    for micro, row, slot in zip(*np.nonzero(asked.completions >= 0), strict=True):
        number = asked.completions[micro, row, slot]
        example, branch = divmod(int(number), 2)
        wanted = documents[micro * micro_batch_size + example]
        step, source = asked.steps[micro, row, slot], asked.sources[micro, row, slot]
        assert asked.targets[micro, row, slot] == wanted.branches[branch][step]
        own = rows.documents[micro, row] == rows.documents[micro, row, source]
        visible = own & np.isin(rows.branches[micro, row], [0, int(rows.branches[micro, row, source])])
        if step == 0:
            visible &= rows.branches[micro, row] == 0
        visible &= rows.positions[micro, row] <= rows.positions[micro, row, source]
        history = rows.tokens[micro, row][visible][np.argsort(rows.positions[micro, row][visible])]
        np.testing.assert_array_equal(history, np.concatenate([wanted.trunk, wanted.branches[branch][:step]]))
        seen.add((micro, int(number), int(step)))
    assert len(seen) == sum(chosen + rejected for _, chosen, rejected in sizes)
    assert batch.present.sum() == 2 * len(documents)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=40), st.integers(100, 250))
def test_first_fit_places_each_piece_once_and_overfills_nothing(sizes, length):
    rows = first_fit(sizes, length)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= length for row in rows)
    # At most one row of a first-fit packing is half empty.
    assert sum(sum(sizes[i] for i in row) * 2 <= length for row in rows) <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 100)), max_size=40), st.integers(100, 250))
def test_placing_evens_predictions_out_and_takes_no_row_more(pieces, length):
    pieces = [Piece(size, min(size, asked)) for size, asked in pieces]
    sizes = [piece.size for piece in pieces]
    rows, packed = place(pieces, length), first_fit(sizes, length)
    assert sorted(i for row in rows for i in row) == list(range(len(pieces)))
    assert all(sum(sizes[i] for i in row) <= length for row in rows)
    assert len(rows) == len(packed)


def test_a_row_need_not_hold_all_predictions():
    # Longest first, first fit: [0, 1], [2, 3]; one row would be asked for 60 predictions, the other for 4.
    pieces = [Piece(50, 30), Piece(50, 30), Piece(50, 2), Piece(50, 2)]
    assert [sum(pieces[i].predictions for i in row) for row in first_fit_of(pieces, 100)] == [60, 4]
    assert [sum(pieces[i].predictions for i in row) for row in place(pieces, 100)] == [32, 32]
    # Evened out, both of 40 would lie beside each other and the last of 30 would find no row: the first fit stands.
    tight = [Piece(60, 5), Piece(40, 1), Piece(40, 1), Piece(30, 1), Piece(30, 1)]
    assert place(tight, 100) == first_fit_of(tight, 100) == [[0, 1], [2, 3, 4]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=24), st.integers(1, 6))
def test_sharing_out_gives_each_document_a_place_of_its_own(sizes, micro_batch_size):
    micro_batches = -(-24 // micro_batch_size)
    places = share_out([[Piece(size, 1)] for size in sizes], micro_batches, micro_batch_size)
    assert len(set(places)) == len(sizes) and all(0 <= each < micro_batches * micro_batch_size for each in places)


def test_sharing_out_evens_tokens_and_then_predictions_out():
    # As they stand the first micro-batch would have 360 tokens and the second 40.
    pieces = [[Piece(90, 1)]] * 4 + [[Piece(10, 1)]] * 4
    tokens = [0, 0]
    for document, at in zip(pieces, share_out(pieces, 2, 4), strict=True):
        tokens[at // 4] += document[0].size
    assert tokens == [200, 200]
    pieces = [[Piece(50, 40 if i % 2 == 0 else 2)] for i in range(8)]
    asked = [0, 0]
    for document, at in zip(pieces, share_out(pieces, 2, 4), strict=True):
        asked[at // 4] += document[0].predictions
    assert asked == [84, 84]


def first_fit_of(pieces, length):
    return first_fit([piece.size for piece in pieces], length)


@given(st.integers(1, 5000), st.integers(1, 16))
def test_buckets_are_few_and_waste_little(n, multiple):
    size = bucket(n, multiple)
    assert size >= n and size % multiple == 0
    units = -(-n // multiple)
    assert size // multiple <= units * 1.125 + 1e-9
    assert bucket(size, multiple) == size


def test_number_of_buckets():
    assert len({bucket(n) for n in range(1, 1025)}) <= 8 + 8 * 7


def test_processes_split_documents_and_agree_on_the_shape():
    documents = [document(10 + i, 5 + i, 20 - i) for i in range(12)]
    planned = plan(
        [pieces_of(each, True) for each in documents],
        micro_batches=2,
        micro_batch_size=6,
        length=64,
        shards=2,
        processes=3,
    )
    parts = [
        build(planned, {i: documents[i] for i in range(p, 12, 3)}, micro_batch_size=6, completions=2, process=p)
        for p in range(3)
    ]
    assert {part.rows.tokens.shape for part in parts} == {(2, planned.rows, 64)}
    for part in parts:
        np.testing.assert_array_equal(part.present, np.ones((2, 12)))
    owners = [sorted({int(c) // 2 for c in np.unique(part.predictions.completions) if c >= 0}) for part in parts]
    assert owners == [[0, 3], [1, 4], [2, 5]]
    assert sum((part.predictions.completions >= 0).sum() for part in parts) == sum(
        len(b) for d in documents for b in d.branches
    )


def test_an_absent_example_is_not_present():
    batch = pack([document(3, 2, 2)] * 3, completions=2, micro_batch_size=2, micro_batches=3)
    np.testing.assert_array_equal(batch.present, [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


def test_row_length_that_packs_best():
    # Two of these fill 256 tokens and leave 60 % of 320 unused; three would need 384.
    pieces = [[Piece(126, 10)] for _ in range(64)]
    assert choose_length([pieces], 8, attention_weight=1e-9) in (128, 256, 384, 512)
    assert choose_length([pieces], 8, attention_weight=1.0) == 128  # where attention is dear, short rows win


def test_row_length_that_wastes_few_predictions():
    # Rows of 128 hold one piece each, so seven of eight have room for 90 predictions that nobody asks for; a row of 512
    # holds four.
    pieces = [[Piece(126, 96 if i % 8 == 0 else 4)] for i in range(64)]
    assert choose_length([pieces], 8, attention_weight=1e-4) == 128
    assert choose_length([pieces], 8, attention_weight=1e-4, prediction_weight=1.0) == 512


def test_row_length_for_rollouts():
    known = {"batch_size": 32, "micro_batch_size": 8, "multiple": 32, "model": tiny_config(embed_dim=512, mlp_dim=2048)}
    # A prompt of 300 tokens among short ones: a row as long as its document holds three of the others, 119 to 125
    # tokens each, and leaves 50 free; one of 512 holds four.
    short = [20 + i % 7 for i in range(64)]
    ragged = {"steps": 100, "completions": 1, "share_prompt": True, "least": 416}
    assert choose_rollout_length([300, *short], **known, **ragged) == 512
    # Of 32 documents of a micro-batch, each with a prompt of its own, rows of 640 leave fewer over.
    apart = ragged | {"completions": 4, "share_prompt": False}
    assert choose_rollout_length([300, *short], **known, **apart) == 640
    # Groups that are as long as each other take a row each, however many there are.
    equal = {"steps": 100, "completions": 8, "share_prompt": True, "least": 832}
    assert choose_rollout_length([30] * 64, **known, **equal) == 832


def test_efficiency_counts_padding():
    assert efficiency(pack([document(30, 1, 1)], completions=2, length=64)) == pytest.approx(30 / 64)


def test_errors_name_the_example():
    with pytest.raises(ValueError, match="example 1 of the batch needs 70 tokens, but a row has 64"):
        pack([document(5, 2, 2), document(60, 6, 6)], completions=2, length=64)
    with pytest.raises(ValueError, match="3 examples do not fit 1 micro-batches of 2"):
        pack([document(5, 2, 2)] * 3, completions=2, micro_batch_size=2, micro_batches=1)
    with pytest.raises(ValueError, match="first token"):
        pack([Document(np.arange(3), targets=np.array([True, False, True]))], completions=1)
    with pytest.raises(ValueError, match="needs `targets`"):
        pack([Document(np.arange(3))], completions=1)
