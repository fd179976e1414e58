"""The command line: `jaxalign run`, `sample`, `eval`, `convert`, `data check`, `configs`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

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
console = Console()

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
    # A save that failed is raised by the run; Orbax would print it here once more, as a traceback.
    for name in ("concurrent.futures", "absl"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        app()
    except (ValueError, FileNotFoundError, FileExistsError, OSError, FloatingPointError) as error:
        if os.environ.get("JAXALIGN_TRACEBACK"):
            raise
        console.print(f"[bold red]error:[/] {_escape(_plain(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Start anew beside an existing run of that name.")] = False,
) -> None:
    """Train what CONFIG says; the same command continues a run that was stopped."""
    from jaxalign import run as runs

    _keep_compiled()
    loaded = _load(config, overrides)
    result = runs.run(loaded, fresh=fresh, say=_say, make_progress=_progress)
    for stage in result.stages:
        if stage.export is not None:
            _metrics_table(stage.name or "result", stage.metrics)
    if result.comparison is not None:
        _show_comparison(result.comparison, loaded.compare.samples)
    if result.stages and result.stages[-1].export is not None:
        _say(f"policy: {result.stages[-1].export}")
    if any(stage.reason == "terminated" for stage in result.stages):
        raise typer.Exit(143)


@app.command()
def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a GGUF file, a Hub name or a run's folder.")
    ],
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with a `prompt` column (JSON lines, Parquet, ...).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write JSON lines (prompt, completion) instead of printing.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message before a single prompt.")] = None,
    raw: Annotated[
        bool, typer.Option(help="Continue a single prompt as plain text, without the chat template.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many tokens; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the tokens that make up this probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Least probability of a token, relative to the best.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest completion in tokens.")] = 256,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends a completion; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts decoded together.")] = 16,
) -> None:
    """Draw completions from MODEL."""
    from jaxalign import evaluation, models, sampling
    from jaxalign.run import exported, resolve_dtype

    if (prompt is None) == (prompts is None):
        raise ValueError("give either --prompt TEXT or --prompts FILE")
    if system and (raw or prompts is not None):
        raise ValueError("--system goes with --prompt and a chat template; put system messages into the --prompts file")
    if raw and prompts is not None:
        raise ValueError("--raw goes with --prompt; strings in a --prompts file are continued as plain text anyway")
    _keep_compiled()
    model = exported(model)
    tokenizer = models.load_tokenizer(model)
    asked, ids = (
        _read_prompts(tokenizer, prompts) if prompts is not None else _one_prompt(tokenizer, prompt, system, raw)
    )
    loaded, variables = models.load(model, compute_dtype=resolve_dtype("auto"))
    settings = sampling.Config(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        max_new_tokens=max_new_tokens,
        eos_ids=models.end_ids(loaded.config, tokenizer),
        slots=batch_size,
    )
    answer = evaluation.make_answer(loaded, tokenizer, settings, seed=seed, stop=stop or ())
    texts = answer(variables, ids)
    if output is not None:
        rows = [{"prompt": each, "completion": text} for each, text in zip(asked, texts, strict=True)]
        output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        _say(f"{len(rows)} completions in {output}")
        return
    for each, text in zip(asked, texts, strict=True):
        if prompts is not None:
            console.print(evaluation.readable(each), style="bold", markup=False, highlight=False)
        console.print(text, markup=False, highlight=False)


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
    _metrics_table(model or "start", metrics)


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
    models.save(
        target, loaded, variables, models.load_tokenizer(path), dtype=dtype, base_model=source, overwrite=overwrite
    )
    _say(f"{target}: {loaded.config.family}, {dtype}")


@data_app.command("check")
def data_check(
    config: ConfigPath,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Stage of a config with several; all by default.")] = None,
) -> None:
    """Counts, lengths, packing, and every row that cannot be trained on, by file and line."""
    from jaxalign import data
    from jaxalign.run import check_data, pick_stage

    loaded = _load(config, overrides)
    bad = 0
    for name in [stage] if stage else [each.name for each in loaded.stages]:
        each = pick_stage(loaded, name)
        found, packing = check_data(each)
        _say(f"== {each.name or each.method_name}")
        for line in [*found.report.lines(), *(f"packing {name}: {value:.4g}" for name, value in packing.items())]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        for examples in (found.train, found.eval):
            problems = [] if examples is None else data.problems(examples)
            bad += len(problems)
            for problem in problems:
                console.print(str(problem), style="red", markup=False, highlight=False, soft_wrap=True)
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


def _read_prompts(tokenizer: Any, path: Path) -> tuple[list[Any], list[list[int]]]:
    from jaxalign import data

    examples = data.load(data.DataConfig(path=str(path)), tokenizer, "prompt").train
    numbers = range(len(examples))
    return [examples.row(i)["prompt"] for i in numbers], [examples[i]["prompt_ids"].tolist() for i in numbers]


def _one_prompt(tokenizer: Any, prompt: str | None, system: str | None, raw: bool) -> tuple[list[Any], list[list[int]]]:
    from jaxalign import data

    asked: Any = prompt
    if not raw and tokenizer.chat_template:
        asked = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
    encoded = data.encode(tokenizer, {"prompt": asked}, "prompt", data.DataConfig(path=""))
    return [asked], [encoded["prompt_ids"].tolist()]


def _load(path: Path, overrides: list[str] | None) -> Any:
    from jaxalign.config import load_config, shipped_configs

    known = shipped_configs()
    return load_config(known.get(str(path), path) if not path.is_file() else path, overrides or [])


def _say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


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


def _progress(num_steps: int, start: int, title: str) -> Any:
    from jaxalign.training.progress import progress_bar

    return progress_bar(num_steps, start, console, title)


def _metrics_table(title: str, metrics: dict[str, float]) -> None:
    table = Table("metric", title, box=None)
    for name, value in metrics.items():
        if isinstance(value, int | float):
            table.add_row(name, f"{value:.6g}")
    console.print(table)


def _show_comparison(comparison: Any, samples: int) -> None:
    before, after = comparison.before, comparison.after
    table = Table("held-out answers", "before", "after", title=f"{len(comparison.prompts)} prompts, greedy")
    for rule, share in before.rules.items():
        table.add_row(f"satisfy the rule `{rule}`", f"{share:.0%}", f"{after.rules[rule]:.0%}")
    if before.right is not None:
        table.add_row("mention what a right answer must", f"{before.right:.0%}", f"{after.right:.0%}")
    table.add_row("mean words", f"{before.mean_words:.1f}", f"{after.mean_words:.1f}")
    console.print(table)
    step = max(1, len(comparison.prompts) // max(samples, 1))
    shown = Table("prompt", "before", "after", show_lines=True)
    for i in list(range(0, len(comparison.prompts), step))[:samples]:
        texts = (comparison.prompts[i], before.answers[i], after.answers[i])
        shown.add_row(*map(_escape, texts))
    console.print(shown)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
