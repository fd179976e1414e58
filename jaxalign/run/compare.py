"""Before and after: two models' greedy answers to the same held-out prompts."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from jaxalign import data, models
from jaxalign.config import CompareSection
from jaxalign.evaluation import Comparison, Side, check_rules, judge, make_answer, readable
from jaxalign.run.prepare import resolve_dtype
from jaxalign.sampling import Config


def compare(section: CompareSection, before: str, after: str, settings: data.DataConfig) -> Comparison:
    """Asks both models and judges their answers.

    Args:
      section: prompts and rules.
      before: the model that the run started from: a folder, a GGUF file or a Hub name.
      after: the model that it ended with.
      settings: of the last stage's data: chat template, EOS and lengths are its.

    Raises:
      FileNotFoundError: no such model or prompts.
      ValueError: no prompts, or an unknown rule.
    """
    prompts, settings = check_prompts(section, after, settings), prompt_settings(section, settings)
    rows = [prompts.row(i) for i in range(len(prompts))]
    return Comparison(
        prompts=tuple(readable(row["prompt"]) for row in rows),
        before=_side(section, before, settings, rows),
        after=_side(section, after, settings, rows),
    )


def prompt_settings(section: CompareSection, settings: data.DataConfig) -> data.DataConfig:
    """How the prompts are read: as a stage's data are, from another path."""
    kept = {name: getattr(settings, name) for name in ("chat_template_path", "eos_token", "max_length")}
    return data.DataConfig(path=section.path, **kept)


def check_prompts(section: CompareSection, model: str, settings: data.DataConfig) -> data.Examples:
    """The prompts; raises if they or the rules cannot be used, see `compare`."""
    check_rules(section.rules)
    return data.load(prompt_settings(section, settings), models.load_tokenizer(model), "prompt").train


def comparison_tables(comparison: Comparison, samples: int) -> tuple[Table, Table]:
    """What was measured, and some of the answers side by side.

    Args:
      comparison: the two sides.
      samples: how many prompts to show, spread over all of them.
    """
    before, after, count = comparison.before, comparison.after, len(comparison.prompts)
    measured = Table("held-out answers", "before", "after", title=f"{count} prompts, greedy")
    for rule, share in before.rules.items():
        measured.add_row(f"satisfy the rule `{rule}`", f"{share:.0%}", f"{after.rules[rule]:.0%}")
    if before.right is not None:
        measured.add_row("mention what a right answer must", f"{before.right:.0%}", f"{after.right:.0%}")
    measured.add_row("mean words", f"{before.mean_words:.1f}", f"{after.mean_words:.1f}")
    shown = Table("prompt", "before", "after", show_lines=True)
    for i in list(range(0, count, max(1, count // max(samples, 1))))[:samples]:
        # As Text: what a model writes is no markup.
        shown.add_row(*map(Text, (comparison.prompts[i], before.answers[i], after.answers[i])))
    return measured, shown


def _side(section: CompareSection, path: str, settings: data.DataConfig, rows: list[dict[str, Any]]) -> Side:
    found = data.load(settings, models.load_tokenizer(path), "prompt")
    examples, tokenizer = found.train, found.tokenizer
    model, variables = models.load(path, compute_dtype=resolve_dtype("auto"))
    config = Config(
        temperature=0,
        max_new_tokens=section.max_new_tokens,
        slots=section.batch_size,
        eos_ids=models.end_ids(model.config, tokenizer),
    )
    answer = make_answer(model, tokenizer, config)
    texts = answer(variables, [examples[i]["prompt_ids"].tolist() for i in range(len(examples))])
    return judge(texts, section.rules, [row.get("keywords") for row in rows])
