"""Mixtures: exact shares, an order that no number of processes changes, resumed at every batch."""

import math
from fractions import Fraction

import numpy as np
import pytest

from jaxalign.data import Batches, DataConfig, MixtureOrder, MixturePart, load
from jaxalign.data.mixture import epoch_counts, shares

SIZES = (30, 10, 5)
PART_OF = np.repeat([0, 1, 2], SIZES)


def epochs(order, count):
    places = range(len(order) * count)
    return np.asarray([order[place] for place in places]).reshape(count, len(order))


def test_counts_of_an_epoch():
    """Weights 0.5, 0.25, 0.25 of 30, 10 and 5: n/p is 60, 40 and 20.

    `first`: 20 examples, 10 + 5 + 5. `all`: 60 examples, 30 + 15 + 15: the second part 1.5 times, the third thrice.
    """
    weights = shares(SIZES, [0.5, 0.25, 0.25], 1.0)
    assert epoch_counts(SIZES, weights, "first") == [10, 5, 5]
    assert epoch_counts(SIZES, weights, "all") == [30, 15, 15]
    # 0.7, 0.2, 0.1: n/p is 42.86, 50, 50. `first`: 42 = 29.4 + 8.4 + 4.2, and the one that rounding down leaves goes to
    # the largest remainder, the first of equal ones. `all`: 50 = 35 + 10 + 5.
    weights = shares(SIZES, [0.7, 0.2, 0.1], 1.0)
    assert epoch_counts(SIZES, weights, "first") == [30, 8, 4]
    assert epoch_counts(SIZES, weights, "all") == [35, 10, 5]
    assert shares(SIZES, [7, 2, 1], 1.0) == weights
    # 0.1 and 0.9 of 100 examples and of none: the epoch ends before it began.
    with pytest.raises(ValueError, match="an epoch of parts of 100, 0 examples is empty"):
        epoch_counts((100, 0), shares((100, 0), [0.1, 0.9], 1.0), "first")


def test_temperature():
    """T = 2 of 400 and 100: roots 20 and 10, so 2/3 and 1/3. T = 1: every example once."""
    assert [float(p) for p in shares((400, 100), None, 2.0)] == pytest.approx([2 / 3, 1 / 3])
    # n/p is 600 and 300: an epoch of `all` has 600, of `first` 300.
    roots = [Fraction(2, 3), Fraction(1, 3)]
    assert epoch_counts((400, 100), roots, "all") == [400, 200]
    assert epoch_counts((400, 100), roots, "first") == [200, 100]
    order = MixtureOrder(PART_OF, None, seed=1)
    assert order.counts == list(SIZES)
    assert all(sorted(epoch) == list(range(45)) for epoch in epochs(order, 3).tolist())


def test_a_part_is_used_up_before_it_is_repeated():
    order = MixtureOrder(PART_OF, [0.5, 0.25, 0.25], epoch="first", seed=3)
    drawn = epochs(order, 6)
    assert all((np.bincount(PART_OF[epoch], minlength=3) == [10, 5, 5]).all() for epoch in drawn)
    first = drawn.reshape(-1)[PART_OF[drawn.reshape(-1)] == 0]
    assert sorted(first[:30]) == sorted(first[30:]) == list(range(30))  # three epochs to a pass
    assert first[:30].tolist() != first[30:].tolist()
    second = drawn[:2].reshape(-1)
    assert sorted(second[PART_OF[second] == 1]) == list(range(30, 40))


def test_parts_are_mixed_evenly_through_an_epoch():
    """2,000 places, half of them of part 1: its number in any 100 has mean 50 and deviation 5; all lie within six."""
    part_of = np.repeat([0, 1], [1000, 1000])
    drawn = part_of[epochs(MixtureOrder(part_of, None, seed=7), 1)[0]]
    halves = drawn.reshape(20, 100).sum(1)
    assert drawn.sum() == 1000 and halves.std() > 1 and abs(halves - 50).max() < 30
    turns = part_of[epochs(MixtureOrder(part_of, None, shuffle=False), 1)[0]]
    assert turns.tolist() == [0, 1] * 1000
    # Six take their turns at 1/12, 3/12, ..., 11/12 of the epoch, two at 3/12 and 9/12; the first goes before.
    ordered = MixtureOrder(np.repeat([0, 1], [6, 2]), None, shuffle=False)
    assert epochs(ordered, 2).tolist() == [[0, 1, 6, 2, 3, 4, 7, 5]] * 2


