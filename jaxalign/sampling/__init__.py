"""Drawing completions: one compiled loop, and what surrounds it on the host."""

from jaxalign.sampling.choose import Config
from jaxalign.sampling.decoding import make_decoding
from jaxalign.sampling.generate import make_generate
from jaxalign.sampling.prompts import bucket_width, first_samples, sample_prompts
from jaxalign.sampling.text import truncate_at, truncate_samples, truncate_tokens, without_end

__all__ = [
    "Config",
    "bucket_width",
    "first_samples",
    "make_decoding",
    "make_generate",
    "sample_prompts",
    "truncate_at",
    "truncate_samples",
    "truncate_tokens",
    "without_end",
]
