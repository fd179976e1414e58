import dataclasses

import numpy as np
import pytest

from jaxalign.data import Bad, DataConfig, encode, prepare
from jaxalign.data.chat import Encoded, encode_batch
from jaxalign.data.tokenizer import leading_tokens
from jaxalign.models.pretrained import load_tokenizer

CONFIG = DataConfig("unused", max_length=200)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_MARKED = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>{% endfor %}"


def said(role, content):
    return {"role": role, "content": content}


PROMPT = [said("system", "You are a helpful assistant."), said("user", "What is the capital of France?")]
PAIR = {
    "prompt": PROMPT,
    "chosen": [said("assistant", "Paris is the capital of France.")],
    "rejected": [said("assistant", "No, sorry!")],
}
TURNS = [*PROMPT, said("assistant", "Paris."), said("user", "How many eggs?"), said("assistant", "Three eggs, yes.")]


def reason(tokenizer, row, kind, config=CONFIG):
    with pytest.raises(Bad) as caught:
        encode(tokenizer, row, kind, config)
    return caught.value.kind, caught.value.detail


def test_a_pair_of_messages_is_the_templates_text_up_to_the_eos(chatml):
    pair = encode(chatml, PAIR, "preference", CONFIG)
    assert {array.dtype for array in pair.values()} == {np.dtype(np.int32)}
    expected = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chatml.decode(pair["prompt_ids"]) == expected
    assert chatml.decode(pair["chosen_ids"]) == "Paris is the capital of France.<|im_end|>"
    assert chatml.decode(pair["rejected_ids"]) == "No, sorry!<|im_end|>"


def test_completions_of_messages_equal_one_tokenisation_of_the_whole(chatml):
    row = {"prompt": PROMPT, "completion": PAIR["chosen"]}
    example = encode(chatml, row, "sft", CONFIG)
    whole = chatml.apply_chat_template(PROMPT + PAIR["chosen"], return_dict=True)["input_ids"]
    assert example["input_ids"].tolist() == whole[:-1]  # all but the line break behind the last <|im_end|>
    prompt = chatml.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert example["loss_mask"].tolist() == [i >= len(prompt) for i in range(len(whole) - 1)]


def test_completion_only_loss_false_trains_on_all_but_the_first_token(chatml):
    config = dataclasses.replace(CONFIG, completion_only_loss=False)
    mask = encode(chatml, {"prompt": "The sky", "completion": " is blue"}, "sft", config)["loss_mask"]
    assert not mask[0] and mask[1:].all()


def test_plain_strings_get_one_bos_and_one_eos(make_tokenizer):
    tokenizer = make_tokenizer(eos="<|endoftext|>", bos="<s>", adds_bos=True)
    row = {"prompt": "The sky is", "chosen": " blue", "rejected": " deep<|endoftext|>"}
    pair = encode(tokenizer, row, "preference", CONFIG)
    assert tokenizer.decode(pair["prompt_ids"]) == "<s>The sky is"
    assert tokenizer.decode(pair["chosen_ids"]) == " blue<|endoftext|>"
    assert tokenizer.decode(pair["rejected_ids"]) == " deep<|endoftext|>"
    text = encode(tokenizer, {"text": "The sky is blue"}, "sft", CONFIG)
    assert tokenizer.decode(text["input_ids"]) == "<s>The sky is blue<|endoftext|>"
    assert text["loss_mask"].tolist() == [False] + [True] * (len(text["input_ids"]) - 1)


def test_an_eos_that_the_tokenizer_adds_itself_does_not_end_the_prompt(make_tokenizer):
    tokenizer = make_tokenizer(eos="<|endoftext|>", bos="<s>", adds_bos=True, adds_eos=True)
    example = encode(tokenizer, {"prompt": "The sky is", "completion": " blue"}, "sft", CONFIG)
    assert tokenizer.decode(example["input_ids"]) == "<s>The sky is blue<|endoftext|>"
    assert leading_tokens(tokenizer) == [tokenizer.bos_token_id]
    assert leading_tokens(make_tokenizer()) == []


