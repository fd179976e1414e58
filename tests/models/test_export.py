"""Exports by several processes: what one writes is what one alone would write, whoever is late."""

import json

from jaxalign import models
from tests.models import tiny
from tests.models.exporting import adapted
from tests.together import run_together


def test_a_process_that_is_late_finds_nothing_in_its_way(tmp_path):
    """What the first sees goes: a replicated model it could write before the second has looked."""
    base = tmp_path / "base"
    tiny.write_folder(base, tiny.CONFIGS["qwen2"])
    model, variables = adapted(base)
    models.save(tmp_path / "alone" / "export", model, variables, None, name="tiny")
    models.save_adapter(tmp_path / "alone" / "adapter", model.config, variables, base_model="tiny")
    expected = {path.relative_to(tmp_path / "alone"): path.read_bytes() for path in (tmp_path / "alone").rglob("*.*")}
    assert len(expected) >= 5
    outputs = run_together("tests.models.exporting", 2, base, tmp_path)
    refused = [
        f"{tmp_path / axis / 'export'} exists; choose another folder or set overwrite" for axis in ("data", "fsdp")
    ]
    for output in outputs:
        (line,) = (line for line in output.splitlines() if line.startswith("SEEN "))
        assert json.loads(line.removeprefix("SEEN ")) == refused
    for axis in ("data", "fsdp"):
        for name, content in expected.items():
            assert (tmp_path / axis / name).read_bytes() == content, (axis, name)
