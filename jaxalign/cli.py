"""The command line: `jaxalign run`, `sample`, `eval`, `plan`, `convert`, `data check`, `configs`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from jaxalign.display import console, metrics_table, progress, show_completions, show_samples
from jaxalign.display import say as _say
from jaxalign.plan_command import plan

# Heavy imports happen inside the commands, so that `--help` answers at once.

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Post-training for language models in JAX.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at data before training.")
configs_app = typer.Typer(no_args_is_help=True, help="Configs that come with jaxalign.")
app.add_typer(data_app, name="data")
app.add_typer(configs_app, name="configs")
app.command()(plan)

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a config that comes with jaxalign.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=value]...", help="Settings that replace the file's.")
]


def main() -> None:
    """Runs the command line; errors that a user can mend are one message, not a traceback."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises installing torch, which is not used
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    # A save that failed is raised by the run; Orbax and asyncio would print it here once more, as tracebacks.
    for name in ("concurrent.futures", "absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        app()
    except _expected() as error:
        if os.environ.get("JAXALIGN_TRACEBACK"):
            raise
        told = "\n".join([_plain(error), *getattr(error, "__notes__", ())])
        console.print(f"[bold red]error:[/] {escape(told)}", highlight=False, soft_wrap=True)
        _end(1)
    except Exception as error:
        _end(error=error)
        raise


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Start anew beside an existing run of that name.")] = False,
) -> None:
    """Train what CONFIG says; the same command continues a run that was stopped."""
    from jaxalign import run as runs
    from jaxalign.exchange import is_first
    from jaxalign.run.compare import comparison_tables
    from jaxalign.run.processes import SAVED, joined

    _keep_compiled()
    with joined():
        loaded = _load(config, overrides)
        if is_first():
            result = runs.run(loaded, fresh=fresh, say=_say, make_progress=progress, show=show_samples)
        else:  # what all have to say, the first one says
            logging.getLogger().setLevel(logging.ERROR)
            result = runs.run(loaded, fresh=fresh)
    if any(stage.reason == "terminated" for stage in result.stages):
        raise typer.Exit(SAVED)
    if not is_first():
        return
    for stage in result.stages:
        if stage.export is not None:
            metrics_table(stage.name or "result", stage.metrics)
    if result.comparison is not None:
        for table in comparison_tables(result.comparison, loaded.compare.samples):
            console.print(table)
    if result.stages and result.stages[-1].export is not None:
        _say(f"policy: {result.stages[-1].export}")


@app.command()
def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a GGUF file, a Hub name or a run's folder.")
    ],
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with a `prompt` column (JSON lines, Parquet, ...); others are kept.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write JSON lines instead of printing.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before a single prompt.")] = None,
    raw: Annotated[
        bool, typer.Option(help="Continue a single prompt as plain text, without the chat template.")
    ] = False,
    num_generations: Annotated[int, typer.Option(help="Completions per prompt; it is read once for all.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many tokens; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the tokens that make up this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Least probability of a token, relative to the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Against tokens that were there before; 1 = off.")] = 1.0,
    min_new_tokens: Annotated[int, typer.Option(help="Tokens before a completion may end by EOS.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion in tokens.")] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A string that ends a completion, cut off after the draw; may be given several times."),
    ] = None,
    stop_sequence: Annotated[
        list[str] | None, typer.Option(help="A text whose tokens end a completion at once; several times, too.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="A token that ends a completion as EOS does; several times, too.")
    ] = None,
    keep_stop: Annotated[bool, typer.Option("--keep-stop", help="Leave what ended it in the text.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    slots: Annotated[
        int, typer.Option(help="Completions drawn at the same time; one that ends makes room for the next.")
    ] = 16,
    tensor: Annotated[int, typer.Option(help="Devices that hold one copy of the model together.")] = 1,
    score: Annotated[
        list[str] | None,
        typer.Option(
            help="A reward: a name (gsm8k), an import path (file.py:function), either with options "
            '(regex:{"pattern": "yes"}), or a reward model\'s folder; may be given several times.'
        ),
    ] = None,
    score_weight: Annotated[list[float] | None, typer.Option(help="Of each --score, in order; 1 by default.")] = None,
    score_timeout: Annotated[float, typer.Option(help="Seconds that reward functions may take.")] = 600.0,
    on_score_error: Annotated[str, typer.Option(help="raise, or none: no score where a function fails.")] = "raise",
    select: Annotated[
        str,
        typer.Option(help="all; best: rows for SFT, each prompt's best; pairs: preferences, its best and its worst."),
    ] = "all",
    min_score: Annotated[float | None, typer.Option(help="Leave out what has no score of at least this.")] = None,
    ended: Annotated[bool, typer.Option("--ended", help="Leave out what was cut at --max-new-tokens.")] = False,
) -> None:
    """Draw completions from MODEL, score them, and make data sets of the best."""
    from jaxalign import sampling
    from jaxalign.run import sample as runs
    from jaxalign.run.selection import Rules

    _keep_compiled()
    settings = sampling.Config(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        min_new_tokens=min_new_tokens,
        max_new_tokens=max_new_tokens,
        num_generations=num_generations,
        slots=slots,
    )
    request = runs.Request(
        model=model,
        prompt=prompt,
        prompts=prompts,
        system=system,
        raw=raw,
        settings=settings,
        stop=tuple(stop or ()),
        stop_sequences=tuple(stop_sequence or ()),
        stop_token_ids=tuple(stop_token_id or ()),
        keep_stop=keep_stop,
        seed=seed,
        tensor=tensor,
        scores=tuple(score or ()),
        weights=tuple(score_weight or ()),
        timeout=score_timeout,
        on_error=on_score_error,
        select=select,
        rules=Rules(min_score, ended),
        output=output,
    )
    rows = runs.sample(request, say=_say)
    if output is not None:
        _say(f"{len(rows)} rows in {output}")
        return
    show_completions(rows)


@app.command("eval")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Stage of a config with several; the first by default.")] = None,
    model: Annotated[str | None, typer.Option(help="Judge this model instead of the stage's own start.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the metrics to this JSON file too.")] = None,
) -> None:
    """Losses and metrics of a stage's method on its evaluation data (else its training data)."""
    from jaxalign.run import evaluate_stage, exported, pick_stage

    _keep_compiled()
    metrics = evaluate_stage(
        pick_stage(_load(config, overrides), stage, trained=True), model and exported(model), say=_say
    )
    if output is not None:
        output.write_text(json.dumps(metrics, indent=1) + "\n")
    metrics_table(model or "start", metrics)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder, a GGUF file, a Hub name or a run's folder.")],
    target: Annotated[Path, typer.Argument(help="The Hugging Face folder to write.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing folder.")] = False,
) -> None:
    """Write any model that jaxalign reads as a Hugging Face folder."""
    from jaxalign import models
    from jaxalign.run import exported

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype}: known are float32, bfloat16, float16")
    path = exported(source)
    loaded, variables = models.load(path)
    origin = models.origin_of(path)
    models.save(
        target,
        loaded,
        variables,
        models.load_tokenizer(path),
        dtype=dtype,
        base_model=origin.base_model,
        licence=origin.licence,
        overwrite=overwrite,
    )
    _say(f"{target}: {loaded.config.family}, {dtype}")


