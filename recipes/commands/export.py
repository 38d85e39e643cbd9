"""``slm export``: a trained model of this project as a folder to share: half-size weights, what loads them, a card.

Takes a run folder or the model folder in it, of `slm train-tokenizer`, `slm train-teacher`, `slm train-lm` or `slm
finetune`. The card (README.md) is filled from the run folders: data with licences and hours, steps, time and machine,
the commands that make it again, sizes, and scores from `results`. The embedded models are made so.

fp16 halves the file; all our loaders compute with fp32. Of an LLM take bf16, which is what most were made in and keeps
their range: the folder is a plain one of transformers that says which type it holds, and other engines serve it. The
new weights are other weights: a tokenizer's fingerprint is that of the exported folder, and `check` tells how many
codes the rounding changes. `discriminators=true` adds those that a tokenizer was trained against, in a folder of their
own, so that others can go on adversarially with `init_discriminators`. `push_to_hub=owner/name` sends the folder to the
Hugging Face hub once it is whole. Not here: what else only a training needs
(averaged weights, projections, optimizers).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from eval.results_file import load_results
from recipes.config import ConfigError, Problems
from recipes.exporting.card import CARD_FILE, Export, model_card, own_results
from recipes.exporting.check import Agreement, compare_codes, compare_transcripts
from recipes.exporting.discriminators import DISCRIMINATOR_WEIGHTS, DISCRIMINATORS, discriminator_file
from recipes.exporting.hub import check_push, push
from recipes.runs.files import atomic_write_text, disk_errors
from recipes.runs.lineage import PastRun, run_of
from recipes.runs.logs import log
from recipes.runs.own_folders import CONFIG_FILE, refuse_unwritable
from recipes.scoring.labels import model_label
from slm.model.continuous import is_continuous
from slm.model.modeling import DTYPES, load_llm
from slm.vocabulary import FILE_NAME as VOCABULARY_FILE
from tokenizer import load_tokenizer
from tokenizer.codecs.supervised import SupervisedTokenizerConfig
from tokenizer.model.configuration import LMSPTConfig
from tokenizer.teacher.whisper import SpeechTeacher, TeacherConfig
from tokenizer.training.discriminator import Discriminator, DiscriminatorConfig
from tokenizer.training.initialisation import initialise_discriminators

TRAINING_FILE = "training.yaml"
KINDS = {LMSPTConfig.model_type: "tokenizer", SupervisedTokenizerConfig.model_type: "supervised-tokenizer"}
KINDS |= {"whisper": "recogniser"}
COPIED = (".json", ".txt", ".model", ".jinja")
NOT_COPIED = ("run.json", "complete.json", "trainer_state.json", "model.safetensors.index.json")


@dataclass
class Config:
    """What is exported, where to, and what its card says beside the facts."""

    own_files: ClassVar[tuple[str, ...]] = ("config.json", CARD_FILE)  # by them `--restart` knows an export

    source: str = field(default="", metadata={"help": "a finished run's folder, or a model folder"})
    output: str = field(default="", metadata={"help": "the new folder (-o)"})
    name: str = field(default="", metadata={"help": "the model's name in its card; empty: the new folder's"})
    dtype: Literal["fp16", "bf16", "fp32"] = field(
        default="fp16", metadata={"help": "how fp32 weights are written; bf16 keeps an LLM's range"}
    )
    license: str = field(default="apache-2.0", metadata={"help": "licence of the weights, as the hub spells it"})
    results: list[str] = field(
        default_factory=list, metadata={"help": "results.json of `slm evaluate` or `slm compare`: the card's scores"}
    )
    rows: list[str] = field(
        default_factory=list,
        metadata={"help": "which rows of them, by patterns of names (12.5hz:*); empty: those of this model"},
    )
    notes: list[str] = field(default_factory=list, metadata={"help": "more limits to state in the card"})
    check: str = field(
        default="", metadata={"help": "a manifest: how many codes (or transcripts) the rounding changes on it"}
    )
    check_limit: int = field(default=20, metadata={"help": "recordings of `check` that are compared"})
    discriminators: bool = field(
        default=False, metadata={"help": "add a tokenizer's discriminators, as of the last checkpoint, to go on with"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier export"})
    push_to_hub: str = field(
        default="", metadata={"help": "send the folder to the Hugging Face hub too, as this owner/name"}
    )
    private: bool = field(
        default=True, metadata={"help": "whether a repository that push_to_hub makes is seen by its owner alone"}
    )

    def __post_init__(self) -> None:
        if self.check_limit < 1:
            raise ValueError(f"check_limit={self.check_limit}: must be at least 1")

    @property
    def run_dir(self) -> str:
        """The folder that is written; what `--restart` sets aside."""
        return self.output

    @run_dir.setter
    def run_dir(self, folder: str) -> None:
        self.output = folder


@dataclass
class Job:
    """What is to be exported, checked."""

    folder: Path
    kind: str
    run: PastRun | None
    settings: dict[str, Any]  # of config.json
    discriminators: tuple[Path, dict[str, Any]] | None = None  # their weights and configuration


def prepare(config: Config) -> Job:
    """Find the model and what made it, and whether it may be written. Raises ConfigError."""
    if not config.source or not config.output:
        raise ConfigError("give a run or model folder and where it goes: slm export runs/tokenizer -o shared/name")
    problems = Problems("slm export")
    found = problems.attempt(_find, config.source)
    problems.attempt(_check_output, config, found[0] if found else Path(config.source).expanduser())
    if found is not None:
        problems.attempt(_check_kind, config, found[0], found[2])
    if config.push_to_hub:
        problems.attempt(check_push, config.push_to_hub)
    problems.raise_all()
    folder, settings, kind, run = found
    job = Job(folder, kind, run, settings, discriminator_file(folder) if config.discriminators else None)
    own_results(_export(config, job))  # raises where it is not clear which rows the card shows
    return job


def _check_kind(config: Config, folder: Path, kind: str) -> None:
    """Raises ConfigError where what is asked for cannot be done with a model of this kind."""
    if config.check and kind not in ("tokenizer", "supervised-tokenizer", "recogniser"):
        raise ConfigError(f"check: compares codes or transcripts, and {folder} is neither tokenizer nor recogniser")
    if config.discriminators and kind != "tokenizer":
        raise ConfigError(f"discriminators: only a tokenizer is trained against any, and {folder} holds a {kind}")


def _find(source: str) -> tuple[Path, dict[str, Any], str, PastRun | None]:
    """A model's folder, its config.json, its kind and the run that made it. Raises ConfigError."""
    folder = Path(source).expanduser()
    if not (folder / "config.json").is_file() and (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if any(is_continuous(place) for place in (folder, folder / "model")):
        raise ConfigError(
            f"{source}: a model that hears continuous features is not exported; share its folder RUN_DIR/model as it is"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{source}: neither a finished run (no model/config.json) nor a model folder (no config.json)"
        )
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{folder} holds adapters: export the merged model of that run (lora.merge=true)")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = _kind(folder, settings)
    run = run_of(folder)
    if settings.get("trained") is False and kind == "tokenizer":
        raise ConfigError(f"{folder}: its weights are random (trained: false in config.json); train it first")
    if run is not None and not run.complete:
        raise ConfigError(f"{run.folder} is not finished (no complete.json): its own command goes on where it stopped")
    return folder, settings, kind, run


def _export(config: Config, job: Job) -> Export:
    """What the card is made from, as far as it is known before anything is written."""
    out = Path(config.output).expanduser()
    return Export(
        name=config.name or out.name,
        kind=job.kind,
        settings=job.settings,
        run=job.run,
        dtype=config.dtype,
        license=config.license,
        labels=[model_label(str(job.folder)), out.name],
        results=[load_results(name) for name in config.results],
        rows=config.rows,
        notes=config.notes,
        discriminators=job.discriminators is not None,
    )


def _kind(folder: Path, settings: dict[str, Any]) -> str:
    model_type = settings.get("model_type")
    if model_type in KINDS:
        return KINDS[model_type]
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "slm" if (folder / VOCABULARY_FILE).is_file() else "text-lm"
    raise ConfigError(
        f"{folder} holds a model of type {model_type!r}: only tokenizers, recognisers, text LMs and SLMs that this "
        "project trained are exported"
    )


def _check_output(config: Config, folder: Path) -> None:
    out = Path(config.output).expanduser()
    if out.resolve() in (folder.resolve(), *folder.resolve().parents, Path.cwd()):
        raise ConfigError(f"output (-o): {out} is the model's own folder or above it; name another one")
    refuse_unwritable(out, "output (-o)")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not config.overwrite:
        raise ConfigError(f"output (-o): {out} exists and is not empty; name another folder, or set overwrite=true")
    if not (out / "config.json").is_file() or not (out / CARD_FILE).is_file():
        raise ConfigError(f"output (-o): {out} is no earlier export, so overwrite=true leaves it alone")


def plan(config: Config) -> dict[str, object]:
    """What would be written; raises what would stop it."""
    job = prepare(config)
    return {
        "model": f"{job.folder} ({job.kind})",
        "made by": job.run.command if job.run else "unknown: no run folder beside it",
        "weights": config.dtype,
        "result": config.output,
        "sent to": config.push_to_hub or "nowhere",
    }


def run(config: Config) -> Path:
    """Writes the folder, whole or not at all; returns it."""
    job = prepare(config)
    out = Path(config.output).expanduser()
    unfinished = out.with_name(f".{out.name}.unfinished-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        with disk_errors(out):
            unfinished.mkdir(parents=True)
            parameters = _write_model(job, unfinished, config.dtype)
            if job.discriminators:
                _write_discriminators(*job.discriminators, unfinished / DISCRIMINATORS, config.dtype)
        fingerprint = _read_back(job, unfinished)
        agreement = _agreement(config, job, unfinished) if config.check else None
        export = replace(
            _export(config, job),
            parameters=parameters,
            sizes={str(path.relative_to(unfinished)): path.stat().st_size for path in _files(unfinished)},
            fingerprint=fingerprint,
            agreement=agreement,
        )
        atomic_write_text(unfinished / CARD_FILE, model_card(export))
        for path in _files(unfinished):
            path.chmod(0o644)  # safetensors are written for their owner alone
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _put_in_place(unfinished, out)
    total = sum(path.stat().st_size for path in _files(out))
    log.info("%s: %s parameters, %s bytes", out, f"{sum(parameters.values()):,}", f"{total:,}")
    if fingerprint:
        log.info("fingerprint of its codes in fp32: %s", fingerprint)
    if agreement:
        log.info("%s", agreement.text())
    if config.push_to_hub:
        log.info("sent to %s", push(out, config.push_to_hub, config.private))
    return out


def _put_in_place(unfinished: Path, out: Path) -> None:
    """Renames the finished folder to its name; what stood there goes only once the new one is in its place."""
    earlier = out.with_name(f".{out.name}.earlier-{os.getpid()}")
    if out.exists():
        out.rename(earlier)
    unfinished.rename(out)
    shutil.rmtree(earlier, ignore_errors=True)


def _write_model(job: Job, target: Path, dtype: str) -> dict[str, int]:
    """Writes weights and what loads them; returns the parameters of each part."""
    weights = sorted(job.folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"{job.folder} has no weights (*.safetensors)")
    parameters: dict[str, int] = {}
    total_bytes = 0
    for file in weights:
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise ConfigError(f"{file} cannot be read ({error}): the file is torn, copy it again") from error
        for name, value in tensors.items():
            part = _part(name, job.kind, file.stem)
            if not name.endswith("usage"):  # a count of use, not a weight
                parameters[part] = parameters.get(part, 0) + value.numel()
            tensors[name] = _rounded(name, value, dtype, file)
        total_bytes += sum(value.numel() * value.element_size() for value in tensors.values())
        save_file(tensors, target / file.name, metadata=metadata)
    for file in sorted(job.folder.iterdir()):
        if file.suffix in COPIED and file.name not in NOT_COPIED:
            shutil.copyfile(file, target / file.name)
    if job.kind in ("slm", "text-lm"):
        # What other engines read: the type that the file holds, and that past keys are kept when it generates.
        served = json.loads((target / "config.json").read_text(encoding="utf-8"))
        served |= {"dtype": str(DTYPES[dtype]).removeprefix("torch."), "use_cache": True}
        atomic_write_text(target / "config.json", json.dumps(served, indent=2) + "\n")
    index = job.folder / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content.setdefault("metadata", {})["total_size"] = total_bytes
        atomic_write_text(target / index.name, json.dumps(content, indent=2) + "\n")
    if job.run is not None:
        shutil.copyfile(job.run.folder / CONFIG_FILE, target / TRAINING_FILE)
    return parameters


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_discriminators(weights: Path, settings: dict[str, Any], target: Path, dtype: str) -> None:
    """Writes the discriminators and their configuration, and reads them back as a training will."""
    target.mkdir()
    tensors = load_file(weights)
    rounded = {name: _rounded(name, value, dtype, weights) for name, value in tensors.items()}
    save_file(rounded, target / DISCRIMINATOR_WEIGHTS)
    atomic_write_text(target / "config.json", json.dumps(settings, indent=2) + "\n")
    try:
        initialise_discriminators(Discriminator(DiscriminatorConfig(**settings)), target / DISCRIMINATOR_WEIGHTS)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"discriminators: {weights} is not of the configuration beside it: {error}") from error


def _rounded(name: str, value: torch.Tensor, dtype: str, file: Path) -> torch.Tensor:
    """A tensor as it is written: fp32 ones in half precision where asked for, all others as they are."""
    if value.dtype == torch.float32:
        value = value.to(DTYPES[dtype])
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        why = "is beyond fp16's range: dtype=bf16 or fp32 keeps it" if dtype == "fp16" else "is NaN or infinite"
        raise ConfigError(f"{file}: a value of {name} {why}")
    return value.contiguous()


def _part(name: str, kind: str, file: str) -> str:
    """Which part of a model a tensor belongs to, for the table of sizes."""
    beside = {"ctc_head": "CTC head", "further_books": "further books", "multi_token_heads": "multi-token heads"}
    if file in beside:
        return beside[file]
    pieces = name.removeprefix("model.").split(".")
    if kind in ("slm", "text-lm"):
        known = {"embed_tokens": "embedding", "layers": "layers", "lm_head": "output head"}
        return known.get(pieces[0], "norms" if "norm" in pieces[0] else pieces[0])
    return pieces[0].replace("_", " ")


def _read_back(job: Job, folder: Path) -> str:
    """Loads the new folder as any user will; returns the fingerprint of a tokenizer, else an empty text."""
    if job.kind in ("tokenizer", "supervised-tokenizer"):
        return load_tokenizer(folder).fingerprint("fp32")
    if job.kind == "recogniser":
        SpeechTeacher.from_pretrained(TeacherConfig(name=str(folder)))
    else:
        load_llm(str(folder))
    return ""


def _agreement(config: Config, job: Job, exported: Path) -> Agreement:
    if job.kind == "recogniser":
        return compare_transcripts(job.folder, exported, config.check, config.check_limit)
    return compare_codes(job.folder, exported, config.check, config.check_limit)