def test_messages_are_all_targets_or_only_the_answers(chatml, make_tokenizer):
    whole = encode(chatml, {"messages": TURNS}, "sft", CONFIG)
    assert whole["loss_mask"].tolist() == [False] + [True] * (len(whole["input_ids"]) - 1)
    marked = make_tokenizer(MARKED)
    config = dataclasses.replace(CONFIG, assistant_only_loss=True)
    answers = encode(marked, {"messages": TURNS}, "sft", config)
    assert answers["input_ids"].tolist() == whole["input_ids"].tolist()
    trained = answers["input_ids"][answers["loss_mask"]]
    assert marked.decode(trained) == "Paris.<|im_end|>Three eggs, yes.<|im_end|>"
    last = encode(marked, {"prompt": TURNS[:-1], "completion": TURNS[-1:]}, "sft", config)
    assert marked.decode(last["input_ids"][last["loss_mask"]]) == "Three eggs, yes.<|im_end|>"


def test_prompts_end_with_the_generation_prompt(chatml):
    assert chatml.decode(encode(chatml, {"prompt": PROMPT, "answer": 3}, "prompt", CONFIG)["prompt_ids"]).endswith(
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tools_and_template_arguments_reach_the_template(make_tokenizer):
    tokenizer = make_tokenizer(
        "{{ tools[0]['function']['name'] if tools else 'none' }} {{ mood }}|{{ messages[0]['content'] }}<|im_end|>"
    )
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    row = {"messages": [said("user", "rain")], "tools": [tool], "chat_template_kwargs": {"mood": "short"}}
    assert tokenizer.decode(encode(tokenizer, row, "sft", CONFIG)["input_ids"]) == "weather short|rain<|im_end|>"
    as_text = {**row, "tools": '[{"type": "function", "function": {"name": "weather"}}]'}
    assert tokenizer.decode(encode(tokenizer, as_text, "sft", CONFIG)["input_ids"]).startswith("weather short")
    without = {**row, "tools": []}
    assert tokenizer.decode(encode(tokenizer, without, "sft", CONFIG)["input_ids"]).startswith("none")
    assert reason(tokenizer, {**row, "tools": "[{"}, "sft")[0] == "wrong type"
    assert reason(tokenizer, {**row, "chat_template_kwargs": 3}, "sft")[0] == "wrong type"


def test_tool_calls_are_no_empty_completion(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m['content'] or m['tool_calls'][0]['name'] }}<|im_end|>{% endfor %}"
    )
    row = {"prompt": [said("user", "rain")], "completion": [{"role": "assistant", "tool_calls": [{"name": "sky"}]}]}
    example = encode(tokenizer, row, "sft", CONFIG)
    assert tokenizer.decode(example["input_ids"][example["loss_mask"]]) == "sky<|im_end|>"


