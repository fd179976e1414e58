"""The sections of a run's config, as frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxalign.data import DataConfig
from jaxalign.models.attention import Attention
from jaxalign.models.config import LoraConfig
from jaxalign.models.export import ExportDType
from jaxalign.models.quantized import Quantization
from jaxalign.models.remat import Remat
from jaxalign.sharding import MeshConfig
from jaxalign.training import optimizer


@dataclass(frozen=True)
class ModelSection:
    """The policy.

    Attributes:
      path: a Hugging Face folder, a GGUF file, a Hub name, or `<stage>.policy` (of a reward model: `<stage>.reward`) of
        an earlier stage.
      reference: where the reference comes from; the policy's own start by default.
      reference_cache: folder for log-probs that `precompute_ref_log_probs` computes, shared between runs; None =
        `jaxalign/reference` in `XDG_CACHE_HOME` (`~/.cache`).
      critic: what the critic of `ppo` begins as: a reward model, a language model, or `<stage>.critic` of an earlier
        stage; the policy's own start by default.
      param_dtype: dtype of the parameters.
      compute_dtype: dtype of activations and matrix products; `auto` is bfloat16 on GPU and TPU, float32 on CPU.
      remat: what the backward pass recomputes: `none`; `full`, whole blocks; all but the output of `attention`, of
        matrix products (`dots`), or of both (`dots_attention`). `offload` is `attention` with that and block inputs in
        the host's memory, `dots_offload` is `dots` with those there; on GPU and TPU.
      attention: by what rows attend to themselves: `splash` (TPU), `cudnn` (GPU), `xla`, or `auto`: the first of these
        that can serve, see docs/scale.md.
      offload_reference: keep the reference in the host's memory between its passes; offline methods on GPU and TPU.
      quantization: keep the blocks' projections in 8 (`int8`) or 4 bits (`nf4`); they cannot train then.
      long_context: of a model with `longrope`, take the long factors and their context, for every text.
      trainable: what trains: patterns of tensor names in the checkpoint, see `models.freeze`; None = everything, or the
        adapter where there is one. A score head always does.
    """

    path: str
    reference: str | None = None
    reference_cache: str | None = None
    critic: str | None = None
    param_dtype: ExportDType = "float32"
    compute_dtype: Literal["auto"] | ExportDType = "auto"
    remat: Remat = "full"
    attention: Literal["auto"] | Attention = "auto"
    offload_reference: bool = False
    quantization: Quantization | None = None
    long_context: bool = False
    trainable: tuple[str, ...] | None = None

    def __post_init__(self):
        """Raises ValueError on patterns that leave nothing to train."""
        if self.trainable is not None and not self.trainable:
            raise ValueError("trainable: at least one pattern; null trains everything")


@dataclass(frozen=True)
class LoraSection(LoraConfig):
    """An adapter beside frozen weights; where the section is there, it is what trains.

    Attributes:
      path: a PEFT adapter's folder to go on from; rank, alpha and targets are then its own.
    """

    path: str | None = None


@dataclass(frozen=True)
class TrainSection:
    """How long and in which portions.

    Attributes:
      batch_size: examples per optimiser step, over all devices.
      micro_batch_size: examples per forward and backward pass, over all devices; `batch_size` by default.
      num_train_epochs: passes over the data.
      max_steps: if positive, the number of optimiser steps instead.
      row_length: tokens per packed row; `auto` picks the length that wastes least (`wrapped`: `data.max_length`).
      packing_strategy: `bfd` keeps examples whole and apart, the longest placed first; `wrapped`, of `sft`, puts all
        documents end to end and cuts rows of exactly `row_length`, which are what `batch_size` then counts.
      seed: of the run's key.
      eval_steps: evaluate every so many steps; None = at the end of each epoch. Needs evaluation data.
      eval_on_start: evaluate before the first step.
      save_steps: checkpoint every so many steps; the last step is always kept.
      save_total_limit: checkpoints kept beside the best one.
      metric_for_best_model: evaluation metric that picks the best checkpoint, which is kept; None = `eval_loss`, of
        online methods `eval_reward`.
      greater_is_better: None = unless the metric's name ends in `loss`.
      load_best_model_at_end: export the best checkpoint instead of the last; always so after early stopping.
      early_stopping_patience: stop after so many evaluations in a row without improvement.
      early_stopping_threshold: what counts as an improvement.
      prefetch: batches prepared ahead.
    """

    batch_size: int = 8
    micro_batch_size: int | None = None
    num_train_epochs: float = 3.0
    max_steps: int = -1
    row_length: int | Literal["auto"] = "auto"
    packing_strategy: Literal["bfd", "wrapped"] = "bfd"
    seed: int = 42
    eval_steps: int | None = None
    eval_on_start: bool = False
    save_steps: int = 500
    save_total_limit: int = 2
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    load_best_model_at_end: bool = False
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    prefetch: int = 2

    def __post_init__(self):
        """Raises ValueError on portions that do not divide."""
        if self.batch_size < 1 or self.num_train_epochs <= 0:
            raise ValueError("train.batch_size and train.num_train_epochs must be positive")
        micro = self.micro_batch_size
        if micro is not None and (micro < 1 or self.batch_size % micro):
            raise ValueError(f"train.micro_batch_size={micro} must divide train.batch_size={self.batch_size}")
        least = {"save_steps": 1, "save_total_limit": 1, "prefetch": 0, "eval_steps": 1, "early_stopping_patience": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"train.{name}={value} must be at least {bound}")


@dataclass(frozen=True)
class LogSection:
    """What is written down.

    Attributes:
      logging_steps: steps between two lines of metrics.jsonl; metrics are means over these steps.
      report_to: further writers: `tensorboard`, `wandb`.
      sample_steps: write sample answers to samples.jsonl every so many steps; None = never.
      sample_prompts: how many prompts of the evaluation data (else of the training data).
      sample_max_new_tokens: longest sample answer; online methods show completions of their rollouts as they are.
    """

    logging_steps: int = 10
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    sample_steps: int | None = None
    sample_prompts: int = 3
    sample_max_new_tokens: int = 64

    def __post_init__(self):
        """Raises ValueError on numbers that ask for nothing."""
        for name in ("logging_steps", "sample_steps", "sample_prompts", "sample_max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"log.{name}={value} must be at least 1")


@dataclass(frozen=True)
class RewardSection:
    """One reward of a rollout: a function or a reward model.

    Attributes:
      name: key in `REWARD_FUNCTIONS`, `package.module:function` or `path/to/file.py:function`, from the folder
        that the run is started in.
      model: a Hugging Face folder with a score head, or `<stage>.reward` of an earlier stage, instead of a function.
      weight: of this reward in the sum.
      options: hyper-parameters of the function.
    """

    name: str | None = None
    model: str | None = None
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        """Raises ValueError on a reward that is neither or both."""
        if (self.name is None) == (self.model is None):
            raise ValueError("a reward has either `name` (a function) or `model`")
        if self.model is not None and self.options:
            raise ValueError("options are for functions: a reward model takes none")


@dataclass(frozen=True)
class RolloutSection:
    """How completions are drawn and scored, for methods that learn from their own.

    Temperature, completions per prompt and the longest completion belong to the method (`method.temperature`,
    `method.num_generations`, `method.max_completion_length`): its loss needs them too.

    Attributes:
      rewards: at least one, each as `RewardSection`.
      top_k: how many of the most probable tokens may be drawn; 0 = all.
      top_p: share of the probability that the most probable tokens must reach; 1 = all.
      min_p: least probability of a token, as a share of the most probable one's; 0 = all.
      repetition_penalty: against tokens that were there before; 1 = off.
      min_new_tokens: tokens drawn before a completion may end.
      stop: strings that end a completion, looked for after it was drawn.
      stop_token_ids: tokens that end a completion at once, as the model's EOS does.
      stop_sequences: texts, tokenised as they stand, or lists of token ids that end a completion at once.
      slots: completions drawn at the same time, over all devices; None = all.
      refill: how many slots must be free before they take new completions; None = a quarter of them.
      cache_dtype: of cached keys and values; None = that of computation.
      reward_timeout: seconds that the reward functions may take for a rollout; those that end their own work in time,
        as `python_tests`, have as many as that may take.
      on_reward_error: `raise`, or `none`: what a reward function fails at gets no score.
      eval_prompts: how many prompts of the evaluation data are answered; None = all.
      mesh: sizes of the mesh that completions are drawn on, over the same devices; None = the stage's `mesh`.
    """

    rewards: tuple[RewardSection, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_sequences: tuple[str | tuple[int, ...], ...] = ()
    slots: int | None = None
    refill: int | None = None
    cache_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    reward_timeout: float = 60.0
    on_reward_error: Literal["raise", "none"] = "raise"
    eval_prompts: int | None = None
    mesh: MeshConfig | None = None

    def __post_init__(self):
        """Raises ValueError on what asks for nothing; the rest is checked where the sampler's config is made."""
        if "" in self.stop:
            raise ValueError("rollout.stop: a stop string is empty; it would cut every completion to nothing")
        if self.reward_timeout <= 0:
            raise ValueError(f"rollout.reward_timeout={self.reward_timeout} must be above 0 seconds")
        if self.eval_prompts is not None and self.eval_prompts < 1:
            raise ValueError(f"rollout.eval_prompts={self.eval_prompts} must be at least 1; null takes all")