@data_app.command("check")
def data_check(
    config: ConfigPath,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Stage of a config with several; all by default.")] = None,
    removed: Annotated[Path | None, typer.Option(help="Write what filters take out here, as JSON lines.")] = None,
) -> None:
    """Counts, lengths, packing, and every row that cannot be trained on, by file and line."""
    from jaxalign import data
    from jaxalign.run import check_data, pick_stage, write_removed

    loaded = _load(config, overrides)
    bad, taken_out = 0, []
    for name in [stage] if stage else [each.name for each in loaded.stages]:
        each = pick_stage(loaded, name)
        found, packing = check_data(each)
        taken_out += found.removed
        _say(f"== {each.name or each.method_name}")
        lines = found.report.lines(problems=False, histograms=True)  # every problem follows
        for line in [*lines, *(f"packing {what}: {value:.4g}" for what, value in packing.items())]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for examples in (found.train, found.eval):
            problems = [] if examples is None else data.problems(examples)
            bad += len(problems)
            for problem in problems:
                console.print(str(problem), style="red", markup=False, highlight=False, soft_wrap=True)
    if removed is not None:
        write_removed(removed, taken_out)
        _say(f"{len(taken_out)} rows that filters take out are in {removed}")
    if bad:
        _say(f"{bad} rows cannot be trained on; data.on_bad=drop leaves them out")
        raise typer.Exit(1)
    _say("every row can be trained on")


@configs_app.command("list")
def configs_list() -> None:
    """Name and purpose of every config that comes with jaxalign."""
    from jaxalign.config import shipped_configs

    table = Table("config", "what it does", box=None)
    for name, path in shipped_configs().items():
        table.add_row(name, path.read_text().splitlines()[0].lstrip("# "))
    console.print(table)


@configs_app.command("copy")
def configs_copy(name: str, target: Annotated[Path, typer.Argument(help="A file or folder.")] = Path()) -> None:
    """Copy a config, to change it."""
    from jaxalign.config import shipped_configs

    known = shipped_configs()
    if name not in known:
        raise ValueError(f"{name}: no such config; known: {', '.join(known)}")
    where = target / known[name].name if target.is_dir() else target
    if where.exists():
        raise FileExistsError(f"{where} exists")
    shutil.copyfile(known[name], where)
    _say(f"{where}")


def _load(path: Path, overrides: list[str] | None) -> Any:
    from jaxalign.config import load_config, shipped_configs

    known = shipped_configs()
    return load_config(known.get(str(path), path) if not path.is_file() else path, overrides or [])


def _expected() -> tuple[type[Exception], ...]:
    """Errors that a user can mend; called only when there is one."""
    from jaxalign.methods.online import NoSignalError
    from jaxalign.rewards import RewardError, SandboxError

    return (ValueError, OSError, FloatingPointError, RewardError, SandboxError, NoSignalError)


def _end(code: int | None = None, error: Exception | None = None) -> None:
    """Ends the process where it is one of several, or where there is a code."""
    from jaxalign.run.processes import end

    end(code, error)


def _plain(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _keep_compiled() -> None:
    """Compiled programs are kept between runs, unless the user says where or that they are not."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxalign" / "xla"
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))
