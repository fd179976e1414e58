# pyright: reportMissingImports=false
"""A tokenizer of one word per token id, for trainers that take prompts as text."""

from __future__ import annotations

import rollouts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def tokenizer_for(args) -> PreTrainedTokenizerFast:
    """Words as in `rollouts.to_text`, so that every prompt has the tokens that it has elsewhere."""
    config = rollouts.describe(args.model)
    inner = Tokenizer(models.WordLevel({f"<{index}>": index for index in range(config["vocab_size"])}, unk_token="<0>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<0>",
        eos_token=f"<{config['eos_token_id']}>",
        pad_token=f"<{rollouts.pad_id(args.model)}>",
        padding_side="left",
    )
