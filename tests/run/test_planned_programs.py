"""What a plan compiles is what a run dispatches: the same text, for the arrays that the run calls its programs with."""

import pytest

from jaxalign.config import parse_config
from jaxalign.methods import rollout
from jaxalign.planning import prepare_plan, programs
from jaxalign.planning.programs import stage_programs
from jaxalign.run import inputs, online, pick_stage, prepare
from jaxalign.run.stage import run_stage
from jaxalign.training import loop


class Caught(Exception):
    """A run was about to take its first step."""


@pytest.fixture
def dispatched(tmp_path, monkeypatch):
    """Stage -> the compiled texts of what the run calls up to its first step, by name."""

    def catch(stage):
        texts = {}

        def fit(state, frozen, step, source, *rest, **options):
            batch, _ = source.next(state)
            texts["train step"] = step.lower(state, frozen, batch).compile().as_text()
            raise Caught

        def watched(name, run):
            def called(*arguments):
                texts[name] = run.lower(*arguments).compile().as_text()
                return run(*arguments)

            return called

        draw, fields, reference = rollout.draw_programs, online.make_field_passes, inputs.make_reference_pass

        def drawing(model, config, mesh):
            decoding, generate = draw(model, config, mesh)
            return decoding, watched("rollout", generate)

        def passes(ready, functions):
            found = fields(ready, functions).items()
            return {name: (role, watched(f"{name} pass", run)) for name, (role, run) in found}

        with monkeypatch.context() as patched:
            patched.setattr(loop, "fit", fit)
            patched.setattr(rollout, "draw_programs", drawing)
            patched.setattr(online, "make_field_passes", passes)
            patched.setattr(inputs, "make_reference_pass", lambda ready: watched("reference pass", reference(ready)))
            with pytest.raises(Caught):
                run_stage(prepare(stage), tmp_path / "folder", say=lambda line: None)
        return texts

    return catch


def body(text):
    """Instructions without the source lines that they were traced from."""
    return [line.partition(", metadata=")[0] for line in text.splitlines() if line.startswith((" ", "ENTRY", "%"))]


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": {"data": 2, "fsdp": 4}},
        {"method": {"name": "sft"}, "lora": {"r": 4}, "mesh": {"data": 1, "fsdp": 2, "tensor": 4}},
        {
            "method": {"name": "grpo", "num_generations": 2, "max_completion_length": 8, "beta": 0.1},
            "rollout": {"rewards": [{"name": "regex", "options": {"pattern": "a"}}], "min_new_tokens": 8},
            "mesh": {"data": 2, "fsdp": 4},
        },
    ],
    ids=["preference", "sft-lora", "grpo"],
)
def test_the_programs_are_those_of_the_run(settings, changes, dispatched, monkeypatch):
    settings = {**settings, **changes}
    kind = settings["method"]["name"]
    columns = {"sft": {"columns": {"completion": "chosen"}}, "grpo": {"max_prompt_length": 64}}.get(kind, {})
    settings["data"] = {**settings["data"], **columns}
    monkeypatch.setattr(programs, "LOOKED_AT", 1)  # the batch that the run begins with
    stage = pick_stage(parse_config(settings), None)
    ready, notes = prepare_plan(stage)
    assert not any("no data" in note for note in notes)
    planned = {each.name: each for each in stage_programs(ready).programs}
    texts = dispatched(stage)
    assert texts.keys() == planned.keys() - {"decoding copy"}
    for name, text in texts.items():
        assert body(planned[name].compiled.as_text()) == body(text)