@dataclass(frozen=True)
class ExportSection:
    """The Hugging Face folder at the end of a stage.

    Attributes:
      dtype: dtype of the exported tensors; None = that of the parameters.
      critic: write the critic of `ppo` too, as a reward model's folder `critic` beside the export; a later stage names
        it `<stage>.critic`.
    """

    dtype: ExportDType | None = None
    critic: bool = False


@dataclass(frozen=True)
class CompareSection:
    """A before/after comparison at the end of the run, from greedy answers to held-out prompts.

    Attributes:
      path: prompts; a `keywords` column (groups of words of which one each must occur) marks answers as right.
      rules: names in `evaluation.RULES`; the share of answers that satisfy each is printed.
      max_new_tokens: longest answer.
      batch_size: prompts decoded together.
      samples: answers shown side by side.
    """

    path: str
    rules: tuple[str, ...] = ()
    max_new_tokens: int = 128
    batch_size: int = 16
    samples: int = 3


@dataclass(frozen=True)
class Stage:
    """One training stage, resolved.

    Attributes:
      name: `sft`, `dpo`, ...; empty for a run of one stage.
      model: the policy.
      data: the examples.
      method_name: key in `METHODS`.
      method: that method's Config.
      rollout: sampling and rewards, of online methods.
      optimizer: the optimiser.
      mesh: the devices.
      train: steps and portions.
      log: what is written.
      export: the result.
      lora: the adapter, or None.
      ptx_data: supervised examples that `ppo` mixes in, or None.
    """

    name: str
    model: ModelSection
    data: DataConfig
    method_name: str
    method: Any
    rollout: RolloutSection
    optimizer: optimizer.Config
    mesh: MeshConfig
    train: TrainSection
    log: LogSection
    export: ExportSection
    lora: LoraSection | None = None
    ptx_data: DataConfig | None = None

    def __post_init__(self):
        """Raises ValueError where supervised examples and their weight do not go together."""
        weight, where = getattr(self.method, "ptx_coef", None), f"stages.{self.name}." if self.name else ""
        if self.ptx_data is None and weight:
            raise ValueError(f"{where}method.ptx_coef={weight} needs supervised examples: give the section ptx_data")
        if self.ptx_data is not None and weight is None:
            raise ValueError(f"{where}ptx_data: {self.method_name} mixes no supervised examples in; leave it away")
        if self.ptx_data is not None and not weight:
            raise ValueError(f"{where}ptx_data: method.ptx_coef is 0, so nothing is learned from it; set that above 0")


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Attributes:
      name: the run's folder is `runs_dir/name`.
      runs_dir: where runs lie.
      stages: in order.
      compare: the comparison at the end, or None.
      resolved: the plain data that this was made from, defaults filled in: what config.yaml keeps.
    """

    name: str
    runs_dir: str
    stages: tuple[Stage, ...]
    compare: CompareSection | None
    resolved: dict[str, Any] = field(compare=False)
