"""Calling rewards: what comes back, side by side in time, and every failure named."""

import asyncio
import logging
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from jaxalign.rewards import Reward, RewardError, call_rewards, start_rewards

PROMPTS = ["2 + 2 =", "3 + 3 =", "4 + 4 ="]
COMPLETIONS = ["four", "it is six, I think", "eight"]
COLUMNS = {"answer": ["4", "6", "8"], "completion_ids": [[5], [6, 7, 8], [9, 2]]}


def call(*functions, prompts=PROMPTS, completions=COMPLETIONS, columns=COLUMNS, **options):
    rewards = [one if isinstance(one, Reward) else Reward(one.__name__, one) for one in functions]
    return call_rewards(rewards, prompts, completions, columns, **options)


def returning(*values):
    def given(completions, **columns):
        return list(values)

    return given


def test_scores_in_order_with_nan_for_none():
    def tokens(completion_ids, **columns):
        return [len(ids) for ids in completion_ids]

    async def matches(prompts, completions, answer, **columns):
        await asyncio.sleep(0)
        return [None if i == 1 else float(one == "8") for i, one in enumerate(answer)]

    def only_prompts(prompts):  # takes no columns at all, and is given none
        return tuple(np.float32(len(prompt)) for prompt in prompts)

    scores = call(tokens, matches, only_prompts, returning(True, np.bool_(False), np.array(0.5)))
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, [[1, 0, 7, 1], [3, np.nan, 7, 0], [2, 1, 7, 0.5]])


def test_conversations_reach_the_function_as_they_are():
    conversation = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]

    def lengths(completions, **columns):
        return [len(messages[0]["content"]) for messages in completions]

    assert call(lengths, completions=conversation)[:, 0].tolist() == [4, 18, 5]


def test_nothing_to_score_is_no_call():
    def fails(completions, **columns):
        raise AssertionError("called")

    assert call(fails, prompts=[], completions=[], columns={"answer": []}).shape == (0, 1)
    assert call().shape == (3, 0)


def test_options_are_no_columns():
    """A column fills a plain parameter; neither a bound option nor a keyword-only parameter with a default."""

    def scaled(completions, answer=None, scale=1.0, *, offset=0.5):
        return [float(one) * scale + offset for one in answer or []]

    columns = {**COLUMNS, "scale": ["a", "b", "c"], "offset": ["a", "b", "c"]}
    scores = call(Reward("scaled", scaled, {"scale": 10.0}), columns=columns)
    assert scores[:, 0].tolist() == [40.5, 60.5, 80.5]


def test_rewards_overlap():
    def slow(completions, **columns):
        time.sleep(0.4)
        return [0.0] * 3

    async def judge(completions, **columns):
        await asyncio.sleep(0.4)
        return [0.0] * 3

    start = time.monotonic()
    call(slow, judge, slow, judge, judge)
    assert time.monotonic() - start < 1.2  # one after the other: 2.0


def test_start_returns_at_once():
    release = threading.Event()

    def waits(completions, **columns):
        release.wait(10)
        return [1.0, 2.0, 3.0]

    future = start_rewards([Reward("waits", waits)], PROMPTS, COMPLETIONS, COLUMNS)
    assert not future.done()
    release.set()
    assert future.result(10)[:, 0].tolist() == [1, 2, 3]


def test_a_reward_that_ends_its_own_work_has_its_own_time():
    """0.6 s, where a batch has 0.2 s; another that hangs does not profit from it."""

    def slow(completions, **columns):
        time.sleep(0.6)
        return [1.0] * len(completions)

    def hangs(completions, **columns):
        time.sleep(60)

    bounded = Reward("bounded", slow, longest=lambda completions: 10.0 * completions)
    assert call(bounded, timeout=0.2).tolist() == [[1.0]] * 3
    message = r"'hangs' has not returned after 0.2 s .*rollout\.reward_timeout.*rollout\.on_reward_error: none"
    with pytest.raises(RewardError, match=message):
        call(bounded, hangs, timeout=0.2)


def picky(completions, **columns):
    if any("six" in completion for completion in completions):
        raise KeyError("six")
    return [float(len(completion)) for completion in completions]


async def picky_async(completions, **columns):
    return picky(completions)


def leaves(completions, **columns):
    if any("six" in completion for completion in completions):
        sys.exit(0)
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize("function", [picky, picky_async, leaves])
def test_a_reward_that_raises(function, caplog):
    message = rf"'{function.__name__}', sample 1 \(starts 'it is six.*(KeyError|SystemExit)"
    with pytest.raises(RewardError, match=message):
        call(returning(1, 2, 3), function)
    with caplog.at_level(logging.WARNING, "jaxalign"):
        scores = call(returning(1, 2, 3), function, on_error="none")
    np.testing.assert_array_equal(scores, [[1, 4], [2, np.nan], [3, 5]])
    assert "1 of 3 scores are missing" in caplog.text and "sample 1" in caplog.text


