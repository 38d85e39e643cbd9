"""Modules of the user's own, which register tasks, codecs and measures: imported before a command looks any up."""

from __future__ import annotations

import importlib
import sys
from dataclasses import field
from pathlib import Path
from typing import Any

from recipes.config import ConfigError
from recipes.runs.run_folder import ADJUSTABLE


def plugins_key() -> Any:
    """The field `plugins` of a command's configuration."""
    about = (
        "modules of your own that register tasks (register of slm.tasks), codecs (register_codec of "
        "tokenizer.loading) or measures of audio (register_measure of eval.speech.measures.registry), such as "
        "[my_tasks] for my_tasks.py in the working directory; imported first"
    )
    return field(default_factory=list, metadata={"help": about, **ADJUSTABLE})


def import_plugins(config: Any) -> None:
    """Import what a configuration names in `plugins`; the working directory is searched last.

    Raises:
        ConfigError: there is no such module, or one that it imports is missing.
    """
    names = config.plugins if hasattr(config, "plugins") else []
    if names and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    for name in names:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise ConfigError(f"plugins: {name} imports {error.name}, which is not installed") from error
            raise ConfigError(
                f"plugins: there is no module {name!r}, neither in {Path.cwd()} nor among the installed packages; give "
                "its name without .py"
            ) from error
        own = Path.cwd() / f"{name.replace('.', '/')}.py"
        if own.is_file() and Path(getattr(module, "__file__", None) or "").resolve() != own.resolve():
            found = getattr(module, "__file__", None) or "built into Python"
            raise ConfigError(
                f"plugins: {name} is also the name of a module that is there already ({found}), so that {own} would "
                "never be read; rename your file"
            )
