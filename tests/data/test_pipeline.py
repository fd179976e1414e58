import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data import Batches, from_list


def examples(count):
    return from_list(
        [{"prompt_ids": [i] * (1 + i % 3), "chosen_ids": [1], "rejected_ids": [2, 3]} for i in range(count)]
    )


def batches(count, batch_size, **options):
    data = examples(count)

    def transform(indices):
        return [data[i]["prompt_ids"].copy() for i in indices]

    return Batches(data, batch_size, transform, **options)


def facts(batch):
    return (batch.indices.tolist(), batch.own.tolist(), batch.epoch, batch.tokens, [d.tolist() for d in batch.data])


@given(
    count=st.integers(1, 23),
    batch_size=st.integers(1, 9),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_every_epoch_has_every_example_once(count, batch_size, epochs, seed, shuffle):
    with batches(count, batch_size, epochs=epochs, seed=seed, shuffle=shuffle, prefetch=0) as source:
        given_out = list(source)
        assert len(given_out) == len(source) == epochs * source.batches_per_epoch
        per = source.batches_per_epoch
    for epoch in range(epochs):
        part = given_out[epoch * per : (epoch + 1) * per]
        order = np.concatenate([batch.indices for batch in part])
        assert sorted(order.tolist()) == list(range(count))
        assert shuffle or order.tolist() == list(range(count))
        assert [len(batch.indices) for batch in part[:-1]] == [batch_size] * (per - 1)
        assert part[-1].epoch == epoch + 1
        assert [b.epoch for b in part[:-1]] == [epoch + (i + 1) * batch_size / count for i in range(per - 1)]
    lengths = examples(count).lengths["total"]
    assert all(batch.tokens == lengths[batch.indices].sum() for batch in given_out)
    assert all([row[0] for row in batch.data] == batch.indices.tolist() for batch in given_out)


@given(count=st.integers(1, 23), batch_size=st.integers(1, 9), stop=st.integers(0, 60), prefetch=st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_restoring_a_position_continues_exactly(count, batch_size, stop, prefetch):
    with batches(count, batch_size, epochs=3, prefetch=prefetch) as source:
        whole = [facts(batch) for batch in source]
        stop = min(stop, len(source))
    with batches(count, batch_size, epochs=3, prefetch=prefetch) as first:
        for _ in range(stop):
            next(first)
        state = first.state()
        next(first, None)  # work done after the save is done again
    assert state == {"position": stop}
    with batches(count, batch_size, epochs=3, prefetch=prefetch) as second:
        next(second)
        second.restore(state)
        assert second.state() == state
        assert [facts(batch) for batch in second] == whole[stop:]
        second.restore({"position": np.int64(0)})  # as a checkpoint gives it back; also backwards, after the end
        assert [facts(batch) for batch in second] == whole


@given(count=st.integers(1, 23), batch_size=st.integers(1, 9), processes=st.integers(1, 5))
@settings(max_examples=12, deadline=None)
def test_the_slices_of_all_processes_are_the_global_order(count, batch_size, processes):
    sources = [
        batches(count, batch_size, epochs=2, process=p, processes=processes, prefetch=0) for p in range(processes)
    ]
    alone = batches(count, batch_size, epochs=2, prefetch=0)
    for together in zip(alone, *sources, strict=True):
        expected, *shares = together
        joined = np.full(len(expected.indices), -1)
        for process, share in enumerate(shares):
            assert share.indices.tolist() == expected.indices.tolist()
            joined[process::processes] = share.own
        assert joined.tolist() == expected.indices.tolist()


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, **options):
        with batches(50, 50, epochs=3, seed=seed, **options) as source:
            return [batch.indices.tolist() for batch in source]

    one = order(1)
    assert one == order(1, prefetch=0) == order(1, processes=4, process=2)
    every = [epoch for seed in (1, 2, 3) for epoch in order(seed)]  # also no epoch of one seed in the next
    assert len({tuple(epoch) for epoch in every}) == 9 and sorted(every[4]) == list(range(50))


def test_batches_without_end():
    with batches(5, 2, epochs=None) as source:
        epochs = [next(source).epoch for _ in range(30)]
        assert epochs[-1] == 10 and source.state() == {"position": 30}
        source.restore({"position": 3 * 10**6 + 1})
        assert next(source).epoch == 10**6 + 0.8


def test_prefetching_runs_ahead_in_the_background():
    made = []
    source = Batches(examples(40), 2, lambda i: made.append(threading.current_thread().name), epochs=1, prefetch=3)
    next(source)
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == 4 and all(name.startswith("grain-prefetch") for name in made)
    source.close()


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    source = batches(40, 2, prefetch=4)
    next(source)
    started = set(threading.enumerate()) - before
    assert started
    source.close()
    source.close()
    deadline = time.monotonic() + 10
    while any(thread.is_alive() for thread in started) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(ValueError, match="closed"):
        next(source)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_is_raised_and_skips_nothing(prefetch):
    failing = [True]

    def transform(indices):
        if failing[0] and 3 in indices:
            raise RuntimeError("no such example")
        return indices.tolist()

    with Batches(examples(12), 2, transform, shuffle=False, prefetch=prefetch) as source:
        assert next(source).data == [0, 1]
        with pytest.raises(RuntimeError, match="no such example"):
            next(source)
        assert source.state() == {"position": 1}
        failing[0] = False
        assert [batch.data[0] for batch in source] == [2, 4, 6, 8, 10]


def test_a_transform_may_give_nothing():
    with Batches(examples(6), 2, lambda indices: None, shuffle=False) as source:
        assert [batch.data for batch in source] == [None] * 3


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0}, {"batch_size": 2, "epochs": 0}, {"batch_size": 2, "prefetch": -1},
        {"batch_size": 2, "process": 2, "processes": 2},
    ],
)  # fmt: skip
def test_impossible_settings(options):
    with pytest.raises(ValueError, match=r"must be positive|is not one of"):
        batches(4, **options)


def test_impossible_positions_and_no_examples():
    with batches(4, 2) as source, pytest.raises(ValueError, match="position 3 of the data does not exist"):
        source.restore({"position": 3})
    with pytest.raises(ValueError, match="no examples"):
        Batches(examples(4).select(np.zeros(0, np.int64)), 2, lambda i: i)