BROKEN = [
    ({**PAIR, "chosen": [said("assistant", " \n")]}, "preference", "empty completion"),
    ({**PAIR, "rejected": [said("assistant", [{"type": "text", "text": ""}])]}, "preference", "empty completion"),
    ({"prompt": "The sky", "completion": ""}, "sft", "empty completion"),
    ({"prompt": "", "completion": "blue"}, "sft", "empty prompt"),
    ({"prompt": "", "id": 3}, "prompt", "empty prompt"),
    ({"prompt": [], "completion": PAIR["chosen"]}, "sft", "empty prompt"),
    ({"text": "  "}, "sft", "empty text"),
    ({"messages": [said("user", "")]}, "sft", "empty text"),
    ({"prompt": "The sky is ", "completion": "blue"}, "sft", "prompt is no prefix"),
    ({"prompt": "The capit", "chosen": "al", "rejected": " is"}, "preference", "prompt is no prefix"),
    ({**PAIR, "rejected": PAIR["chosen"]}, "preference", "identical pair"),
    ({"prompt": "a", "chosen": " b", "rejected": " b<|im_end|>"}, "preference", "identical pair"),
    ({"chosen": "a b", "rejected": "a b"}, "preference", "identical pair"),
    ({"prompt": "a", "chosen": 3, "rejected": "b"}, "preference", "wrong type"),
    ({"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, "preference", "wrong type"),
    ({**PAIR, "chosen": [{"content": "x"}]}, "preference", "wrong type"),
    ({**PAIR, "chosen": [{"role": "assistant"}]}, "preference", "wrong type"),
    ({**PAIR, "chosen": [said("assistant", 3.5)]}, "preference", "wrong type"),
    ({"messages": "text"}, "sft", "wrong type"),
    ({"prompt": PROMPT, "completion": "text"}, "sft", "mixed forms"),
    ({"chosen": "text", "rejected": PAIR["rejected"]}, "preference", "mixed forms"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "preference", "missing column"),
    (
        {**PAIR, "chosen": PROMPT + PAIR["chosen"], "rejected": PROMPT + PAIR["rejected"]},
        "preference",
        "repeated prompt",
    ),
    ({"text": "half \ud800"}, "sft", "wrong text"),
    ({"prompt": "The sky is blue." * 60, "completion": " Yes."}, "sft", "long prompt"),
    ({"prompt": "The sky", "completion": " is blue." * 80}, "sft", "too long"),
    ({"text": "The sky is blue. " * 60}, "sft", "too long"),
]


@pytest.mark.parametrize(("row", "kind", "problem"), BROKEN, ids=[f"{p}-{i}" for i, (_, _, p) in enumerate(BROKEN)])
def test_bad_rows_are_named(chatml, row, kind, problem):
    assert reason(chatml, row, kind)[0] == problem


def test_one_bad_row_does_not_harm_its_batch(chatml):
    rows = [row for row, kind, _ in BROKEN if kind == "preference"]
    results = encode_batch(chatml, [PAIR, *rows, PAIR], "preference", CONFIG)
    assert [isinstance(result, Bad) for result in results] == [False, *[True] * len(rows), False]
    alone = encode(chatml, PAIR, "preference", CONFIG)
    for result in (results[0], results[-1]):
        assert isinstance(result, Encoded)
        assert all(np.array_equal(result.arrays[name], alone[name]) for name in alone)


def test_the_first_differing_tokens_are_shown(make_tokenizer):
    thinking = make_tokenizer(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: deep rain{% endif %}"
    )
    kind, detail = reason(thinking, {"prompt": [said("user", "Why?")], "completion": [said("assistant", "Yes")]}, "sft")
    assert kind == "prompt is no prefix" and "deep" in detail and "Y" in detail


def test_a_template_without_eos_is_a_lost_eos(make_tokenizer, chatml):
    other = make_tokenizer(eos="<|endoftext|>")
    kind, detail = reason(other, PAIR, "preference")
    assert kind == "lost EOS" and "'<|im_end|>'" in detail and "data.eos_token" in detail
    fixed = prepare(other, eos_token="<|im_end|>")
    expected = encode(chatml, PAIR, "preference", CONFIG)
    assert all(
        np.array_equal(value, expected[name]) for name, value in encode(fixed, PAIR, "preference", CONFIG).items()
    )
    assert other.eos_token == "<|endoftext|>"
    early = make_tokenizer("{% for m in messages %}{{ m['role'] }}<|im_end|>{{ m['content'] }}\n{% endfor %}")
    assert reason(early, {"messages": TURNS}, "sft")[0] == "lost EOS"


def test_an_eos_outside_of_the_marks_is_a_lost_eos(make_tokenizer):
    config = dataclasses.replace(CONFIG, assistant_only_loss=True)
    assert reason(make_tokenizer(PLAIN_MARKED), {"messages": TURNS}, "sft", config)[0] == "lost EOS"


def test_an_empty_assistant_mask_is_a_problem(make_tokenizer):
    config = dataclasses.replace(CONFIG, assistant_only_loss=True)
    assert reason(make_tokenizer(MARKED), {"messages": PROMPT}, "sft", config)[0] == "empty loss mask"


def test_double_bos(make_tokenizer):
    tokenizer = make_tokenizer("<s><s>{{ messages[0]['content'] }}<|im_end|>", bos="<s>", adds_bos=True)
    assert reason(tokenizer, {"messages": PROMPT}, "sft")[0] == "double BOS"
    assert reason(tokenizer, {"text": "<s>The sky"}, "sft")[0] == "double BOS"
    assert (
        reason(tokenizer, {"prompt": "<s>The", "chosen": " sky", "rejected": " sea"}, "preference")[0] == "double BOS"
    )
    assert reason(tokenizer, {"prompt": "<s>The sky"}, "prompt")[0] == "double BOS"
    once = make_tokenizer("<s>{{ messages[0]['content'] }}<|im_end|>", bos="<s>", adds_bos=True)
    ids = encode(once, {"messages": PROMPT}, "sft", CONFIG)["input_ids"]
    assert ids.tolist().count(once.bos_token_id) == 1


def test_what_a_template_refuses_is_a_problem(make_tokenizer):
    strict = make_tokenizer("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}")
    kind, detail = reason(strict, PAIR, "preference")
    assert kind == "template error" and "no system" in detail
    joins = make_tokenizer("{{ messages[0]['content'] + 'x' }}")
    row = {"messages": [said("user", [{"type": "text", "text": "hi"}])]}
    assert reason(joins, row, "sft")[0] == "template error"


def test_settings_that_no_row_survives_are_plain_errors(chatml, make_tokenizer):
    def error(tokenizer, row, kind="sft", **options):
        with pytest.raises(ValueError) as caught:
            encode(tokenizer, row, kind, dataclasses.replace(CONFIG, **options))
        assert not isinstance(caught.value, Bad)
        return str(caught.value)

    assert "data.chat_template_path" in error(make_tokenizer(None), PAIR, "preference")
    assert "data.eos_token" in error(make_tokenizer(eos=None), PAIR, "preference")
    assert "plain text" in error(chatml, {"text": "The sky"}, assistant_only_loss=True)
    assert "`completion`" in error(chatml, {"text": "The sky"}, completion_only_loss=True)
    assert "supervised" in error(chatml, PAIR, "preference", completion_only_loss=True)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encoded(tokenizer, row, kind, config) -> Encoded:
    (result,) = encode_batch(tokenizer, [row], kind, config)
    assert isinstance(result, Encoded), result
    return result


def test_truncation_when_asked(make_tokenizer):
    tokenizer = make_tokenizer(eos="<|endoftext|>", bos="<s>", adds_bos=True)
    prompt, chosen, rejected = (
        "The sky is blue. What is the capital of France?",
        " Paris is the capital.",
        " No, sorry!",
    )
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    full = encode(tokenizer, row, "preference", CONFIG)
    sizes = {name: len(value) for name, value in full.items()}
    limit = sizes["prompt_ids"] + sizes["chosen_ids"] - 3
    assert reason(tokenizer, row, "preference", dataclasses.replace(CONFIG, max_length=limit))[0] == "too long"

    config = dataclasses.replace(CONFIG, max_length=limit, truncation_mode="keep_start")
    start = encoded(tokenizer, row, "preference", config)
    assert start.arrays["prompt_ids"].tolist() == full["prompt_ids"].tolist()
    assert start.arrays["chosen_ids"].tolist() == full["chosen_ids"][:-3].tolist()
    left = min(sizes["rejected_ids"], sizes["chosen_ids"] - 3)
    assert start.arrays["rejected_ids"].tolist() == full["rejected_ids"][:left].tolist()
    assert start.cut == 3 + sizes["rejected_ids"] - left

    config = dataclasses.replace(config, truncation_mode="keep_end")
    end = encoded(tokenizer, row, "preference", config)
    assert end.arrays["prompt_ids"].tolist() == [full["prompt_ids"][0], *full["prompt_ids"][4:].tolist()]  # BOS stays
    assert end.arrays["chosen_ids"].tolist() == full["chosen_ids"].tolist()
    assert end.arrays["rejected_ids"].tolist() == full["rejected_ids"].tolist()
    assert end.cut == 3


@pytest.mark.parametrize("mode", [None, "keep_start", "keep_end"])
@pytest.mark.parametrize("form", ["prompt-completion", "text"])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_truncated_examples_fit_and_keep_a_target(make_tokenizer, mode, form, adds_bos):
    tokenizer = make_tokenizer(eos="<|endoftext|>", bos="<s>", adds_bos=adds_bos)
    row = {"prompt": "The sky is blue and deep.", "completion": " Yes, certainly, the sea is deep."}
    row = row if form == "prompt-completion" else {"text": row["prompt"] + row["completion"]}
    full = encode(tokenizer, row, "sft", CONFIG)
    for limit in range(2, len(full["input_ids"]) + 2):
        config = dataclasses.replace(CONFIG, max_length=limit, truncation_mode=mode)
        (result,) = encode_batch(tokenizer, [row], "sft", config)
        if isinstance(result, Bad):
            assert limit < len(full["input_ids"])
            continue
        tokens, mask = result.arrays["input_ids"], result.arrays["loss_mask"]
        assert len(tokens) == min(limit, len(full["input_ids"])) and mask.any() and not mask[0]
        assert result.cut == len(full["input_ids"]) - len(tokens) and result.targets == mask.sum()
        assert mode is not None or not result.cut
        if mode == "keep_start":
            assert tokens.tolist() == full["input_ids"][:limit].tolist()
        if mode == "keep_end":
            assert tokens[-1] == tokenizer.eos_token_id
            if form == "prompt-completion":
                assert tokens[mask].tolist() == full["input_ids"][full["loss_mask"]].tolist()


def test_truncation_never_leaves_a_pair_that_is_no_pair(make_tokenizer):
    tokenizer = make_tokenizer()
    row = {"prompt": "The sky", "chosen": " is blue and deep.", "rejected": " is blue and short."}
    prompt = len(ids(tokenizer, row["prompt"]))
    config = dataclasses.replace(CONFIG, max_length=prompt + 2, truncation_mode="keep_start")
    assert reason(tokenizer, row, "preference", config)[0] == "identical pair"
    config = dataclasses.replace(config, max_length=prompt)
    assert reason(tokenizer, row, "preference", config)[0] == "long prompt"
    config = dataclasses.replace(config, truncation_mode="keep_end", max_length=4)
    assert reason(tokenizer, row, "preference", config)[0] == "too long"


def test_the_prompts_own_limit(make_tokenizer):
    tokenizer = make_tokenizer()
    row = {"prompt": "The sky is blue and deep.", "completion": " Yes."}
    size = len(ids(tokenizer, row["prompt"]))
    exact = dataclasses.replace(CONFIG, max_prompt_length=size)
    assert len(encode(tokenizer, row, "sft", exact)["input_ids"]) > size
    below = dataclasses.replace(CONFIG, max_prompt_length=size - 1)
    assert reason(tokenizer, row, "sft", below)[0] == "long prompt"
    assert reason(tokenizer, row, "prompt", below)[0] == "long prompt"
    cut = encode(tokenizer, row, "prompt", dataclasses.replace(below, truncation_mode="keep_end"))
    assert cut["prompt_ids"].tolist() == ids(tokenizer, row["prompt"])[1:]
    for whole in ({"text": row["prompt"]}, {"messages": [*PROMPT, *PAIR["chosen"]]}):
        with pytest.raises(ValueError, match=r"data\.max_prompt_length=.*no column `prompt`"):
            encode(tokenizer, whole, "sft", exact)


def test_a_bos_that_begins_every_turn_is_not_kept(make_tokenizer):
    tokenizer = make_tokenizer(bos="<|im_start|>")
    row = {"prompt": PROMPT, "completion": PAIR["chosen"]}
    full = encode(tokenizer, row, "sft", CONFIG)["input_ids"].tolist()
    config = dataclasses.replace(CONFIG, max_length=len(full) - 5, truncation_mode="keep_end")
    assert encode(tokenizer, row, "sft", config)["input_ids"].tolist() == full[5:]


def test_a_real_chat_model(smollm2):
    tokenizer = load_tokenizer(smollm2)
    row = {"prompt": PROMPT[1:], "chosen": PAIR["chosen"], "rejected": PAIR["rejected"]}
    pair = encode(tokenizer, row, "preference", CONFIG)
    assert tokenizer.decode(pair["prompt_ids"]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(pair["chosen_ids"]) == "Paris is the capital of France.<|im_end|>"
    text = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
    pair = encode(tokenizer, text, "preference", CONFIG)
    assert tokenizer.decode(pair["prompt_ids"]) == "\n\nHuman: Hi\n\nAssistant:"
    assert tokenizer.decode(pair["rejected_ids"]) == " No<|im_end|>"
