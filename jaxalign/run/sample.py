"""`jaxalign sample`: completions of prompts, drawn, scored, and chosen among."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign import models, sampling
from jaxalign.files import write_text
from jaxalign.rewards.calling import ON_ERROR
from jaxalign.run import exported
from jaxalign.run.drawing import ends_of
from jaxalign.run.inputs import Say
from jaxalign.run.judges import Judge, describe_scores, judge, load_judges
from jaxalign.run.prepare import resolve_dtype
from jaxalign.run.prompts import Prompts, Row, check_room, one_prompt, read_prompts
from jaxalign.run.selection import SELECTIONS, Rules, select
from jaxalign.sharding import MeshConfig, decode_shards, make_mesh
from jaxalign.types import Samples

FINISH = ("length", "eos", "stop")  # by the numbers in `Samples.finish`


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      model: a Hugging Face folder, a GGUF file, a Hub name or a run's folder.
      prompt: one prompt, or else
      prompts: a file of them.
      system: a system message before a single prompt.
      raw: continue a single prompt as plain text.
      settings: how completions are drawn; `eos_ids` and `stop_sequences` come from the model and the next ones.
      stop_token_ids: tokens that end a completion besides the model's own.
      stop_sequences: texts whose tokens end a completion.
      stop: strings that end a completion, looked for after it was drawn.
      keep_stop: leave what ended a completion in the text.
      seed: of the draw.
      tensor: devices that hold one copy of the model together.
      scores: rewards, see `judges.load_judges`.
      weights: of them, or empty.
      timeout: seconds that reward functions may take.
      on_error: what to do when one fails, see `rewards.call_rewards`.
      select: a key of `SELECTIONS`.
      rules: which completions it may choose.
      output: the file that is written, or None.
    """

    model: str
    prompt: str | None = None
    prompts: Path | None = None
    system: str | None = None
    raw: bool = False
    settings: sampling.Config = field(default_factory=sampling.Config)
    stop_token_ids: tuple[int, ...] = ()
    stop_sequences: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    seed: int = 0
    tensor: int = 1
    scores: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    timeout: float = 600.0
    on_error: str = "raise"
    select: str = "all"
    rules: Rules = field(default_factory=Rules)
    output: Path | None = None

    def __post_init__(self):
        """Raises ValueError on options that do not go together; they are named."""
        n, how, by_file = self.settings.num_generations, self.select, self.prompts is not None
        if how not in SELECTIONS:
            raise ValueError(f"--select {how} is unknown; known: {', '.join(SELECTIONS)}")
        greedy = n > 1 and self.settings.temperature == 0
        checks = (
            ((self.prompt is None) == (self.prompts is None), "give either --prompt TEXT or --prompts FILE"),
            (
                self.system and (self.raw or by_file),
                "--system goes with --prompt and a chat template; put system messages into the --prompts file",
            ),
            (
                self.raw and by_file,
                "--raw goes with --prompt; strings in a --prompts file are continued as plain text anyway",
            ),
            ("" in self.stop, "--stop needs a text: an empty one would end every completion at once"),
            (greedy, f"--temperature 0 draws the same {n} times: leave --num-generations away, or raise --temperature"),
            (how != "all" and not self.scores, f"--select {how} chooses by score: give --score"),
            (how != "all" and self.output is None, f"--select {how} writes a data set: give --output"),
            (how == "pairs" and n < 2, "--select pairs needs --num-generations of at least 2"),
            (self.rules.min_score is not None and not self.scores, "--min-score needs --score"),
            (
                self.on_error not in ON_ERROR,
                f"--on-score-error {self.on_error} is unknown; known: {', '.join(ON_ERROR)}",
            ),
            (self.weights and not self.scores, "--score-weight needs --score"),
        )
        for wrong, message in checks:
            if wrong:
                raise ValueError(message)


def sample(request: Request, *, say: Say = lambda line: None) -> list[Row]:
    """Does what is asked for; whatever can be wrong with it is looked for before anything is drawn.

    Args:
      request: what.
      say: takes lines for the user.

    Returns:
      The rows, as they are in the output file: see `complete`, `judges.judge` and `selection.select`.

    Raises:
      FileNotFoundError: no such model, prompts or folder to write to.
      ValueError: bad input, named by file, line or option.
      RewardError: a reward function failed; with an output file, what was drawn is kept beside it.
    """
    if request.output is not None:
        _check_output(request.output)
    path = exported(request.model)
    tokenizer, config, settings = models.load_tokenizer(path), models.load_config(path), request.settings
    if not config.lm_head:
        raise ValueError(f"{request.model}: a reward model, which has no LM head to draw with; it goes with --score")
    prompts = (
        one_prompt(tokenizer, request.prompt, system=request.system, raw=request.raw)
        if request.prompt is not None
        else read_prompts(tokenizer, str(request.prompts))
    )
    check_room(prompts, config.max_position, settings.max_new_tokens)
    judges = load_judges(request.scores, request.weights, prompts, tokenizer, settings.max_new_tokens)
    mesh = _mesh(len(prompts.ids), request.tensor)
    names = ("--stop-token-id", "--stop-sequence")
    settings = replace(settings, **ends_of(config, tokenizer, request.stop_token_ids, request.stop_sequences, names))
    rows = complete(
        path, tokenizer, prompts, settings, seed=request.seed, stop=request.stop, keep_stop=request.keep_stop, mesh=mesh
    )
    if judges:
        rows = _score(request, judges, rows, prompts, mesh)
        for line in describe_scores(judges, rows, settings.num_generations):
            say(line)
    found = select(rows, settings.num_generations, request.select, request.rules, tokenizer)
    for reason, count in found.dropped.most_common():
        say(f"{count} {'completions' if request.select == 'all' else 'prompts'} left out: {reason}")
    cut = sum(row.get("finish") == "length" for row in found.rows)
    if cut and request.select == "best":
        say(f"{cut} of the chosen were cut at --max-new-tokens {settings.max_new_tokens}; --ended leaves such out")
    if request.output is not None:
        write_rows(request.output, found.rows)
    return list(found.rows)


