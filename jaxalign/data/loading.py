"""A run's data, from their configuration to examples that may be trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from jaxalign.data.checks import Report, admit, check, check_steps
from jaxalign.data.examples import Examples, encode_rows, hold_out, take_apart
from jaxalign.data.filters import Removed, sift
from jaxalign.data.formats import DataConfig
from jaxalign.data.mixture import MixtureOrder, Share, join, part_config
from jaxalign.data.reading import read
from jaxalign.data.stream import Stream, open_stream
from jaxalign.data.tokenizer import prepare

Packing = Callable[[Mapping[str, np.ndarray]], Mapping[str, float]]


@dataclass(frozen=True)
class Data:
    """Everything a run needs of its data.

    Attributes:
      train: examples; from `load` the good ones, from `inspect` all. Of a stream, those of its beginning.
      eval: likewise, to evaluate on.
      report: what was found, for the user.
      tokenizer: with the chat template and EOS that were used; export this one.
      order: the order of training, where it is a mixture's; None for plain passes.
      removed: what filters took out of the training data, and from `load` also the bad rows that `drop` left out.
      stream: the training data, where they are streamed.
    """

    train: Examples
    eval: Examples | None
    report: Report
    tokenizer: PreTrainedTokenizerFast
    order: MixtureOrder | None = None
    removed: tuple[Removed, ...] = ()
    stream: Stream | None = None

    @property
    def epoch_size(self) -> int:
        """Training examples per epoch."""
        return len(self.train) if self.order is None else len(self.order)


def load(config: DataConfig, tokenizer: PreTrainedTokenizerFast, kind: str, packing: Packing | None = None) -> Data:
    """Reads, encodes, checks and filters the data; bad rows stop the run or are left out, as `config.on_bad` says.

    Args:
      config: what to read and how to encode it.
      tokenizer: left as it is; see `tokenizer.prepare`.
      kind: `sft`, `preference`, `ranking`, `stepwise`, `unpaired` or `prompt`.
      packing: measures of packing for the report, see `checks.check`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: bad rows, with file and line; wrong columns; nothing left, or of one part of a mixture; steps that are
        all right, or all wrong; options that cannot work.
    """
    data = inspect(config, tokenizer, kind, packing)
    evaluation = None if data.eval is None else admit(data.eval, config.on_bad, "evaluation")
    dropped = [Removed.of_problem(data.train, int(i)) for i in np.flatnonzero(data.train.bad)]
    train = admit(data.train, config.on_bad, "training")
    if kind == "stepwise" and data.stream is None:
        check_steps(train)
    return replace(data, train=train, eval=evaluation, removed=(*dropped, *data.removed))


def inspect(config: DataConfig, tokenizer: PreTrainedTokenizerFast, kind: str, packing: Packing | None = None) -> Data:
    """Like `load`, but keeps bad rows, whatever `config.on_bad` says: for a report on the data."""
    tokenizer = prepare(tokenizer, chat_template_path=config.chat_template_path, eos_token=config.eos_token)
    stream, evaluation = None, None
    if config.streaming:
        if kind == "unpaired":
            raise ValueError(
                "data.streaming: labels and the order of a batch must be known beforehand; set it to false"
            )
        held_out = _evaluation(config, tokenizer, kind)
        stream = open_stream(config, tokenizer, kind, held_out)
        train, evaluation = stream.sample(), held_out
    else:
        train = _training(config, tokenizer, kind)
        if config.eval_ratio is not None:
            train, evaluation = hold_out(train, config.eval_ratio, config.seed)
        else:
            evaluation = _evaluation(config, tokenizer, kind)
    if kind == "unpaired":  # after holding out: both completions of a pair stay on one side
        train, evaluation = take_apart(train), None if evaluation is None else take_apart(evaluation)
    sifted = sift(train, None if evaluation is None else evaluation.good(), config.filters, kind)
    order = None if stream is not None else _order(config, sifted.examples.good())
    report = check(sifted.examples, evaluation, packing)
    report = replace(report, filters=sifted.counts, parts=_shares(config, train, sifted.examples.good(), order))
    if stream is not None:
        report = replace(report, note=f"streamed: this is of its first {len(train)} rows")
    return Data(sifted.examples, evaluation, report, tokenizer, order, sifted.removed, stream)


def _training(config: DataConfig, tokenizer: PreTrainedTokenizerFast, kind: str) -> Examples:
    if not config.mixture:
        return encode_rows(read(config, kind), tokenizer, kind, config)
    parts = []
    for number, part in enumerate(config.mixture):
        try:
            rows = read(part_config(config, part), kind)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"data.mixture[{number}] ({part.title}): {error}") from error
        parts.append(encode_rows(rows, tokenizer, kind, config))
    return join(parts, [part.title for part in config.mixture])


def _evaluation(config: DataConfig, tokenizer: PreTrainedTokenizerFast, kind: str) -> Examples | None:
    if config.eval_path is None and config.eval_split is None:
        return None
    return encode_rows(read(config, kind, evaluation=True), tokenizer, kind, config)


def _order(config: DataConfig, good: Examples) -> MixtureOrder | None:
    """The order of a mixture; None for anything else, and where nothing can be used, which `admit` reports."""
    if not config.mixture or not len(good):
        return None
    sizes = np.bincount(good.part_of, minlength=len(config.mixture))
    for number, part in enumerate(config.mixture):
        if not sizes[number]:
            raise ValueError(
                f"data.mixture[{number}] ({part.title}): none of its examples can be used; "
                "`jaxalign data check` with this part alone as data.path says why"
            )
    weights = [part.weight for part in config.mixture if part.weight is not None]
    return MixtureOrder(
        good.part_of,
        weights or None,
        temperature=config.mixture_temperature,
        epoch=config.mixture_epoch,
        seed=config.seed,
        shuffle=config.shuffle,
    )


def _shares(config: DataConfig, found: Examples, good: Examples, order: MixtureOrder | None) -> dict[str, Share]:
    if not config.mixture:
        return {}
    rows, used = (np.bincount(each.part_of, minlength=len(config.mixture)) for each in (found, good))
    weights = [part.weight or 0.0 for part in config.mixture]
    shown = [float(share) for share in order.shares] if order else [weight / (sum(weights) or 1) for weight in weights]
    return {
        part.title: Share(int(rows[i]), int(used[i]), shown[i], order.counts[i] if order else None)
        for i, part in enumerate(config.mixture)
    }