def test_orders_depend_on_the_seed_and_the_epoch():
    one, two = (epochs(MixtureOrder(PART_OF, [1, 1, 1], seed=seed), 3) for seed in (1, 2))
    again = epochs(MixtureOrder(PART_OF, [1, 1, 1], seed=1), 3)
    assert (one == again).all() and len({tuple(epoch) for epoch in [*one.tolist(), *two.tolist()]}) == 6


@pytest.fixture
def parts(write):
    """Three files of 30, 10 and 5 texts."""
    names = ("sky", "sea", "sun")
    return [
        write(f"{name}.jsonl", *[{"text": f"The {name} is blue {'and deep ' * (i % 5)}{i}"} for i in range(size)])
        for name, size in zip(names, SIZES, strict=True)
    ]


def mixed(paths, **options):
    weights = options.pop("weights", (0.5, 0.25, 0.25))
    parts = tuple(MixturePart(path, weight=weight) for path, weight in zip(paths, weights, strict=True))
    return DataConfig(mixture=parts, **options)


def open_batches(data, **options):
    return Batches(
        data.train,
        8,
        lambda indices: [data.train[int(i)]["input_ids"].tobytes() for i in indices],
        order=data.order,
        epochs=2,
        **options,
    )


def test_every_position_is_resumed_exactly(chatml, parts):
    data = load(mixed(parts, mixture_epoch="first"), chatml, "sft")
    assert data.order is not None and data.epoch_size == len(data.order) == 20

    def facts(batch):
        return batch.indices.tolist(), batch.data, batch.epoch, batch.tokens

    with open_batches(data) as source:
        whole = [facts(batch) for batch in source]
    assert [len(indices) for indices, *_ in whole] == [8, 8, 4] * 2
    assert [epoch for _, _, epoch, _ in whole] == [0.4, 0.8, 1, 1.4, 1.8, 2]
    with open_batches(data) as source:
        for stop in range(len(whole) + 1):
            source.restore({"position": stop})
            assert [facts(batch) for batch in source] == whole[stop:]


def test_processes_share_one_order(chatml, parts):
    data = load(mixed(parts), chatml, "sft")
    alone = [batch.indices for batch in open_batches(data, prefetch=0)]
    shares = [open_batches(data, process=p, processes=3, prefetch=0) for p in range(3)]
    for indices, *own in zip(alone, *shares, strict=True):
        joined = np.full(len(indices), -1)
        for process, batch in enumerate(own):
            joined[process::3] = batch.own
        assert joined.tolist() == indices.tolist()


def test_counts_and_places_of_parts(chatml, write, parts):
    bad = write("bad.jsonl", {"text": "The rain"}, {"text": ""}, "{", {"text": "More rain"})
    config = mixed([*parts[:2], bad], on_bad="drop")
    data = load(config, chatml, "sft")
    found = data.report.parts
    # 30 and 10 and 2 by 0.5, 0.25, 0.25: n/p is 60, 40 and 8, so an epoch has 60, 30 + 15 + 15.
    assert {title: (share.rows, share.used, share.per_epoch) for title, share in found.items()} == {
        parts[0]: (30, 30, 30),
        parts[1]: (10, 10, 15),
        bad: (4, 2, 15),
    }
    assert f"part {bad}: 2 of 4 examples, 25.0% of training, 15 per epoch" in data.report.lines()
    assert data.train.where(41) == (bad, 4) and data.train.row(41) == {"text": "More rain"}
    assert data.train.where(30) == (parts[1], 1) and data.train.part_of[[0, 29, 30, 40]].tolist() == [0, 0, 1, 2]
    assert data.train.rows is not None and set(data.train.rows.hashes) == {*parts[:2], bad}
    with pytest.raises(
        ValueError, match=rf"2 of 44 examples cannot be used.*\n  {bad}:2: empty text.*\n  {bad}:3: wrong JSON"
    ):
        load(mixed([*parts[:2], bad]), chatml, "sft")


