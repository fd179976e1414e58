import pytest

from jaxalign.sampling import truncate_at


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
