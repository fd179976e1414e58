import dataclasses
import json

import numpy as np
import pytest

from jaxalign.data import DataConfig, encode, encode_rows, from_list, load, prepare, read
from jaxalign.data import examples as module
from jaxalign.data.examples import cache_key, hold_out
from jaxalign.data.tokenizer import digest

TEXTS = [{"text": f"The sky is blue {'and deep ' * (i % 7)}{i}.", "id": i} for i in range(1203)]  # several Arrow chunks


def test_examples_equal_encoding_each_row(chatml, write):
    config = DataConfig(write("a.jsonl", *TEXTS))
    train = load(config, chatml, "sft").train
    assert len(train) == len(TEXTS) and train.arrays["input_ids"].starts.size > 1
    for i in (0, 1, 499, 500, 999, 1000, 1202):
        expected = encode(chatml, TEXTS[i], "sft", config)
        assert train[i].keys() == expected.keys()
        for name, value in train[i].items():
            assert value.dtype == expected[name].dtype and np.array_equal(value, expected[name])
        assert train.row(i) == TEXTS[i]
    lengths = [len(example["input_ids"]) for example in train]
    assert train.lengths["total"].tolist() == lengths
    assert train.lengths["completion"].tolist() == [n - 1 for n in lengths]


def test_encoding_is_done_once(chatml, write, monkeypatch):
    config = DataConfig(write("a.jsonl", *TEXTS[:50]))
    first = load(config, chatml, "sft").train
    monkeypatch.setattr(module, "encode_batch", None)  # would fail if called
    again = load(dataclasses.replace(config, seed=1, on_bad="drop"), chatml, "sft").train
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    with pytest.raises(TypeError):
        load(dataclasses.replace(config, max_length=99), chatml, "sft")


def test_the_cache_key_knows_what_decides_the_tokens(write, make_tokenizer):
    tokenizer, path = make_tokenizer(), write("a.jsonl", *TEXTS[:9])
    config = DataConfig(path)
    rows = read(config, "sft")
    key = cache_key(rows, tokenizer, "sft", config)
    tokenizer("The sky is blue", truncation=True, max_length=2)  # leaves settings behind
    assert cache_key(read(config, "sft"), tokenizer, "sft", config) == key
    others = [
        cache_key(rows, make_tokenizer("{{ 'other' }}"), "sft", config),
        cache_key(rows, prepare(tokenizer, eos_token="<|endoftext|>"), "sft", config),
        cache_key(rows, tokenizer, "sft", dataclasses.replace(config, truncation_mode="keep_end")),
        cache_key(read(dataclasses.replace(config, split="train[:3]"), "sft"), tokenizer, "sft", config),
        cache_key(dataclasses.replace(rows, columns={"text": "id"}), tokenizer, "sft", config),
        cache_key(read(DataConfig(write("a.jsonl", *TEXTS[:8], TEXTS[9])), "sft"), tokenizer, "sft", config),
    ]
    assert len({key, *others}) == 7
    assert digest(tokenizer) == digest(make_tokenizer())


def test_hold_out(chatml, write):
    config = DataConfig(write("a.jsonl", *TEXTS[:100]), eval_ratio=0.2, seed=3)
    data = load(config, chatml, "sft")
    assert data.eval is not None
    train, held = ([row["id"] for row in map(part.row, range(len(part)))] for part in (data.train, data.eval))
    assert len(held) == 20 and sorted(train + held) == list(range(100))
    assert train == sorted(train) and held != list(range(80, 100))
    same = load(config, chatml, "sft").eval
    other = load(dataclasses.replace(config, seed=4), chatml, "sft").eval
    assert same is not None and other is not None
    assert same.index.tolist() == data.eval.index.tolist() != other.index.tolist()
    with pytest.raises(ValueError, match=r"eval_ratio=0\.2 of 2 examples"):
        hold_out(data.train.select(np.arange(2)), 0.2, 0)


