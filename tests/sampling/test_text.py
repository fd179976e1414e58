import numpy as np
import pytest

from jaxalign.sampling import Config, truncate_at, truncate_samples, without_end
from jaxalign.sampling.generate import EOS, LENGTH, STOP
from jaxalign.types import Samples


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", [], "one two three"),
        ("one two three", ["four"], "one two three"),
        # The earliest in the text wins, not the first in the list.
        ("one two three", ["three", " two"], "one"),
        ("\n\nQ: next", ["\n\n"], ""),
        # An emoji's code points are whole characters.
        ("fine 🙂 END", ["🙂"], "fine "),
        ("", ["x"], ""),
    ],
)
def test_truncate_at(text, stops, expected):
    assert truncate_at(text, stops) == expected


def test_empty_stop_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        truncate_at("text", ["ok", ""])


def test_the_stop_string_may_stay():
    assert truncate_at("one two three", ["three", " two"], keep=True) == "one two"
    assert truncate_at("one two three", ["two three", "two"], keep=True) == "one two"
    assert truncate_at("one two three", ["four"], keep=True) == "one two three"


def test_what_ended_a_completion_leaves_it():
    config = Config(eos_ids=(9, 8), stop_sequences=((4, 5), (3, 4, 5), (1,)))
    for ids, left in (
        ([2, 9], [2]),
        ([2, 4, 5], [2]),
        ([3, 4, 5], []),  # the longest
        ([1, 1], [1]),
        ([5], [5]),  # shorter than the sequence that it ends
        ([4, 5, 2], [4, 5, 2]),
        ([], []),
    ):
        assert without_end(ids, config) == left
    assert without_end([2, 9], Config()) == [2, 9]


def test_tokens_and_log_probs_are_cut_after_the_token_that_completes_a_stop():
    """A token is its letters; 9 is EOS, which has none. The stops are "bc" and "dd"."""
    letters = {1: "a", 2: "b", 3: "cx", 4: "d", 9: ""}
    tokens = np.array(
        [
            [1, 2, 3, 1, 9],  # "abcxa": complete with token 3, before EOS
            [1, 1, 4, 1, 4],  # no stop: "aadad"
            [1, 1, 1, 4, 4],  # complete with the very last token, where the length ends: not shortened, yet stopped
            [4, 4, 9, 0, 0],  # the end before EOS
            [9, 0, 0, 0, 0],  # nothing but EOS
            [0, 0, 0, 0, 0],  # nothing at all
        ],
        np.int32,
    )
    logps = -np.arange(1, 31, dtype=np.float32).reshape(6, 5)
    lengths = np.array([5, 5, 5, 3, 1, 0], np.int32)
    finish = np.array([EOS, LENGTH, LENGTH, EOS, EOS, LENGTH], np.int32)
    samples = Samples(tokens, lengths, finish, logps, logps / 10)
    cut = truncate_samples(samples, lambda ids: "".join(letters[i] for i in ids), ["bc", "dd"])
    np.testing.assert_array_equal(cut.lengths, [3, 5, 5, 2, 1, 0])
    np.testing.assert_array_equal(cut.finish, [STOP, LENGTH, STOP, STOP, EOS, LENGTH])
    np.testing.assert_array_equal(cut.tokens[[0, 3]], [[1, 2, 3, 0, 0], [4, 4, 0, 0, 0]])
    np.testing.assert_array_equal(cut.sampler_logps[0], [-1, -2, -3, 0, 0])
    np.testing.assert_array_equal(cut.log_mass[0], np.array([-0.1, -0.2, -0.3, 0, 0], np.float32))
    np.testing.assert_array_equal(cut.tokens[[1, 2, 4]], tokens[[1, 2, 4]])
    assert (cut.tokens.dtype, cut.sampler_logps.dtype, cut.lengths.dtype) == (np.int32, np.float32, np.int32)
    assert samples.lengths[0] == 5  # left as they were
    assert truncate_samples(samples, str, []) is samples
