"""A rollout on the host: drawing completions, packing them, and what a packed pass says about each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxalign import sampling
from jaxalign.methods.offline import Layout
from jaxalign.models import Model
from jaxalign.packing import Document, build, pieces_of, plan
from jaxalign.placing import share_out
from jaxalign.sampling.choose import Config as SamplingConfig
from jaxalign.sharding import Mesh, decode_shards, place_batch, process_count, replicated
from jaxalign.types import Array, Batch, Experience, Max, Mean, Metrics, Min, Predictions, PyTree, Samples, Variables

# (params, batch on the mesh) -> float32 [micro, rows, predictions]
Pass = Callable[[PyTree, Batch], Array]
Draw = Callable[[Variables, Sequence[np.ndarray], jax.Array], Samples]
Decode = Callable[[Sequence[int]], str]


def make_draw(
    model: Model,
    config: SamplingConfig,
    mesh: Mesh,
    *,
    width: int,
    stops: Sequence[str] = (),
    decode: Decode | None = None,
) -> Draw:
    """`(variables, prompts, key) -> Samples`: completions of all prompts, drawn by one compiled loop.

    Args:
      model: the model.
      config: how they are drawn.
      mesh: where; it may have other sizes than the mesh that the variables lie on (`sharding.remesh`).
      width: tokens of the longest prompt there can be; always padded to, so that one program serves every rollout.
      stops: strings that end a completion; they are looked for after the loop.
      decode: token ids as text; needed with `stops`.
    """
    shards = decode_shards(mesh)
    decoding, generate = draw_programs(model, config, mesh)

    def draw(variables: Variables, prompts: Sequence[np.ndarray], key: jax.Array) -> Samples:
        padded, lengths = pad_prompts(prompts, width, shards)
        drawn = jax.device_get(generate(decoding(variables), padded, lengths, key))
        samples = sampling.first_samples(drawn, len(prompts) * config.num_generations)
        return samples if decode is None else sampling.truncate_samples(samples, decode, stops)

    return draw


def padded_width(longest: int) -> int:
    """Tokens that prompts are padded to where the longest has so many: one shape serves a whole run, so a tight one."""
    return -(-longest // 16) * 16


def pad_prompts(prompts: Sequence[np.ndarray], width: int, shards: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 `[rows, width]` and their lengths `[rows]`; rows are a multiple of the shards."""
    rows = -(-len(prompts) // shards) * shards
    padded, lengths = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    return padded, lengths


def draw_programs(model: Model, config: SamplingConfig, mesh: Mesh) -> tuple[Any, Any]:
    """The jitted programs of a rollout: variables -> those that decoding takes, and the sampler."""
    several = mesh if mesh.size > 1 else None
    # Every process packs from the whole rollout.
    whole = replicated(mesh) if process_count(mesh) > 1 else None
    generate = jax.jit(sampling.make_generate(model, config, several), out_shardings=whole)
    return sampling.make_decoding(model, several), generate


def to_experience(
    prompts: Sequence[np.ndarray], examples: np.ndarray, samples: Samples, width: int, rewards: int
) -> Experience:
    """A rollout of these samples, not scored yet: all scores are NaN."""
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    fields = {"sampler_logps": np.asarray(samples.sampler_logps), "log_mass": np.asarray(samples.log_mass)}
    return Experience(
        prompts=padded,
        prompt_lengths=np.array([len(prompt) for prompt in prompts], np.int32),
        examples=np.asarray(examples, np.int64),
        tokens=np.asarray(samples.tokens),
        lengths=np.asarray(samples.lengths),
        finish=np.asarray(samples.finish),
        scores=np.full((len(samples.lengths), rewards), np.nan),
        fields=fields,
    )


def select(experience: Experience, prompts: np.ndarray) -> Experience:
    """The groups of some prompts, by number."""
    size = experience.num_generations
    members = (np.asarray(prompts)[:, None] * size + np.arange(size)[None]).reshape(-1)
    per_prompt = {name: getattr(experience, name)[prompts] for name in ("prompts", "prompt_lengths", "examples")}
    names = ("tokens", "lengths", "finish", "scores")
    fields = {name: values[members] for name, values in experience.fields.items()}
    return Experience(**per_prompt, **{name: getattr(experience, name)[members] for name in names}, fields=fields)


def choose_completions(experience: Experience, which: np.ndarray) -> Experience:
    """Some completions of every prompt: int `[prompts, k]`, their places in the group."""
    members = (np.arange(len(experience.prompts))[:, None] * experience.num_generations + which).reshape(-1)
    names = ("tokens", "lengths", "finish", "scores")
    fields = {name: values[members] for name, values in experience.fields.items()}
    return replace(experience, **{name: getattr(experience, name)[members] for name in names}, fields=fields)


def join(parts: Sequence[Experience]) -> Experience:
    """Several rollouts as one."""
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def document(experience: Experience, prompt: int, fields: Sequence[str]) -> Document:
    """A prompt as trunk, its completions as branches, with fields per token."""
    size = experience.num_generations
    members, lengths = range(prompt * size, (prompt + 1) * size), experience.lengths
    return Document(
        trunk=experience.prompts[prompt, : experience.prompt_lengths[prompt]],
        branches=tuple(experience.tokens[c, : lengths[c]] for c in members),
        fields={name: tuple(experience.fields[name][c, : lengths[c]] for c in members) for name in fields},
    )


def row_length(width: int, steps: int, completions: int, *, share_prompt: bool, multiple: int) -> int:
    """Tokens of the longest document that a rollout can hold (a completion with its own prompt, if unshared)."""
    longest = width + (completions if share_prompt else 1) * max(steps - 1, 0)
    return -(-longest // multiple) * multiple


def pack_prompts(
    experience: Experience,
    prompts: Sequence[int] | np.ndarray,
    layout: Layout,
    *,
    share_prompt: bool = True,
    fields: Sequence[str] = (),
    supervised: Sequence[Document] = (),
) -> Batch:
    """Packs the groups of some prompts; the micro-batches are as many as `layout.batch_size` has.

    Prompts are shared out between them by tokens, see `prompts_by_place`; supervised documents by their number, behind
    the prompts. Predictions per row are rounded up to an eighth of the most there can be, since every shape compiles
    anew.
    """
    order = prompts_by_place(experience, prompts, layout, share_prompt=share_prompt)
    return _pack(experience, order, layout, share_prompt=share_prompt, fields=fields, supervised=supervised)


def _pack(
    experience: Experience,
    order: np.ndarray,
    layout: Layout,
    *,
    share_prompt: bool,
    fields: Sequence[str] = (),
    supervised: Sequence[Document] = (),
) -> Batch:
    """`pack_prompts` of prompts that have their places, see `prompts_by_place`."""
    micro, size = layout.micro_batch_size, experience.num_generations
    micro_batches = _micro_batches(layout)
    extra = -(-len(supervised) // micro_batches)
    places = micro + extra
    taken = [(i, int(prompt)) for i, prompt in enumerate(order) if prompt >= 0]
    documents = {i // micro * places + i % micro: document(experience, prompt, fields) for i, prompt in taken}
    documents |= {i // extra * places + micro + i % extra: each for i, each in enumerate(supervised)}
    planned = plan(
        [pieces_of(documents[i], share_prompt) if i in documents else [] for i in range(max(documents) + 1)],
        micro_batches=micro_batches,
        micro_batch_size=places,
        length=layout.length,
        shards=layout.shards,
        processes=layout.processes,
        predictions_multiple=max(32, -(-layout.length // 8 // 32) * 32),
    )
    return build(planned, documents, micro_batch_size=places, completions=size, process=layout.process)


def prompts_by_place(
    experience: Experience, prompts: Sequence[int] | np.ndarray, layout: Layout, *, share_prompt: bool
) -> np.ndarray:
    """int `[micro-batches * micro_batch_size]`, the prompt at each place of a batch; -1 = none.

    Every micro-batch takes as many rows as the one that needs most, so tokens are shared out evenly (`share_out`).
    """
    pieces = [pieces_of(document(experience, int(prompt), ()), share_prompt) for prompt in prompts]
    order = np.full(_micro_batches(layout) * layout.micro_batch_size, -1)
    order[share_out(pieces, _micro_batches(layout), layout.micro_batch_size)] = prompts
    return order


def _micro_batches(layout: Layout) -> int:
    return -(-layout.batch_size // layout.micro_batch_size)


def run_passes(
    experience: Experience,
    passes: Mapping[str, Pass],
    params: PyTree,
    layout: Layout,
    mesh: Mesh,
    *,
    share_prompt: bool = True,
) -> Experience:
    """Adds to every token what packed passes say of it, for example `ref_logps`."""
    if not passes:
        return experience
    found = {name: np.zeros(experience.tokens.shape, np.float32) for name in passes}
    total = len(experience.prompts)
    for start in range(0, total, layout.batch_size):
        members = np.arange(start, min(start + layout.batch_size, total))
        order = prompts_by_place(experience, members, layout, share_prompt=share_prompt)
        host = _pack(experience, order, layout, share_prompt=share_prompt)
        batch, predictions = place_batch(mesh, host), host.predictions
        if layout.processes > 1:
            predictions = multihost_utils.process_allgather(batch.predictions, tiled=True)
        for name, run in passes.items():
            values = run(params, batch)
            if layout.processes > 1:
                values = multihost_utils.process_allgather(values, tiled=True)
            _scatter(found[name], np.asarray(values), predictions, order, experience.num_generations)
    return replace(experience, fields={**experience.fields, **found})


def rollout_metrics(experience: Experience) -> Metrics:
    """How long a rollout's completions are, under TRL's names, and its prompts, under verl's."""
    lengths, ended = experience.lengths.astype(np.float64), experience.finish > 0
    metrics: dict[str, Any] = {
        **spread("completions/{}_length", lengths),
        **spread("prompt_length/{}", experience.prompt_lengths.astype(np.float64)),
        "completions/clipped_ratio": Mean(float((~ended).sum()), float(len(ended))),
    }
    if ended.any():
        metrics |= spread("completions/{}_terminated_length", lengths[ended])
    return metrics


def reward_metrics(names: Sequence[str], experience: Experience) -> dict[str, Any]:
    """Mean and standard deviation of each reward, under TRL's names; absent where nothing was scored."""
    metrics: dict[str, Any] = {}
    for name, scores in zip(names, experience.scores.T, strict=True):
        known = scores[~np.isnan(scores)]
        if len(known):
            metrics[f"rewards/{name}/mean"] = Mean(float(known.sum()), float(len(known)))
        if len(known) > 1:
            metrics[f"rewards/{name}/std"] = Mean(float(known.std(ddof=1)), 1.0)
    return metrics


def spread(name: str, values: np.ndarray) -> Metrics:
    """Mean, least and greatest of values, under `name` with its braces filled in."""
    return {
        name.format("mean"): Mean(float(values.sum()), float(len(values))),
        name.format("min"): Min(float(values.min())),
        name.format("max"): Max(float(values.max())),
    }


def _scatter(target: np.ndarray, values: np.ndarray, predictions: Predictions, order: np.ndarray, size: int) -> None:
    """Writes `[micro, rows, predictions]` into `[completions, steps]`, in place; `order` by `prompts_by_place`."""
    completions, steps = np.asarray(predictions.completions), np.asarray(predictions.steps)
    for prompts, numbers, own, found in zip(order.reshape(len(values), -1), completions, steps, values, strict=True):
        real = numbers >= 0
        target[prompts[numbers[real] // size] * size + numbers[real] % size, own[real]] = found[real]
