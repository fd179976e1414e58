"""Signals, counted compilations and batch shapes."""

import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.training import guards


def test_the_first_signal_asks_and_the_second_raises(monkeypatch):
    monkeypatch.setattr(guards, "TOGETHER", 0.0)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt, match="second SIGINT"), guards.stop_signals() as asked:
        assert not asked(1)
        signal.raise_signal(signal.SIGTERM)
        assert asked(1) and asked(2)
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_signals_that_come_together_are_one():
    with guards.stop_signals() as asked:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert asked(1)


def test_outside_the_main_thread_handlers_are_left_alone():
    before, answers = signal.getsignal(signal.SIGTERM), []

    def work():
        with guards.stop_signals() as asked:
            answers.append((asked(1), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [(False, before)]


def test_compilations_are_counted_for_this_thread_while_open():
    function = jax.jit(lambda x: jnp.sin(x) * 3 + x)
    with guards.count_compiles() as compiles:
        assert compiles() == 0
        function(np.ones(3, np.float32))
        assert compiles() == 1
        function(np.zeros(3, np.float32))
        assert compiles() == 1
        thread = threading.Thread(target=lambda: function(np.ones(5, np.float32)))
        thread.start()
        thread.join()
        assert compiles() == 1
        function(np.ones((2, 3), np.float32))
        assert compiles() == 2
    function(np.ones(7, np.float32))
    assert compiles() == 2


def test_batch_shapes_tell_structure_shape_and_dtype_apart():
    batches = [
        {"a": np.zeros(3)},
        {"a": np.zeros(3, np.int32)},
        {"a": np.zeros((3, 1))},
        {"b": np.zeros(3)},
        [np.zeros(3)],
    ]
    assert len({guards.batch_shape(batch) for batch in batches}) == len(batches)
    assert guards.batch_shape({"a": np.ones(3, np.float32)}) == guards.batch_shape({"a": jnp.zeros(3)})
