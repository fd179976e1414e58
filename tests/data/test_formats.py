import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.data import DataConfig, normalise
from jaxalign.data.formats import FORMS, Bad, conversational, form_of, prompt_key, split_prompt

USER, A, B = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "a"},
    {"role": "assistant", "content": "b"},
)


@pytest.mark.parametrize(
    ("row", "kind", "form"),
    [
        ({"text": "a"}, "sft", "text"),
        ({"messages": [USER, A], "prompt": "a label"}, "sft", "messages"),
        ({"prompt": "a", "completion": " b", "text": "c"}, "sft", "prompt-completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", "preference"),
        ({"chosen": "b", "rejected": "c"}, "preference", "preference"),
        ({"prompt": "a", "answer": 4}, "prompt", "prompt-only"),
    ],
)
def test_forms(row, kind, form):
    assert form_of(row, kind) == form
    assert set(normalise(row, kind)) >= set(FORMS[kind][form])


def test_a_missing_column_is_named():
    with pytest.raises(Bad, match=r"missing column: needed: `chosen` and `rejected`.* this row has prompt, chosen"):
        form_of({"prompt": "a", "chosen": "b", "rejected": None}, "preference")


def test_normalised_rows_have_no_extra_columns():
    row = normalise({"prompt": "a", "chosen": " b", "rejected": " c", "score": 3, "source": "x"}, "preference")
    assert row == {"prompt": "a", "chosen": " b", "rejected": " c", "tools": None, "chat_template_kwargs": {}}
    assert not conversational(row) and conversational(normalise({"messages": [USER, A]}, "sft"))


def test_implicit_prompts_of_messages():
    turns = [{"role": "system", "content": "s"}, USER, A, USER]
    row = normalise({"chosen": [*turns, A], "rejected": [*turns, B]}, "preference")
    assert (row["prompt"], row["chosen"], row["rejected"]) == (turns, [A], [B])
    # A prompt in words beside whole conversations, as in UltraFeedback.
    row = normalise({"prompt": "Hi", "chosen": [USER, A], "rejected": [USER, B]}, "preference")
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([USER], [A], [B])


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("\n\nHuman: Hi\n\nAssistant: Yes", "\n\nHuman: Hi\n\nAssistant: No", "\n\nHuman: Hi\n\nAssistant:"),
        ("Q: x\nA: I would", "Q: x\nA: I will", "Q: x\nA: I"),  # no half words
        ("Q: x\nA: Yes", "Q: x\nA: Yes sir", "Q: x\nA:"),  # each side keeps a word
        ("Q: x\nA: Yes\n", "Q: x\nA: Yes sir", "Q: x\nA:"),
        ("Q: x\nA: Yes ", "Q: x\nA: Yes sir", "Q: x\nA:"),
        ("Q: Yes\nsir", "Q: Yes sir", "Q: Yes"),
        ("Q: Yes", "Q: Yessir", "Q:"),
        ("Q:\n\nfoo", "Q:\n\nbar", "Q:"),
        ("one", "two", ""),
        ("one", "one two", ""),
    ],
)
def test_implicit_prompts_of_strings(chosen, rejected, prompt):
    assert split_prompt(chosen, rejected) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])
    assert split_prompt(rejected, chosen)[0] == prompt


WORDS = st.lists(st.sampled_from(["a", "ab", "abc", "b"]), min_size=1, max_size=6)
SPACES = st.sampled_from([" ", "  ", "\n", "\n\n"])


@given(WORDS, WORDS, SPACES)
def test_an_implicit_prompt_is_shared_words(one, other, space):
    chosen, rejected = space.join(one), space.join(other)
    prompt, left, right = split_prompt(chosen, rejected)
    assert (prompt + left, prompt + right) == (chosen, rejected)
    assert prompt.split() == one[: len(prompt.split())] == other[: len(prompt.split())]
    assert left.strip() and right.strip() and prompt == prompt.rstrip()
    shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert len(prompt.split()) == min(shared, len(one) - 1, len(other) - 1)


def test_prompt_keys():
    def key(row, kind):
        return prompt_key(normalise(row, kind))

    pair = key({"chosen": [USER, A], "rejected": [USER, B]}, "preference")
    assert pair == key({"messages": [USER, B, USER, A]}, "sft") == key({"prompt": [USER]}, "prompt")
    assert pair != key({"prompt": [A]}, "prompt") and -(2**63) <= pair < 2**63
    assert key({"text": "a"}, "sft") != key({"text": "b"}, "sft")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad": "skip"}, "on_bad='skip': one of 'stop', 'drop'"),
        ({"truncation_mode": "middle"}, "truncation_mode='middle'"),
        ({"max_length": 1}, "max_length=1"),
        ({"max_prompt_length": 1024}, "max_prompt_length=1024"),
        ({"max_prompt_length": 0}, "max_prompt_length=0"),
        ({"eval_ratio": 1.0}, "eval_ratio=1.0"),
        ({"eval_ratio": 0.1, "eval_path": "x.jsonl"}, "eval_ratio holds rows out"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig("x.jsonl", **options)
