"""Turn LM-SPT weights in the published layout into a tokenizer folder, and back."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from recipes.config import ConfigError, Problems
from recipes.runs.files import disk_errors
from recipes.runs.logs import log
from recipes.runs.own_folders import refuse_unwritable
from tokenizer.codecs.published import load_published, save_published
from tokenizer.loading import load_tokenizer
from tokenizer.model.modeling import LMSPTModel


@dataclass
class Config:
    """What is converted, and where it goes."""

    own_files: ClassVar[tuple[str, ...]] = ("config.json", "*.safetensors")  # by them `--restart` knows one

    paths: list[str] = field(
        default_factory=list,
        metadata={"help": "SOURCE and OUT_DIR; SOURCE is a published folder, a .safetensors file or kakaocorp/lmspt"},
    )
    to_published: bool = field(default=False, metadata={"help": "the other way: a tokenizer to the published layout"})
    exact_lengths: bool = field(
        default=False, metadata={"help": "whole frames in and out, as the codec protocol asks (false: as published)"}
    )

    @property
    def run_dir(self) -> str:
        """The folder that is written; what `--restart` sets aside."""
        return self.paths[1] if len(self.paths) == 2 else ""

    @run_dir.setter
    def run_dir(self, folder: str) -> None:
        self.paths = [self.paths[0], folder]


def read(config: Config) -> LMSPTModel:
    """Checks the paths and loads the model. Raises ConfigError and ValueError."""
    if len(config.paths) != 2:
        raise ConfigError(f"paths: give SOURCE and OUT_DIR, not {len(config.paths)} names")
    if not Path(config.run_dir).name:
        raise ConfigError(f"paths: {config.run_dir!r} cannot be OUT_DIR: give the new folder a name")
    problems = Problems("slm convert")
    problems.attempt(_check_output, config.run_dir)
    model = problems.attempt(_read_source, config)
    problems.raise_all()
    return model


def _check_output(folder: str) -> None:
    out = Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{folder} exists; name another folder, or --restart sets it aside")
    refuse_unwritable(out, "OUT_DIR")


def _read_source(config: Config) -> LMSPTModel:
    if not config.to_published:
        return load_published(config.paths[0], config.exact_lengths)
    if config.exact_lengths:
        raise ConfigError("exact_lengths: the published layout has no such key; leave it with --to-published")
    model = load_tokenizer(config.paths[0])
    if not isinstance(model, LMSPTModel):
        raise ConfigError(f"{config.paths[0]} is no LM-SPT tokenizer")
    return model


def plan(config: Config) -> dict[str, object]:
    """What would be written; raises what would stop it."""
    model = read(config)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sampling rate (Hz)": model.config.sampling_rate,
        "frame rate (Hz)": model.config.frame_rate,
        "codebooks": model.config.codebook_sizes,
        "result": config.run_dir,
    }


def run(config: Config) -> Path:
    """Converts; the folder appears once it is whole."""
    model = read(config)
    out = Path(config.run_dir)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with disk_errors(out):
            if config.to_published:
                save_published(model, unfinished)
            else:
                model.save_pretrained(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()  # empty, as `read` saw
    unfinished.replace(out)
    log.info("%.2f Hz, books of %s; fingerprint %s", model.config.frame_rate, model.config.codebook_sizes,
             model.fingerprint()[:12])  # fmt: skip
    return out