def test_who_is_held_out_does_not_depend_on_bad_rows(chatml, write):
    rows = [{"text": "" if i % 9 == 4 else f"The sky {i}", "id": i} for i in range(60)]
    config = DataConfig(write("a.jsonl", *rows), eval_ratio=0.25, on_bad="drop")
    part = load(config, chatml, "sft").eval
    clean = load(
        DataConfig(write("b.jsonl", *[{**r, "text": "The sky"} for r in rows]), eval_ratio=0.25), chatml, "sft"
    )
    assert part is not None and clean.eval is not None
    expected = [i for i in clean.eval.index.tolist() if rows[i]["text"]]
    assert part.index.tolist() == expected


def test_slices_are_encoded_alone(chatml, write):
    config = DataConfig(write("a.jsonl", *TEXTS[:30]), split="train[10:20]")
    train = encode_rows(read(config, "sft"), chatml, "sft", config)
    assert [train.row(i)["id"] for i in range(10)] == list(range(10, 20)) and train.where(0)[1] == 11
    assert np.array_equal(train[3]["input_ids"], encode(chatml, TEXTS[13], "sft", config)["input_ids"])


def test_examples_in_memory():
    pairs = [{"prompt_ids": [1] * n, "chosen_ids": [2, n], "rejected_ids": [3]} for n in (1, 4, 2)]
    examples = from_list(pairs)
    assert [{k: v.tolist() for k, v in example.items()} for example in examples] == pairs
    assert examples.lengths["total"].tolist() == [4, 7, 5]
    chosen = examples.select(np.asarray([2, 0]))
    assert chosen[0]["prompt_ids"].tolist() == [1, 1] and chosen.lengths["prompt"].tolist() == [2, 1]
    with pytest.raises(ValueError, match="made in memory"):
        examples.row(0)
    masked = from_list([{"input_ids": np.arange(4), "loss_mask": np.asarray([0, 0, 1, 1], bool)}])
    assert masked[0]["loss_mask"].tolist() == [False, False, True, True]
    assert {k: v.tolist() for k, v in masked.lengths.items()} == {"prompt": [2], "completion": [2], "total": [4]}


def test_templates_and_eos_from_the_config(make_tokenizer, write, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|endoftext|>{% endfor %}")
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}] * 2
    bare = make_tokenizer(None, eos="<|im_end|>")
    config = DataConfig(write("a.jsonl", *rows), chat_template_path=str(template), eos_token="<|endoftext|>")
    data = load(config, bare, "sft")
    expected = "[user]Hi<|endoftext|>[assistant]Yes<|endoftext|>"
    assert data.tokenizer.decode(data.train[0]["input_ids"]) == expected
    assert data.tokenizer.eos_token == "<|endoftext|>" and bare.chat_template is None

    folder = tmp_path / "tokenizer"
    make_tokenizer(template.read_text()).save_pretrained(folder)
    assert prepare(bare, chat_template_path=str(folder)).chat_template == template.read_text()
    make_tokenizer(None).save_pretrained(tmp_path / "without")
    for path, error in ((tmp_path / "no.jinja", FileNotFoundError), (tmp_path / "without", ValueError)):
        with pytest.raises(error, match="chat_template_path="):
            prepare(bare, chat_template_path=str(path))
    with pytest.raises(ValueError, match="not one token"):
        prepare(bare, eos_token="<|eot|>")
    with pytest.raises(ValueError, match="no EOS token"):
        prepare(make_tokenizer(eos=None))


def test_data_without_a_chat_template_say_what_to_do(make_tokenizer, write):
    config = DataConfig(write("a.jsonl", {"messages": [{"role": "user", "content": "Hi"}]}))
    with pytest.raises(ValueError, match=r"has no chat template: set data\.chat_template_path"):
        load(config, make_tokenizer(None), "sft")


def test_encoding_prints_nothing(chatml, write, capfd):
    load(DataConfig(write("a.jsonl", {"text": "The sky is blue " * 50})), chatml, "sft")
    assert capfd.readouterr() == ("", "")


def test_unicode_lines_survive(chatml, write):
    text = "é ü 漢字 \u2028 🙂"
    path = write("a.jsonl", json.dumps({"text": text}, ensure_ascii=False))
    train = load(DataConfig(path), chatml, "sft").train
    assert chatml.decode(train[0]["input_ids"]) == text + "<|im_end|>"
