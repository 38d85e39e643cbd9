"""A training of a small model on a coded corpus, as a run: planned, trained, kept and scored.

`slm train-acoustic` and `slm train-text-aligned` are such runs; `slm.training.small_models` has the training itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from transformers import PreTrainedModel

from recipes.config import ConfigError, Problems
from recipes.runs.inputs import digest, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.machine import is_main_process, process_count, resolve_precision, seed_everything, training_device
from recipes.runs.run_folder import RunFolder
from recipes.runs.tracking import MetricsCallback
from slm.corpus import INDEX_NAME, CodedCorpus
from slm.training.small_models import SmallModelTrainer, SmallModelTraining


class Config(Protocol):
    """The keys that every such command has."""

    run_dir: str
    corpus: str
    training: SmallModelTraining
    seed: int
    device: str
    precision: str


class Data(Protocol):
    """What a training learns from and is scored on."""

    train: Sequence[Any]
    valid: Sequence[Any]


C = TypeVar("C", bound=Config)
D = TypeVar("D", bound=Data)


@dataclass(frozen=True)
class SmallModelRun(Generic[C, D]):
    """What differs from command to command.

    Args:
        command: Its name, such as "train-acoustic".
        open_corpus: The corpus, checked.
        read_data: What is learnt from the corpus.
        new_model: The model with random weights, of the data and a seed.
        facts: What a plan says of the data.
        train: Trains a model on data; the keywords are the folder of checkpoints, seed, device, precision, processes,
            callbacks and tensorboard.
        scores_of: The trained model's figures of the valid split.
        further_corpora: Folders of coded corpora that it learns from beside `corpus`.
    """

    command: str
    open_corpus: Callable[[C], CodedCorpus]
    read_data: Callable[[C, CodedCorpus], D]
    new_model: Callable[[D, int], PreTrainedModel]
    facts: Callable[[C, D], dict[str, object]]
    train: Callable[..., SmallModelTrainer]
    scores_of: Callable[[Any, D], dict[str, float]]
    further_corpora: Callable[[C], Sequence[str]] = lambda config: ()

    def plan(self, config: C) -> dict[str, object]:
        """What a training would do; raises all that would stop it, together."""
        problems = Problems(f"slm {self.command}")
        problems.attempt(RunFolder(config.run_dir).check, config)
        device = problems.attempt(training_device, config.device)
        precision = problems.attempt(resolve_precision, config.precision, device or "cpu")
        corpus = problems.attempt(self.open_corpus, config)
        data = problems.attempt(self.read_data, config, corpus) if corpus is not None else None
        model = problems.attempt(self.new_model, data, config.seed) if data is not None else None
        problems.raise_all()
        return {
            **self.facts(config, data),
            "parameters": model.num_parameters(),
            "steps": config.training.steps,
            "epochs": round(config.training.steps * config.training.batch_size / len(data.train), 1),
            "device": device,
            "precision": precision,
            "result": str(Path(config.run_dir) / "model"),
        }

    def run(self, config: C) -> Path:
        """Train, or go on where a killed run stopped; returns the model's folder."""
        folder = RunFolder(config.run_dir)
        folder.check(config)
        corpus = self.open_corpus(config)
        folders = [corpus.folder, *(CodedCorpus.open(path).folder for path in self.further_corpora(config))]
        fingerprint = digest(*((one / INDEX_NAME).read_text(encoding="utf-8") for one in folders))
        refuse_other_inputs(folder, fingerprint, "corpus")
        if folder.done(config):
            log.info("%s is complete: skipped", config.run_dir)
            return folder.path("model")
        device, data = training_device(config.device), self.read_data(config, corpus)
        folder.start(config, fingerprint)
        seed_everything(config.seed)
        trainer = self.train(
            self.new_model(data, config.seed),
            data,
            config.training,
            folder=folder.checkpoints,
            seed=config.seed,
            device=device,
            precision=resolve_precision(config.precision, device),
            processes=process_count(),
            callbacks=[MetricsCallback(folder.metrics)],
            tensorboard=folder.path("tensorboard"),
        )
        model = trainer.accelerator.unwrap_model(trainer.model)
        if is_main_process():
            model.save_pretrained(folder.path("model"))
            folder.mark_complete({"steps": trainer.state.global_step, **self.scores_of(model, data)})
        trainer.accelerator.wait_for_everyone()
        return folder.path("model")


def open_training_corpus(path: str) -> CodedCorpus:
    """A coded corpus with a train split. Raises ConfigError, CorpusError."""
    if not path:
        raise ConfigError("corpus: not set; give the run_dir of `slm encode`, e.g. corpus=runs/codes")
    corpus = CodedCorpus.open(path)
    if not corpus.count("train"):
        raise ConfigError(f"corpus {corpus.folder}: no train split (it has {', '.join(corpus.splits)})")
    return corpus
