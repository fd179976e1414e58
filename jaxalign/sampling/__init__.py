"""Drawing completions: one compiled loop, and what surrounds it on the host."""

from jaxalign.sampling.generate import Config, bucket_width, make_generate, sample_prompts
from jaxalign.sampling.text import truncate_at

__all__ = ["Config", "bucket_width", "make_generate", "sample_prompts", "truncate_at"]
