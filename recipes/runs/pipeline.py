"""A pipeline: recipes in a row, each in a folder of its own, the ones that are complete skipped.

A stage names a command, its configuration and what to set in it; ``${train-tokenizer}`` there is an earlier stage's
folder. `quickstart` is one pipeline; `compare` runs one pipeline per cell and shares the stages marked ``shared``.
"""

from __future__ import annotations

import gc
import importlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recipes.config import ConfigError, Problems, load_config
from recipes.plugins import import_plugins
from recipes.runs.logs import log
from recipes.runs.run_folder import ADJUSTABLE, RunFolder
from recipes.runs.run_lock import unlock
from recipes.runs.times import clock, read_time
from recipes.suggestions import did_you_mean

VARIABLE = re.compile(r"\$\{([^}]*)\}")


@dataclass
class Stage:
    """One recipe of a pipeline."""

    command: str = field(metadata={"help": "the slm command, such as encode"})
    name: str = field(default="", metadata={"help": "the stage's name and folder; the command where empty"})
    config: str | None = field(default=None, metadata={"help": "its YAML, or a shipped name"})
    set: list[str] = field(default_factory=list, metadata={"help": "key=value overrides; ${stage} is a stage's folder"})
    shared: bool = field(default=False, metadata={"help": "compare: run once for all cells"})
    run_dir: str | None = field(
        default=None, metadata={"help": "its folder where that lies elsewhere: a stage that another pipeline has too"}
    )
    rough_s: float | None = field(
        default=None,
        metadata={"help": "about how many seconds it takes; for the plan that `slm quickstart` opens with"},
    )

    def __post_init__(self) -> None:
        self.name = self.name or self.command


@dataclass
class PipelineConfig:
    """Stages in a row. Each stage's folder guards its own configuration, so these keys may change between runs."""

    run_dir: str = field(default="runs/pipeline", metadata={"help": "each stage's folder lies in this one"})
    stages: list[Stage] = field(default_factory=list, metadata={"help": "the recipes, in order", **ADJUSTABLE})
    set: list[str] = field(default_factory=list, metadata={"help": "more overrides, as STAGE.key=value", **ADJUSTABLE})
    redo: str | None = field(
        default=None, metadata={"help": "set this stage and all after it aside, and run them anew", **ADJUSTABLE}
    )

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("stages: empty; take a shipped pipeline (--config quickstart/quickstart) or list some")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"stages: {', '.join(sorted(twice))} stands there twice; give each a name of its own")
        if self.redo is not None and self.redo not in names:
            guess = did_you_mean(self.redo, names)
            raise ValueError(f"redo={self.redo}: no such stage; {guess}there are {', '.join(names)}")
        for item in self.set:
            stage_override(item, names)


@dataclass(frozen=True)
class Step:
    """A stage made ready: its recipe and its typed configuration."""

    stage: Stage
    recipe: Any
    config: Any
    inputs: tuple[RunFolder, ...] = ()  # the stages that it names as ${stage}

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.run_dir)


class StageError(Exception):
    """A stage did not come to its end; its cause is what the stage raised."""

    def __init__(self, stage: Stage, cause: Exception) -> None:
        what = str(cause) or type(cause).__name__
        # Such a message names its stage already.
        super().__init__(what if what.startswith("stage ") else f"stage {stage.name}: {what}")
        self.stage, self.cause = stage, cause


def stage_override(item: str, names: list[str]) -> tuple[str, str]:
    """``encode.seed=3`` -> ("encode", "seed=3"). Raises ConfigError where no stage is called so."""
    name, dot, override = item.partition(".")
    if name not in names or not dot or "=" not in override:
        guess = "" if name in names else did_you_mean(name, names)
        raise ConfigError(
            f"set: {item!r} is not of the form STAGE.key=value; {guess}there are the stages {', '.join(names)}"
        )
    return name, override


