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

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError, Problems
from recipes.finetuning.words import WORDS
from recipes.runs.inputs import digest, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.machine import is_main_process, process_count, resolve_precision, seed_everything, training_device
from recipes.runs.run_folder import RunFolder
from recipes.runs.tracking import MetricsCallback, TrainerProgress
from recipes.text_aligned.data import read_items
from slm.corpus import INDEX_NAME, CodedCorpus
from slm.text_aligned.configuration import TextAlignedConfig, TextAlignedError, TextAlignedSizes
from slm.text_aligned.evaluation import code_scores
from slm.text_aligned.modeling import TextAlignedModel, new_text_aligned_model
from slm.text_aligned.samples import Item
from slm.text_aligned.training import TextAlignedTraining, train_text_aligned


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
    if not config.corpus:
        raise ConfigError("corpus: not set; give the run_dir of `slm encode`, e.g. corpus=runs/codes")
    corpus = CodedCorpus.open(config.corpus)
    if not corpus.count("train"):
        raise ConfigError(f"corpus {corpus.folder}: no train split (it has {', '.join(corpus.splits)})")
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


def plan(config: Config) -> dict[str, object]:
    """What a training would do; raises all that would stop it, together."""
    problems = Problems("slm train-text-aligned")
    problems.attempt(RunFolder(config.run_dir).check, config)
    device = problems.attempt(training_device, config.device)
    precision = problems.attempt(resolve_precision, config.precision, device or "cpu")
    corpus = problems.attempt(open_corpus, config)
    data = problems.attempt(read_data, config, corpus) if corpus is not None else None
    problems.raise_all()
    facts = data.model
    words = sum(len(item.spans) for item in data.train)
    seconds = sum(len(item.codes) for item in data.train) / facts.frame_rate
    return {
        "codes": f"{facts.tokenizer}, {facts.frame_rate:g} Hz, book 0 of {facts.codebook_size} entries",
        "utterances (train, valid)": [len(data.train), len(data.valid)],
        "words a second": round(words / seconds, 2),
        "bits a second of word codes": round(words / seconds * facts.bits_per_word, 1),
        "words whose frames are known (train)": sum(int((item.spans[:, 1] > 0).sum()) for item in data.train),
        "parameters": new_text_aligned_model(facts, config.seed).num_parameters(),
        "steps": config.training.steps,
        "epochs": round(config.training.steps * config.training.batch_size / len(data.train), 1),
        "device": device,
        "precision": precision,
        "result": str(Path(config.run_dir) / "model"),
    }


def run(config: Config) -> Path:
    """Train, or go on where a killed run stopped; returns the model's folder."""
    folder = RunFolder(config.run_dir)
    folder.check(config)
    corpus = open_corpus(config)
    fingerprint = digest((corpus.folder / INDEX_NAME).read_text(encoding="utf-8"))
    refuse_other_inputs(folder, fingerprint, "corpus")
    if folder.done(config):
        log.info("%s is complete: skipped", config.run_dir)
        return folder.path("model")
    device, data = training_device(config.device), read_data(config, corpus)
    folder.start(config, fingerprint)
    seed_everything(config.seed)
    trainer = train_text_aligned(
        new_text_aligned_model(data.model, config.seed),
        data.train,
        data.valid,
        config.training,
        folder.checkpoints,
        seed=config.seed,
        device=device,
        precision=resolve_precision(config.precision, device),
        processes=process_count(),
        callbacks=[MetricsCallback(folder.metrics), TrainerProgress("train-text-aligned")],
        tensorboard=folder.path("tensorboard"),
    )
    model: TextAlignedModel = trainer.accelerator.unwrap_model(trainer.model)
    if is_main_process():
        model.save_pretrained(folder.path("model"))
        folder.mark_complete({"steps": trainer.state.global_step, **scores_of(model, data)})
    trainer.accelerator.wait_for_everyone()
    return folder.path("model")


def scores_of(model: TextAlignedModel, data: Data) -> dict[str, float]:
    """The trained model's figures of the valid split, told too; empty without a split."""
    if not data.valid:
        return {}
    found = code_scores(model, data.valid)
    for name, prefix in {"own word codes": "", "text alone": "text_alone/", "shuffled word codes": "shuffled/"}.items():
        accuracy, loss = 100 * found[f"{prefix}accuracy"], found[f"{prefix}loss"]
        log.info("%s: accuracy %.1f %%, loss %.3f nats a code", name, accuracy, loss)
    return {name: round(value, 5) for name, value in found.items()}