def test_parts_have_their_own_columns_and_formats(chatml, write):
    maths = write("maths.jsonl", *[{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(4)])
    alpaca = write("alpaca.jsonl", {"instruction": "Translate.", "input": "mer", "output": "sea"})
    talk = "\n\nHuman: Hi\n\nAssistant:"
    dialogues = write("hh.jsonl", {"chosen": f"{talk} Yes.", "rejected": f"{talk} No."})
    config = DataConfig(
        mixture=(
            MixturePart(
                maths, format="chat", columns={"prompt": "question", "completion": "answer"}, split="train[:3]"
            ),
            MixturePart(alpaca, label="translations"),
            MixturePart(dialogues, format="hh"),
        )
    )
    data = load(config, chatml, "sft")
    texts = [chatml.decode(example["input_ids"][example["loss_mask"]]) for example in data.train]
    assert texts == ["#### 1<|im_end|>", "#### 2<|im_end|>", "#### 3<|im_end|>", "sea<|im_end|>", "Yes.<|im_end|>"]
    assert list(data.report.parts) == [maths, "translations", dialogues]


def test_an_empty_part_is_named(chatml, write, parts):
    empty, bad = write("empty.jsonl"), write("bad.jsonl", {"text": ""})
    with pytest.raises(ValueError, match=r"data\.mixture\[2\] \(.*empty\.jsonl\): .*no rows"):
        load(mixed([*parts[:2], empty]), chatml, "sft")
    with pytest.raises(FileNotFoundError, match=r"data\.mixture\[1\] \(none\.jsonl\)"):
        load(mixed([parts[0], "none.jsonl", parts[1]]), chatml, "sft")
    with pytest.raises(ValueError, match=r"data\.mixture\[2\] \(.*bad\.jsonl\): none of its examples can be used"):
        load(mixed([*parts[:2], bad], on_bad="drop"), chatml, "sft")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "path, or mixture"),
        ({"path": "a", "mixture": (MixturePart("b"),)}, "set one of the two"),
        ({"mixture": (MixturePart("a", weight=1), MixturePart("b"))}, "b has no weight, others have"),
        ({"mixture": (MixturePart("a"), MixturePart("a"))}, "2 parts are called 'a'; give each a label"),
        ({"mixture": (MixturePart("a", weight=1),), "mixture_temperature": 2.0}, "makes shares of sizes"),
        ({"mixture": (MixturePart("a"),), "mixture_temperature": 0.0}, "must be positive"),
        ({"mixture": (MixturePart("a"),), "mixture_epoch": "some"}, "one of 'first', 'all'"),
        ({"mixture": (MixturePart("a"),), "eval_split": "test"}, "name the data set as eval_path"),
        ({"path": "a", "mixture_temperature": 2.0}, "needs a mixture"),
    ],
)
def test_mixtures_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)
    with pytest.raises(ValueError, match=r"weight=0\.0 must be positive"):
        MixturePart("a", weight=0.0)


def test_the_scarcest_part_ends_an_epoch():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(1, 60, 3).tolist()
        weights = shares(sizes, rng.integers(1, 9, 3).tolist(), 1.0)
        every = epoch_counts(sizes, weights, "all")
        assert all(count >= size for count, size in zip(every, sizes, strict=True))
        length = min(Fraction(n) / p for n, p in zip(sizes, weights, strict=True))
        if length >= 1:
            first = epoch_counts(sizes, weights, "first")
            assert all(count <= size for count, size in zip(first, sizes, strict=True))
            assert sum(first) == math.floor(length)
