"""What the LLM can be asked to do, one file a task: ASR, TTS, continuation, translation.

`registry` holds them by name; `sequences` turns a task's parts into `input_ids` and `labels`; `styles` is how a task is
asked for beside its marks. A file that is put here is found by itself; code elsewhere calls :func:`register`.
"""

import importlib
import pkgutil

from slm.tasks.registry import Task, TaskError, get_task, register, tasks

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Task", "TaskError", "get_task", "register", "tasks"]
