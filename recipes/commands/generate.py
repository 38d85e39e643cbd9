"""``slm generate task=NAME``: whatever a fine-tuned SLM has learnt to do, asked by the task's name.

A task that answers in text runs as ``slm transcribe task=NAME``, one that answers in speech as ``slm synthesize
task=NAME``: what is given here becomes that command's configuration, and its code does the work, into the same files.
A run that either began, the other goes on with. What stands on the command line without a key is recordings, or a text
to be said, as the task's prompt needs it.

Not here: scores (``slm evaluate``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from recipes.commands import synthesize, transcribe
from recipes.config import ConfigError, from_values
from recipes.inference.keys import language_key, model_key, wording_key
from recipes.inference.tasks import COMMANDS
from recipes.plugins import plugins_key
from recipes.runs.run_folder import ADJUSTABLE
from slm.tasks import Task, TaskError, get_task, tasks
from tokenizer.data.utterances import DataSource

MODULES: dict[str, ModuleType] = {"text": transcribe, "speech": synthesize}


@dataclass
class Config:
    """What is asked of which model; the keys of one of the two commands are for tasks that answer in its modality."""

    task: str = field(default="", metadata={"help": "what is asked of the model: asr, tts, continuation, st, ..."})
    inputs: list[str] = field(
        default_factory=list, metadata={"help": "recordings, or one text in quotes: what the task's prompt holds"}
    )
    run_dir: str = field(default="", metadata={"help": "where predictions go; may be empty with inputs"})
    model: str = model_key()
    data: DataSource | None = field(default=None, metadata={"help": "or a data source, e.g. data.path=manifest.jsonl"})
    corpus: str | None = field(default=None, metadata={"help": "or a coded corpus: the run_dir of `slm encode`"})
    split: str = field(default="test", metadata={"help": "split of the data source or corpus"})
    limit: int | None = field(default=None, metadata={"help": "only the first N utterances"})
    tokenizer: str = field(default="", metadata={"help": "speech tokenizer; empty: the one the model was trained with"})
    wording: str | None = wording_key()
    language: str = language_key()
    output: str = field(
        default="",
        metadata={"help": "of speech, the file for a single answer without run_dir; empty: out.wav", **ADJUSTABLE},
    )
    decoding: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "how answers are decoded: the keys decoding.* of `slm transcribe --help` for answers in text, of "
            "`slm synthesize --help` for those in speech"
        },
    )
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further keys of that command, such as options.piece_s=20 or options.prompt_share=0.3"},
    )
    weights: str = field(default="fp32", metadata={"help": "how the model is held: fp32, bf16, fp16"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    plugins: list[str] = plugins_key()


def resolve(config: Config) -> tuple[ModuleType, Any]:
    """The command that a task runs as, and its configuration.

    Raises:
        ConfigError: there is no such task, or a key that its command does not have.
    """
    try:
        task = get_task(config.task)
    except TaskError as error:
        asked = str(error) if config.task else f"not set; give task=NAME, one of {', '.join(tasks())}"
        raise ConfigError(f"task: {asked}") from error
    module, command = MODULES[task.answers], COMMANDS[task.answers]
    given = {name: value for name, value in _shared(config).items() if name != "output" or value}
    for name in config.options:
        if name in given:
            raise ConfigError(f"options.{name}: is a key of its own; give {name}=...")
    values = given | config.options | _inputs(config, task)
    if config.decoding:
        values["decoding"] = config.decoding
    return module, from_values(module.Config, values, where=f"the keys of `{command}`, which task {task.name} runs as")


def _shared(config: Config) -> dict[str, Any]:
    """The keys that are called the same there."""
    own = ("inputs", "decoding", "options")
    return {one.name: getattr(config, one.name) for one in dataclasses.fields(config) if one.name not in own}


def _inputs(config: Config, task: Task) -> dict[str, Any]:
    """The key that a task's inputs go to."""
    if not config.inputs:
        return {}
    if task.answers == "text" or task.prompt_holds_speech:
        return {"files": config.inputs}
    if len(config.inputs) > 1:
        words = " ".join(config.inputs)
        raise ConfigError(f"task {task.name} takes one text, got {len(config.inputs)}; put it in quotes: {words!r}")
    return {"text": config.inputs[0]}


def plan(config: Config) -> dict[str, object]:
    """What would be done; raises all that would stop it, together."""
    module, settings = resolve(config)
    answers = next(name for name, found in MODULES.items() if found is module)
    return {"runs as": f"{COMMANDS[answers]} task={config.task}"} | module.plan(settings)


def run(config: Config) -> Path | dict[str, str]:
    """Runs the task; returns and raises what its command does."""
    module, settings = resolve(config)
    return module.run(settings)