def make_steps(
    config: PipelineConfig,
    cell: str | None = None,
    cell_set: list[str] = (),
    owners: dict[str, str] | None = None,
    cell_stages: Sequence[str] | None = None,
) -> list[Step]:
    """Every stage with its configuration, checked before anything runs.

    Args:
        config: the pipeline.
        cell: a cell's name: stages that are not shared go into its folder.
        cell_set: its overrides, as ``STAGE.key=value``, after the pipeline's own.
        owners: what a stage does -> the folder of the first cell that does it, where a cell that does the same finds
            it; filled here. None: each cell has its own.
        cell_stages: the names of the stages that the cell runs; None: all.

    Raises:
        ConfigError: an unknown command, variable or key; the message names the cell and the stage.
    """
    names = [stage.name for stage in config.stages]
    run = names if cell_stages is None else cell_stages
    more = [stage_override(item, names) for item in (*config.set, *cell_set)]
    once = {stage.name for stage in config.stages if stage.shared}
    if clash := once & {stage_override(item, names)[0] for item in cell_set}:
        raise ConfigError(f"cell {cell}: sets {', '.join(sorted(clash))}, which is shared by all cells")
    folders: dict[str, str] = {}
    steps = []
    for stage in (stage for stage in config.stages if stage.name in run):
        own = cell is not None and not stage.shared
        if own and stage.run_dir is not None:
            raise ConfigError(f"stage {stage.name}: run_dir={stage.run_dir} would be every cell's; set `shared` too")
        place = Path(config.run_dir, cell, stage.name) if own else Path(config.run_dir, stage.name)
        folders[stage.name] = stage.run_dir or str(place)
        # A shared stage sees shared ones only: it may not depend on what differs between cells.
        known = {name: place for name, place in folders.items() if own or cell is None or name in once}
        try:
            recipe = importlib.import_module("recipes.commands." + stage.command.replace("-", "_"))
        except ModuleNotFoundError as error:
            if error.name != "recipes.commands." + stage.command.replace("-", "_"):
                raise
            raise ConfigError(f"stage {stage.name}: there is no command {stage.command!r}") from error
        overrides = [f"run_dir={folders[stage.name]}", *stage.set]
        if cell is not None and "transcripts_dir" in recipe.Config.__dataclass_fields__:  # cells read the same audio
            overrides.insert(0, f"transcripts_dir={Path(config.run_dir, 'transcripts')}")
        overrides = _in_force([*overrides, *(override for name, override in more if name == stage.name)])
        try:
            named = dict.fromkeys(name for item in overrides for name in VARIABLE.findall(item))
            if absent := [name for name in named if name in names and name not in run]:
                raise ConfigError(
                    f"reads ${{{absent[0]}}}, a stage that this cell does not run: name it in the cell's `stages`, or "
                    "set the key that reads it to something else in the cell's `set`"
                )
            filled = [substitute(item, known) for item in overrides]
            inputs = tuple(RunFolder(known[name]) for name in named)
            loaded = load_config(recipe.Config, stage.config, filled)
            import_plugins(loaded)
            if stage.command == "generate":  # runs as another command, whose configuration its folder keeps
                recipe, loaded = recipe.resolve(loaded)
            if own and owners is not None:
                folders[stage.name] = owners.setdefault(_what_it_does(stage, loaded), folders[stage.name])
                loaded.run_dir = folders[stage.name]
            steps.append(Step(stage, recipe, loaded, inputs))
        except ConfigError as error:
            where = f"cell {cell}, stage" if own else "stage"
            raise ConfigError(f"{where} {stage.name}: {error}") from error
    return steps


def _in_force(overrides: Sequence[str]) -> list[str]:
    """Without those that a later one replaces: of the same key, or of one above it.

    >>> _in_force(["data.0.limit=5", "seed=0", "data=[]", "seed=1"])
    ['data=[]', 'seed=1']
    """
    kept: dict[str, str] = {}
    for item in reversed(overrides):
        parts = item.partition("=")[0].strip().split(".")
        if not any(".".join(parts[:depth]) in kept for depth in range(1, len(parts) + 1)):
            kept[".".join(parts)] = item
    return list(reversed(kept.values()))


def _what_it_does(stage: Stage, config: Any) -> str:
    """A stage's command and configuration but for its folder: with the same inputs, what comes out is the same."""
    return json.dumps([stage.command, asdict(config) | {"run_dir": ""}], sort_keys=True, default=str)


def substitute(text: str, folders: dict[str, str]) -> str:
    """Replace each ``${stage}`` by that stage's folder. Raises ConfigError for a stage that is not there (yet)."""

    def folder(match: re.Match[str]) -> str:
        if match[1] not in folders:
            raise ConfigError(f"{match[0]} in {text!r} is no earlier stage here; known: {', '.join(folders)}")
        return folders[match[1]]

    return VARIABLE.sub(folder, text)


