"""TR-DPO's reference: when it follows, what it becomes, and that a resumed one is the same."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.methods.moving_reference import FollowingSource, MovingReference
from jaxalign.training.state import TrainState
from jaxalign.training.storable import pack, unpack


def variables(value):
    return {"params": {"w": jnp.full((2,), value, jnp.float32)}}


def made() -> Any:
    fill: Any = lambda held, batch: (batch, float(held["params"]["w"][0]))  # noqa: E731
    return MovingReference(fill, variables(1.0), alpha=0.25, every=3)


def test_it_follows_when_due_and_once():
    moving = made()
    moving.follow(0, variables(9.0))
    moving.follow(2, variables(9.0))
    assert moving("batch") == ("batch", 1.0)
    moving.follow(3, variables(9.0))  # 0.75 * 1 + 0.25 * 9
    assert moving("batch") == ("batch", 3.0)
    moving.follow(3, variables(9.0))  # as when an evaluation came before the next batch
    moving.follow(5, variables(7.0))
    assert moving("batch") == ("batch", 3.0)
    moving.follow(6, variables(-1.0))
    assert moving("batch") == ("batch", 2.0)


def test_what_it_was_given_stays():
    start, policy = variables(1.0), variables(9.0)
    fill: Any = lambda held, batch: held  # noqa: E731
    moving = MovingReference(fill, start, alpha=1.0, every=1)
    moving.follow(1, policy)
    moving.follow(2, variables(4.0))
    assert float(start["params"]["w"][0]) == 1 and float(policy["params"]["w"][0]) == 9


def test_a_part_of_the_policy_is_no_policy():
    with pytest.raises(ValueError, match=r"method\.sync_ref_model: what is trained is not the whole policy"):
        made().follow(3, {"lora": {"w": jnp.zeros(2)}})


class Counter:
    """An offline source of numbers."""

    def __init__(self):
        self.number = 0

    def next(self, state):
        self.number += 1
        return self.number, {}

    def state(self):
        return {"number": self.number}

    def restore(self, state):
        self.number = state["number"]


def test_a_resumed_source_goes_on_exactly():
    """Saved and restored before any batch, also where the reference is due; evaluated in between or not."""

    def run(cut, evaluated):
        moving, seen = made(), []
        source = FollowingSource(Counter(), moving)  # type: ignore[arg-type]
        for updates in range(8):
            params = variables(0.1 * updates**2)
            state = TrainState(jnp.int32(updates), params, (), jnp.zeros(2))
            if updates in evaluated:
                moving.follow(updates, params)
            if updates == cut:
                saved = unpack(*pack(source.state()))
                moving = made()
                source = FollowingSource(Counter(), moving)  # type: ignore[arg-type]
                source.restore(saved)
            batch, _ = source.next(state)
            seen.append(moving(batch))
        return seen

    whole = run(None, ())
    assert [number for number, _ in whole] == list(range(1, 9))
    assert [number for number in range(2, 9) if whole[number - 1][1] != whole[number - 2][1]] == [4, 7]
    for cut in range(1, 8):
        for evaluated in ((), (3,), (cut,)):
            np.testing.assert_array_equal(run(cut, evaluated), whole)
