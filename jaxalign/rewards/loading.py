"""Rewards by name: from the registry, a module or a file."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jaxalign.rewards.contract import Reward, RewardFunction, option_names
from jaxalign.rewards.functions import REWARD_FUNCTIONS


def load_reward(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """A reward by name.

    Args:
      name: a key of `REWARD_FUNCTIONS`; or `package.module:function` or `package.module.function`; or
        `path/to/file.py:function`, relative to the current folder.
      options: the function's hyper-parameters by name. Of an imported function, these are parameters with a default and
        keyword-only ones; all others are columns.

    Raises:
      ValueError: the name, the file, the module or an option is unknown, an option's value has no meaning, or the
        reward needs a package that is not installed (names the extra).
    """
    options = dict(options or {})
    if name in REWARD_FUNCTIONS:
        factory = REWARD_FUNCTIONS[name]
        _check_options(name, factory, options, option_names(factory))
        return factory(**options)
    place, separator, function_name = name.rpartition(":")
    if not separator:
        place, _, function_name = name.rpartition(".")
    if not place or not function_name:
        raise ValueError(
            f"there is no reward {name!r}{_near(name, list(REWARD_FUNCTIONS))}; known: {', '.join(REWARD_FUNCTIONS)}; "
            "a function of your own is named as package.module:function or path/to/file.py:function"
        )
    module = _file_module(name, Path(place)) if place.endswith(".py") else _module(name, place)
    function = vars(module).get(function_name)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"reward {name!r}: {place} has no function {function_name!r}{_near(function_name, known)}")
    if isinstance(function, Reward):
        if options:
            raise ValueError(f"reward {name!r} is already bound to its options; it takes none here")
        return function
    if any(p.kind is p.POSITIONAL_ONLY for p in inspect.signature(function).parameters.values()):
        raise ValueError(f"reward {name!r}: its parameters are passed by keyword, so none may be positional only")
    _check_options(name, function, options, option_names(function))
    return Reward(function_name, cast(RewardFunction, function), options)


def reward_file(name: str) -> Path | None:
    """The Python file of a reward that is named by its path, None of one that is built in or imported."""
    place, separator, _ = name.rpartition(":")
    return Path(place) if separator and place.endswith(".py") and name not in REWARD_FUNCTIONS else None


def _check_options(name: str, function: Callable, options: Mapping[str, Any], known: Sequence[str]) -> None:
    for option in options:
        if option not in known:
            raise ValueError(
                f"reward {name!r} has no option {option!r}{_near(option, known)}; known: {', '.join(known) or 'none'}"
            )
    for option, parameter in inspect.signature(function).parameters.items():
        keyword_only = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        if keyword_only and option not in options:
            raise ValueError(f"reward {name!r} needs the option {option!r}")


def _module(name: str, place: str) -> Any:
    try:
        return importlib.import_module(place)
    except ImportError as error:
        near = _near(name, list(REWARD_FUNCTIONS))
        path = f"{place.split('.')[-1]}.py:{name.replace(':', '.').split('.')[-1]}"
        raise ValueError(
            f"reward {name!r}: cannot import {place}: {error}{near}; what is not installed is named by its file: {path}"
        ) from error


def _file_module(name: str, place: Path) -> Any:
    path = place.resolve()
    if not path.is_file():
        raise ValueError(f"reward {name!r}: there is no file {path}")
    # A file that was edited since is another module.
    known = f"jaxalign_reward_{path.stem}_{abs(hash((path, path.read_bytes()))):x}"
    if known in sys.modules:
        return sys.modules[known]
    spec = importlib.util.spec_from_file_location(known, path)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # where dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[known]
        raise ValueError(f"reward {name!r}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