def describe(steps: list[Step]) -> dict[str, object]:
    """For a plan: each stage, whether it is done, and where. A stage whose inputs are all there is checked by its plan.

    Raises:
        ConfigError: a stage cannot run, or is older than its inputs.
    """
    facts, problems = {}, Problems("this row of stages")
    for step in steps:
        facts[step.stage.name] = f"slm {step.stage.command} in {step.config.run_dir}"
        if step.folder.done(step.config):
            problems.attempt(refuse_stale, step)
            facts[step.stage.name] += " (complete: skipped)"
        elif all(folder.complete for folder in step.inputs):
            problems.attempt(_plan_of, step)
    problems.raise_all()
    return facts


def _plan_of(step: Step) -> None:
    """Raises ConfigError, with the stage's name, where the stage's own plan does."""
    try:
        step.recipe.plan(step.config)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"stage {step.stage.name}: {error}") from error


def refuse_stale(step: Step) -> None:
    """Raises ConfigError where a complete stage is older than something it was made from."""
    made = read_time(step.folder.finished)
    for folder in step.inputs:
        anew = read_time(folder.finished)
        if made and anew and anew > made:
            raise ConfigError(
                f"stage {step.stage.name}: {step.config.run_dir} was made from an earlier {folder.folder}, which has "
                f"been made anew since. To redo this stage and those after it: redo={step.stage.name}"
            )


def set_aside_from(steps: list[Step], name: str) -> None:
    """Set a stage's folder and those of all later ones aside, so that they run anew; none where it is not among them.

    A later stage whose folder lies elsewhere stays: another pipeline reads it.
    """
    position = next((index for index, step in enumerate(steps) if step.stage.name == name), None)
    if position is None:
        return
    for step in (steps[position], *(step for step in steps[position + 1 :] if step.stage.run_dir is None)):
        if moved := step.folder.set_aside():
            log.info("redo: the earlier %s is now %s", step.config.run_dir, moved)


def run_steps(steps: list[Step], redo: str | None = None, label: str = "") -> dict[str, float]:
    """Run the stages in order, complete ones skipped.

    Returns:
        stage -> seconds of those that ran.

    Raises:
        StageError: a stage failed, or its folder was begun with another configuration (the message says how to go on).
    """
    if redo is not None:
        set_aside_from(steps, redo)
    started, seconds = time.perf_counter(), {}
    for number, step in enumerate(steps, start=1):
        heading = f"[{number}/{len(steps)}] {label}{step.stage.name}"
        try:
            if _is_done(step):
                log.info("%s: complete, skipped", heading)
                continue
            log.info("%s (%s so far)", heading, clock(time.perf_counter() - started))
            began = time.perf_counter()
            step.recipe.run(step.config)
        except Exception as error:
            raise StageError(step.stage, error) from error
        finally:
            unlock(step.folder.folder)  # of a stage that failed, which another process may try
        seconds[step.stage.name] = round(time.perf_counter() - began, 1)
        log.info("%s: done in %s", heading, clock(seconds[step.stage.name]))
        gc.collect()  # one stage's model should not stand in memory beside the next one's
    return seconds


def _is_done(step: Step) -> bool:
    """Whether a stage is complete. Raises ConfigError where what stands in its folder is not of this configuration."""
    try:
        step.folder.check(step.config)
        if step.folder.done(step.config):
            _look_again(step)
    except ConfigError as error:
        way = f"To redo this stage and those after it: redo={step.stage.name}"
        raise ConfigError(f"stage {step.stage.name}: {error}\n{way}") from error
    if done := step.folder.done(step.config):
        refuse_stale(step)
    return done


def _look_again(step: Step) -> None:
    """Runs a complete stage, which then only compares its inputs with those it was made from.

    Raises:
        ConfigError: they have changed since.
    """
    from tokenizer.data.utterances import DataError  # late: it brings torch, which a plan's --help does not need

    try:
        step.recipe.run(step.config)
    except (DataError, FileNotFoundError) as error:
        log.info("stage %s is complete, and its inputs are not here any more (%s)", step.stage.name, error)


def results_folders(steps: list[Step]) -> list[Path]:
    """Where the pipeline's evaluations leave their results.json."""
    return [Path(step.config.run_dir) for step in steps if step.stage.command == "evaluate"]