def complete(
    path: str,
    tokenizer: Any,
    prompts: Prompts,
    settings: sampling.Config,
    *,
    seed: int = 0,
    stop: Sequence[str] = (),
    keep_stop: bool = False,
    mesh: Mesh | None = None,
) -> list[Row]:
    """Draws completions.

    Args:
      path: the policy.
      tokenizer: its tokenizer.
      prompts: what is completed; each is read once, whatever `settings.num_generations` says.
      settings: how.
      seed: of the draw.
      stop: strings that end a completion.
      keep_stop: leave what ended a completion in the text.
      mesh: over whose data axes prompts are split; None: one device.

    Returns:
      One row per completion, those of a prompt together. `prompt` and its other columns as they were, and, in their
      place where names are equal: `completion`, in the prompt's form, without special tokens and (see `keep_stop`) what
      ended it; `completion_ids`, EOS, stop sequence or the end of the stop string included; `logps` per token under the
      temperature alone; `log_mass` per token where something else changed the distribution too (then the token was
      drawn with log-prob `logps - log_mass`); `cumulative_logp`, the sum of `logps`; `finish`: `eos`, `stop` or
      `length`.
    """

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    model, variables = models.load(path, mesh=mesh, compute_dtype=resolve_dtype("auto"))
    drawn = sampling.sample_prompts(
        jax.jit(sampling.make_generate(model, settings, mesh)),
        sampling.make_decoding(model, mesh)(variables),
        prompts.ids,
        jax.random.key(seed, impl="threefry2x32"),
        num_generations=settings.num_generations,
        shards=1 if mesh is None else decode_shards(mesh),
    )
    drawn = sampling.truncate_samples(drawn, decode, stop)
    rows = []
    for number, known in enumerate(_known(drawn, settings)):
        row = prompts.rows[number // settings.num_generations]
        ids = known["completion_ids"]
        text = decode(ids if keep_stop else sampling.without_end(ids, settings))
        text = sampling.truncate_at(text, stop, keep=keep_stop)
        completion = text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        ours = {"prompt": row["prompt"], "completion": completion, **known}
        rows.append({**ours, **{name: value for name, value in row.items() if name not in ours}})
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as JSON lines; a kill leaves the old file or the new one."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def _check_output(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--output {path}: there is no folder {path.absolute().parent}")
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; give a file")


def _known(drawn: Samples, settings: sampling.Config) -> list[Row]:
    """What the sampler says of each completion."""
    changed = settings.temperature == 0 or any(
        getattr(settings, name) != getattr(sampling.Config, name)
        for name in ("top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens")
    )
    rows = []
    for number, length in enumerate(np.asarray(drawn.lengths)):
        logps = np.asarray(drawn.sampler_logps[number, :length])
        row = {"completion_ids": np.asarray(drawn.tokens[number, :length]).tolist(), "logps": _shortest(logps)}
        if changed:
            row["log_mass"] = _shortest(np.asarray(drawn.log_mass[number, :length]))
        row["cumulative_logp"] = round(float(logps.sum(dtype=np.float64)), 6)
        row["finish"] = FINISH[int(drawn.finish[number])]
        rows.append(row)
    return rows


def _shortest(values: np.ndarray) -> list[float]:
    """float32 as the shortest decimals that are read back as the same."""
    return [float(str(value)) for value in values]


def _score(
    request: Request, judges: Sequence[Judge], rows: list[Row], prompts: Prompts, mesh: Mesh | None
) -> list[Row]:
    try:
        return judge(judges, rows, prompts, mesh=mesh, timeout=request.timeout, on_error=request.on_error)
    except BaseException as error:
        if request.output is not None:  # drawing took its time
            kept = request.output.with_name(f"{request.output.stem}.unscored.jsonl")
            write_rows(kept, rows)
            error.add_note(f"what was drawn is kept in {kept}")
        raise


def _mesh(prompts: int, tensor: int) -> Mesh | None:
    """As many devices as have prompts to complete; None where that is one."""
    devices = jax.devices()
    if len(devices) % tensor:
        raise ValueError(f"--tensor {tensor} does not divide the {len(devices)} devices")
    size = tensor * min(len(devices) // tensor, prompts)
    return None if size == 1 else make_mesh(MeshConfig(tensor=tensor), devices[:size])
