"""What parity tests with TRL's own trainers share: the older TRL beside the installed one, and quiet settings."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(os.environ.get("JAXALIGN_TRL_PPO") or Path(__file__).parents[2] / ".venv-parity" / "trl-1.12.0")
# One process on the CPU in float32, nothing kept and nothing shown.
QUIET: dict[str, Any] = {
    "optim": "adamw_torch",
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def older_trl(module: str) -> ModuleType:
    """A module of TRL 1.12, the last with PPO, BCO and the PRM trainer; skipped without it, a failure in CI."""
    if not (FOLDER / "trl").is_dir():
        reason = f"{FOLDER}/trl is missing: pip install --no-deps --target {FOLDER} trl==1.12.0"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    name, folder = "trl_1_12", FOLDER / "trl"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.{module}")
