"""When things are due, which evaluation is best, and the tally's exact JSON."""

import json
import math

import pytest

from jaxalign.training import schedule
from jaxalign.training.metrics import Interval
from jaxalign.training.schedule import Best, Config, Tally
from jaxalign.types import Mean, Min


def test_due_at_multiples_and_at_the_end():
    config = Config(num_steps=11, logging_steps=1, save_steps=4, eval_steps=0, sample_steps=None)
    assert [step for step in range(1, 12) if schedule.due(config, step)] == [4, 8, 11]


def judged(values, **settings):
    config = Config(num_steps=99, metric_for_best_model=settings.pop("name", "loss"), **settings)
    tally, history = Tally(), []
    for step, value in enumerate(values, 1):
        tally = schedule.judge(config, Tally(step, best=tally.best, stale=tally.stale), value)
        history.append((tally.best and tally.best.step, tally.stale))
    return history


def test_best_and_stale_as_in_the_trainer():
    # EarlyStoppingCallback: an improvement counts when it is larger than the threshold; the best metric moves anyway.
    assert judged([3.0, 2.9, 2.0, 2.0, 2.5, 1.0], early_stopping_threshold=0.2) == [
        (1, 0), (2, 1), (3, 0), (3, 1), (3, 2), (6, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "best"),
    [
        ({"name": "loss"}, 2),
        ({"name": "eval_loss"}, 2),
        ({"name": "accuracy"}, 3),
        ({"greater_is_better": True}, 3),
        ({"name": "accuracy", "greater_is_better": False}, 2),
    ],
)
def test_direction_of_the_metric(settings, best):
    assert judged([2.0, 1.0, 3.0], **settings)[-1][0] == best


def test_values_that_are_not_finite_are_stale():
    assert judged([math.nan, 2.0, -math.inf]) == [(None, 1), (2, 0), (2, 1)]


def test_ended():
    config = Config(num_steps=5, early_stopping_patience=2)
    assert schedule.ended(config, Tally(4, stale=1), False) is None
    assert schedule.ended(config, Tally(4, stale=1), True) == "terminated"
    assert schedule.ended(config, Tally(4, stale=2), True) == "early_stopped"
    assert schedule.ended(config, Tally(5, stale=2), True) == "completed"


@pytest.mark.parametrize("best", [None, Best(3, 0.1)])
def test_the_tally_survives_json_exactly(best):
    interval = Interval({"loss": Mean(0.1, 3.0), "low": Min(math.inf), "epoch": 1 / 3})
    tally = Tally(7, interval, Interval({"loss": Mean(1e-30, 2.0)}), 123.0, best, 2, 0.0, best is None)
    got = Tally.from_json(json.loads(json.dumps(tally.to_json(4.5), allow_nan=False)))
    assert got == Tally(7, interval, tally.total, 123.0, best, 2, 4.5, best is None)
