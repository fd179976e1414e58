"""A small real tokenizer (byte-level BPE, trained here), with ChatML templates, and a writer of data files."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = """The sky is blue and the sea is deep. What is the capital of France? Paris is the capital of France.
How many eggs does the duck lay? She eats three for breakfast and sells the remainder at the market every day.
system user assistant You are a helpful assistant. Yes, certainly. No, sorry! Write a short poem about rain."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`make_tokenizer(chat_template, eos, bos, adds_bos=...)`: the trained vocabulary with these settings."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(WORDS.splitlines() * 4, trainer)
    text = trained.to_str()

    def make(
        chat_template: str | None = CHATML,
        eos: str | None = "<|im_end|>",
        bos: str | None = None,
        adds_bos: bool = False,
        adds_eos: bool = False,
    ) -> PreTrainedTokenizerFast:
        backend = Tokenizer.from_str(text)
        if adds_bos or adds_eos:
            single = f"{f'{bos} ' if adds_bos else ''}$A{f' {eos}' if adds_eos else ''}"
            used = [token for token in (bos, eos) if token]
            backend.post_processor = processors.TemplateProcessing(
                single=single, special_tokens=[(token, backend.token_to_id(token)) for token in used]
            )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chatml(make_tokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """`write(name, *lines)`: a JSON-lines file of these rows (dicts) and raw lines (strings); compressed if `.gz`."""

    def write(name: str, *lines: dict | str | bytes) -> str:
        encoded = [line if isinstance(line, bytes) else _text(line).encode() for line in lines]
        data = b"".join(line + b"\n" for line in encoded)
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return write


def _text(line: dict | str) -> str:
    return line if isinstance(line, str) else json.dumps(line)
