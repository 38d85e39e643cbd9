"""``slm train-text-aligned``: speech tokens aligned to text, one frame of K codes per word (TASTE).

From a coded corpus's semantic codes and texts a small model learns to gather the speech of each word into one vector,
which is quantized, and to rebuild the semantic codes from the text and these vectors (Tseng et al. 2025, arXiv
2504.07053). It needs no audio; with the column ``words`` of ``slm align`` it can be told where the words are.
Checkpoints and resume as in ``slm finetune``. The result, ``run_dir/model``, is what ``slm reconstruct-text-aligned``
takes.

Raises: TextAlignedError, CorpusError, ConfigError, TrainingError, all ValueErrors that name the key or the file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError
from recipes.finetuning.words import WORDS
from recipes.runs.logs import log
from recipes.runs.small_models import SmallModelRun, open_training_corpus
from recipes.runs.tracking import TrainerProgress
from recipes.text_aligned.data import read_items
from slm.corpus import CodedCorpus
from slm.text_aligned.configuration import TextAlignedConfig, TextAlignedError, TextAlignedSizes
from slm.text_aligned.evaluation import code_scores
from slm.text_aligned.modeling import TextAlignedModel, new_text_aligned_model
from slm.text_aligned.samples import Item
from slm.text_aligned.training import TextAlignedTraining, train_text_aligned
from slm.training.small_models import SmallModelTrainer


@dataclass
class Config:
    """What a text-aligned model is trained on, and its size."""

    run_dir: str = field(default="runs/text-aligned", metadata={"help": "run folder; the model goes to run_dir/model"})
    corpus: str = field(
        default="", metadata={"help": "coded corpus with texts: the run_dir of `slm encode`; book 0 is read"}
    )
    normaliser: str = field(default="basic", metadata={"help": "of the texts; words stand between spaces"})
    max_s: float = field(default=20.0, metadata={"help": "longer utterances are left out"})
    valid_limit: int = field(default=300, metadata={"help": "utterances of the valid split that are scored at most"})
    sizes: TextAlignedSizes = field(default_factory=TextAlignedSizes, metadata={"help": "sizes of the model"})
    training: TextAlignedTraining = field(
        default_factory=TextAlignedTraining, metadata={"help": "steps, rates, and what is asked"}
    )
    seed: int = field(default=0, metadata={"help": "of weights and order"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    precision: str = field(default="auto", metadata={"help": "auto, fp32, bf16 or fp16"})

    def __post_init__(self) -> None:
        if self.max_s <= 0:
            raise ValueError(f"max_s={self.max_s:g}: must be above 0")
        if self.valid_limit < 0:
            raise ValueError(f"valid_limit={self.valid_limit}: must be 0 or more")


@dataclass
class Data:
    """What a training learns from and is scored on, and the model's configuration that follows from the corpus."""

    model: TextAlignedConfig
    train: list[Item]
    valid: list[Item]


def open_corpus(config: Config) -> CodedCorpus:
    """The corpus, checked. Raises ConfigError, CorpusError."""
    corpus = open_training_corpus(config.corpus)
    if config.training.alignment_weight > 0 and WORDS not in corpus.metadata.columns:
        raise ConfigError(
            f"training.alignment_weight: corpus {corpus.folder} has no column {WORDS}; make one with `slm align` and "
            f"`slm encode data.0.path=ALIGNED/manifest.jsonl data.0.columns=[{WORDS}]`, or leave it at 0"
        )
    return corpus


def read_data(config: Config, corpus: CodedCorpus) -> Data:
    """The corpus's utterances. Raises TextAlignedError where none can be used, ValueError for an unknown normaliser."""
    facts, normalise = corpus.metadata, get_normaliser(config.normaliser)
    most = int(config.max_s * facts.frame_rate)
    train = read_items(corpus, "train", normalise, most)
    if not train:
        raise TextAlignedError(f"corpus {corpus.folder}: no utterance with a text and of at most {config.max_s:g} s")
    valid = list(read_items(corpus, "valid", normalise, most).values()) if corpus.count("valid") else []
    items = [*train.values(), *valid]
    model = TextAlignedConfig(
        codebook_size=facts.codebook_sizes[0],
        frame_rate=facts.frame_rate,
        sampling_rate=facts.sampling_rate,
        fingerprint=facts.fingerprint,
        precision=facts.precision,
        tokenizer=facts.tokenizer,
        normaliser=config.normaliser,
        max_frames=max(len(item.codes) for item in items),
        max_bytes=max(len(item.text) for item in items),
        alignment_weight=config.training.alignment_weight,
        quantizer_warmup_steps=config.training.quantizer_warmup_steps,
        **dataclasses.asdict(config.sizes),
    )
    return Data(model, list(train.values()), valid[: config.valid_limit])


def new_model(data: Data, seed: int) -> TextAlignedModel:
    """The model with random weights."""
    return new_text_aligned_model(data.model, seed)


def facts_of(config: Config, data: Data) -> dict[str, object]:
    """What a plan says of the data."""
    facts = data.model
    words = sum(len(item.spans) for item in data.train)
    seconds = sum(len(item.codes) for item in data.train) / facts.frame_rate
    return {
        "codes": f"{facts.tokenizer}, {facts.frame_rate:g} Hz, book 0 of {facts.codebook_size} entries",
        "utterances (train, valid)": [len(data.train), len(data.valid)],
        "words a second": round(words / seconds, 2),
        "bits a second of word codes": round(words / seconds * facts.bits_per_word, 1),
        "words whose frames are known (train)": sum(int((item.spans[:, 1] > 0).sum()) for item in data.train),
    }


def train(
    model: TextAlignedModel, data: Data, settings: TextAlignedTraining, *, callbacks: list[TrainerCallback], **how: Any
) -> SmallModelTrainer:
    """Trains a model, and shows how far it is."""
    shown = [*callbacks, TrainerProgress("train-text-aligned")]
    return train_text_aligned(model, data.train, data.valid, settings, callbacks=shown, **how)


def scores_of(model: TextAlignedModel, data: Data) -> dict[str, float]:
    """The trained model's figures of the valid split, told too; empty without a split."""
    if not data.valid:
        return {}
    found = code_scores(model, data.valid)
    for name, prefix in {"own word codes": "", "text alone": "text_alone/", "shuffled word codes": "shuffled/"}.items():
        accuracy, loss = 100 * found[f"{prefix}accuracy"], found[f"{prefix}loss"]
        log.info("%s: accuracy %.1f %%, loss %.3f nats a code", name, accuracy, loss)
    return {name: round(value, 5) for name, value in found.items()}


RUN = SmallModelRun("train-text-aligned", open_corpus, read_data, new_model, facts_of, train, scores_of)


def plan(config: Config) -> dict[str, object]:
    """What a training would do; raises all that would stop it, together."""
    return RUN.plan(config)


def run(config: Config) -> Path:
    """Train, or go on where a killed run stopped; returns the model's folder."""
    return RUN.run(config)