def test_a_reward_that_raises_only_on_the_whole_batch():
    def crowded(completions, **columns):
        if len(completions) > 1:
            raise ValueError("too many")
        return [1.0]

    with pytest.raises(RewardError, match=r"'crowded' raised ValueError: too many on a batch of 3.*no sample alone"):
        call(crowded)
    assert np.isnan(call(crowded, on_error="none")).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "returned 'nan'"),
        (-float("inf"), "returned '-inf'"),
        ("0.5", r"returned '0.5' \(str\)"),
        ([1.0], "returned"),
        (np.array([1.0]), "returned"),
        (1j, "returned"),
        (ValueError("the reference is empty"), "the reference is empty"),
    ],
)
def test_what_is_no_score(value, message):
    with pytest.raises(RewardError, match=rf"'given', sample 2 \(starts 'eight'\): .*{message}"):
        call(returning(1.0, None, value))
    np.testing.assert_array_equal(call(returning(1.0, None, value), on_error="none")[:, 0], [1, np.nan, np.nan])


@pytest.mark.parametrize(
    "returned", [[1.0, 2.0], [1.0] * 4, [], "abc", 1.0, None, {"a": 1, "b": 2, "c": 3}, np.array(1.0)]
)
def test_the_wrong_count(returned):
    def given(completions, **columns):
        return returned

    with pytest.raises(RewardError, match=r"'given' returned .* for 3 samples, the first of which starts 'four'"):
        call(given)
    scores = call(given, returning(1, 2, 3), on_error="none")
    assert np.isnan(scores[:, 0]).all() and scores[:, 1].tolist() == [1, 2, 3]


def test_a_coroutine_from_a_function_that_is_not_async():
    async def inner():
        return [1.0] * 3

    def wrapped(completions, **columns):
        coroutine = inner()
        coroutine.close()
        return coroutine

    with pytest.raises(RewardError, match="'wrapped' returned a coroutine"):
        call(wrapped)


@pytest.mark.parametrize("kind", ["sync", "async", "async that blocks"])
def test_a_reward_that_never_returns(kind):
    release = threading.Event()

    def hangs(completions, **columns):
        release.wait(30)
        return [0.0] * 3

    async def hangs_async(completions, **columns):
        await asyncio.sleep(30)

    async def blocks(completions, **columns):
        release.wait(30)

    function = {"sync": hangs, "async": hangs_async, "async that blocks": blocks}[kind]
    start = time.monotonic()
    with pytest.raises(RewardError, match=rf"'{function.__name__}' has not returned after 0\.3 s for 3 .* 'four'"):
        call(returning(1, 2, 3), function, timeout=0.3)
    scores = call(returning(1, 2, 3), function, timeout=0.3, on_error="none")
    assert time.monotonic() - start < 5
    release.set()
    np.testing.assert_array_equal(scores, [[1, np.nan], [2, np.nan], [3, np.nan]])


def test_where_it_hangs_is_named():
    release = threading.Event()

    def hangs(completions, **columns):
        while not release.is_set():
            sum(range(1000))

    with pytest.raises(RewardError, match=r"it is at .*test_calling\.py:\d+ in hangs"):
        call(hangs, timeout=0.2)
    release.set()


def test_a_hanging_reward_does_not_hold_up_the_end_of_the_process():
    code = (
        "import time\nfrom jaxalign.rewards import Reward, RewardError, call_rewards\n"
        "def hangs(completions):\n    time.sleep(60)\n"
        "async def blocks(completions):\n    time.sleep(60)\n"
        "rewards = [Reward('hangs', hangs), Reward('blocks', blocks)]\n"
        "try:\n    call_rewards(rewards, ['a'], ['b'], {}, timeout=0.2)\n"
        "except RewardError:\n    print('named')\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.returncode) == ("named\n", 0), done.stderr
    assert time.monotonic() - start < 30


def test_what_is_wrong_before_any_call():
    def wants(completions, answer, hint):
        raise AssertionError("called")

    with pytest.raises(ValueError, match=r"'wants' needs the column 'hint'; there are: answer, completion_ids"):
        call(wants)
    with pytest.raises(ValueError, match=r"'answer' has 1 values for 3"):
        call(wants, columns={"answer": ["4"], "hint": ["", "", ""]})
    with pytest.raises(ValueError, match="'prompts' has 2 values for 3"):
        call(wants, prompts=PROMPTS[:2])
    with pytest.raises(ValueError, match="on_error='zero'"):
        call(wants, columns={**COLUMNS, "hint": ["", "", ""]}, on_error="zero")
