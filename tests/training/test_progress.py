"""The progress bar and the table of samples show what is known and nothing else."""

import io

from rich.console import Console

from jaxalign.training.progress import progress_bar, samples_table, shown


def test_numbers_that_are_absent_are_not_shown():
    assert shown({}) == ""
    assert shown({"loss": 0.12345, "other": 3.0}) == "loss 0.1235"
    full = {"device_memory_gib": 12.34, "mfu": 0.423, "tokens_per_second": 12345.6, "loss": 2.0}
    assert shown(full) == "loss 2.0000  tokens/s 12,346  MFU 42.3%  memory 12.3 GiB"
    assert shown({"process_memory_gib": 0.951}) == "process memory 1.0 GiB"


def test_the_bar_draws_steps_and_numbers():
    text = io.StringIO()
    with progress_bar(20, 5, Console(file=text, force_terminal=True, width=120)) as update:
        update(6, {"loss": 1.5})
    assert "6/20" in text.getvalue() and "loss 1.5000" in text.getvalue()


def test_samples_as_a_table():
    """Scores in columns of their names, a dash for none; markup in a text is text; long texts keep what is telling."""
    records = [
        {
            "prompt": "P" * 400 + " the end",
            "completion": "[bold]so[/bold] " + "w" * 700,
            "rewards": {"gsm8k": 1.0, "tone": None},
            "tokens": 12,
            "ended": True,
        },
        {"prompt": "on", "completion": "[/red]", "rewards": {"gsm8k": -0.123456}, "tokens": 64, "ended": False},
    ]
    text = io.StringIO()
    Console(file=text, width=240).print(samples_table(20, records))
    lines = text.getvalue().splitlines()
    assert "step 20" in lines[0]
    heading, first = lines[2], "".join(lines[4:])
    assert [cell.strip() for cell in heading.split("┃")[1:-1]] == ["prompt", "completion", "gsm8k", "tone", "tokens"]
    assert "the end" in first and first.count("P") == 300 - len(" the end") and "[bold]so[/bold]" in first
    assert first.count("w") == 600 - len("[bold]so[/bold] ")
    last = next(line for line in lines if "[/red]" in line)
    assert [cell.strip() for cell in last.split("│")[1:-1]] == ["on", "[/red]", "-0.1235", "-", "64 (cut)"]


def test_samples_that_nobody_scored():
    text = io.StringIO()
    Console(file=text, width=80).print(samples_table(4, [{"prompt": "a", "completion": "b"}]))
    heading = text.getvalue().splitlines()[2]
    assert [cell.strip() for cell in heading.split("┃")[1:-1]] == ["prompt", "completion"]
