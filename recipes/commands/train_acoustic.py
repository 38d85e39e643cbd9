"""``slm train-acoustic``: a second stage that gives an SLM's semantic codes a voice.

A small bidirectional transformer learns from book 0 and the whole codes of another utterance of the speaker either to
fill codebooks 1..K-1, by masked prediction (``objective=masked``; SoundStorm, Borsos et al. 2023), or what these add to
the tokenizer's latents, which its main decoder turns into sound: by flow matching (``flow``; CosyVoice, Du et al.
2024), by diffusion (``diffusion``; Diff-LM-Speech, Qiang et al. 2023) or as the mean (``regression``). It learns
from a coded corpus alone, no audio and no text; all but masked read the tokenizer's codebooks too. Codes of a
tokenizer without a decoder (supervised tokens) are lent one: ``decoder_corpus`` holds the same recordings in an LM-SPT
tokenizer's codes, all of which are then predicted. Checkpoints and resume as in ``slm finetune``. The result,
``run_dir/model``, is what ``slm synthesize acoustic=... voice=...`` and ``slm evaluate acoustic=...`` take; it
remembers whose codes it fills and refuses others.

Raises: AcousticError, CorpusError, ConfigError, TrainingError, all ValueErrors that name the key or the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from recipes.encoding.books import tokenizer_of_corpus
from recipes.encoding.copies import varied_copies
from recipes.encoding.joined import decoder_facts, decoder_metadata, given_sizes, joined_rows
from recipes.runs.logs import log
from recipes.runs.small_models import SmallModelRun, open_training_corpus
from recipes.runs.tracking import TrainerProgress
from slm.acoustic.configuration import (
    MASKED,
    AcousticConfig,
    AcousticError,
    AcousticSizes,
    LatentConfig,
    LatentSettings,
    Objective,
)
from slm.acoustic.latent_model import new_latent_model
from slm.acoustic.latent_space import LatentSpace, fit_latent_space
from slm.acoustic.masked_model import new_acoustic_model
from slm.acoustic.masked_scores import unigram_scores
from slm.acoustic.samples import Item, VoicedUtterances, evaluation_items
from slm.acoustic.stages import Stage, kind_of
from slm.acoustic.training import AcousticTraining, train_acoustic
from slm.corpus import CodedCorpus, CodedRow
from slm.training.small_models import SmallModelTrainer


@dataclass
class Config:
    """What an acoustic stage is trained on, and its size."""

    run_dir: str = field(default="runs/acoustic", metadata={"help": "run folder; the model goes to run_dir/model"})
    corpus: str = field(default="", metadata={"help": "coded corpus: the run_dir of `slm encode`, of all books"})
    decoder_corpus: str = field(
        default="",
        metadata={
            "help": "coded corpus of the same recordings by an LM-SPT tokenizer of the same frame rate, whose decoder "
            "then makes sound of codes that have none, such as supervised tokens; all its books are predicted"
        },
    )
    objective: Objective = field(
        default=MASKED,
        metadata={
            "help": "masked: predict masked codes book by book (SoundStorm); what the books add to the tokenizer's "
            "latents: flow (flow matching, CosyVoice), diffusion (Diff-LM-Speech), regression (their mean)"
        },
    )
    latents: LatentSettings = field(
        default_factory=LatentSettings, metadata={"help": "not masked: what of the latents is predicted"}
    )
    min_prompt_s: float = field(
        default=1.0, metadata={"help": "seconds of the voice at least; a shorter one is refused"}
    )
    max_prompt_s: float = field(default=3.0, metadata={"help": "seconds of the voice that are read at most"})
    window_s: float = field(
        default=8.0, metadata={"help": "seconds that are filled at once; longer speech is filled piece by piece"}
    )
    valid_limit: int = field(default=300, metadata={"help": "utterances of the valid split that are scored at most"})
    sizes: AcousticSizes = field(default_factory=AcousticSizes, metadata={"help": "sizes of the transformer"})
    training: AcousticTraining = field(default_factory=AcousticTraining, metadata={"help": "steps and rates"})
    seed: int = field(default=0, metadata={"help": "of weights, order, voices, masks and noise"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    precision: str = field(default="auto", metadata={"help": "auto, fp32, bf16 or fp16"})

    def __post_init__(self) -> None:
        if not 0 < self.min_prompt_s <= self.max_prompt_s:
            raise ValueError(
                f"min_prompt_s={self.min_prompt_s:g}, max_prompt_s={self.max_prompt_s:g}: must be above 0, and the "
                "second no smaller than the first"
            )
        if self.window_s <= 0:
            raise ValueError(f"window_s={self.window_s:g}: must be above 0")
        if self.valid_limit < 0:
            raise ValueError(f"valid_limit={self.valid_limit}: must be 0 or more")


@dataclass
class Data:
    """What a training learns from and is scored on, and the stage's configuration that follows from the corpus.

    `space` is None where the stage is trained by masked prediction.
    """

    model: AcousticConfig
    train: VoicedUtterances
    valid: list[Item]
    space: LatentSpace | None = None


def open_corpus(config: Config) -> CodedCorpus:
    """The corpus, checked. Raises ConfigError, CorpusError."""
    return open_training_corpus(config.corpus)


def model_facts(config: Config, corpus: CodedCorpus) -> dict[str, Any]:
    """What the stage's configuration says: the sizes that are asked for, and the codec whose codes the corpus holds."""
    facts, decoder = corpus.metadata, decoder_metadata(config, corpus)
    return {
        "codebook_sizes": facts.codebook_sizes if decoder is None else given_sizes(facts, decoder),
        "frame_rate": facts.frame_rate,
        "sampling_rate": facts.sampling_rate,
        "fingerprint": facts.fingerprint,
        "precision": facts.precision,
        "tokenizer": facts.tokenizer,
        "decoder": None if decoder is None else decoder_facts(decoder),
        "objective": config.objective,
        "min_prompt_s": config.min_prompt_s,
        "max_prompt_s": config.max_prompt_s,
        "window_s": config.window_s,
        **dataclasses.asdict(config.sizes),
    }


def latent_parts(config: Config, corpus: CodedCorpus) -> tuple[LatentConfig, LatentSpace]:
    """The configuration of a stage that predicts latents, and the space that it predicts in.

    Raises:
        AcousticError: There are fewer acoustic books than asked for, or they add nothing.
        ConfigError: The corpus's tokenizer is no LM-SPT tokenizer, or is another by now.
    """
    facts, settings = model_facts(config, corpus), config.latents
    sizes, decoder = facts["codebook_sizes"], CodedCorpus.open(config.decoder_corpus or corpus.folder)
    n_books = settings.books or len(sizes) - 1
    if n_books > len(sizes) - 1:
        raise AcousticError(f"latents.books: {n_books}: the tokenizer has {len(sizes) - 1} of them")
    way_out = "or take objective=masked, which learns from the codes alone"
    tokenizer = tokenizer_of_corpus(decoder.metadata, str(decoder.folder), f"objective={config.objective}", way_out)
    # Of the decoder's own books; book 0 is predicted too where it is not given.
    first = 0 if config.decoder_corpus else 1
    entries = tokenizer.quantizer.entries(first + n_books)[first:]
    rows = (row["audio_codes"][: 1 + n_books] for row in joined_rows(config, corpus, "train"))
    space = fit_latent_space(sizes[0], entries, rows, settings.variance)
    model = LatentConfig(
        n_added_books=n_books,
        latent_dim=space.directions.shape[1],
        space_dim=space.directions.shape[0],
        condition_dropout=settings.condition_dropout,
        **facts,
    )
    return model, space


def read_data(config: Config, corpus: CodedCorpus) -> Data:
    """The corpus's utterances with their voices. Raises AcousticError where none can be used, and as `latent_parts`."""
    model, space = AcousticConfig(**model_facts(config, corpus)), None
    model.check_books()
    if config.objective != MASKED:
        model, space = latent_parts(config, corpus)

    def plain(split: str) -> Iterator[CodedRow]:
        varied = varied_copies(corpus, split)
        if varied:
            log.warning("corpus %s: %d varied copies are left out: a speed is no voice", corpus.folder, len(varied))
        yield from (row for row in joined_rows(config, corpus, split) if row["id"] not in varied)

    train, valid = VoicedUtterances(plain("train"), model), []
    if train.n_left_out:
        log.warning("left out of the training: %d utterances, too short to give a voice too", train.n_left_out)
    if corpus.count("valid") and config.valid_limit:
        try:
            valid = evaluation_items(VoicedUtterances(plain("valid"), model), config.valid_limit, config.seed)
        except AcousticError as error:
            log.warning("the valid split is not scored: %s", error)
    return Data(model, train, valid, space)


def new_model(data: Data, seed: int) -> Stage:
    """The stage with random weights."""
    if data.space is None:
        return new_acoustic_model(data.model, seed)
    return new_latent_model(data.model, data.space, seed)


def facts_of(config: Config, data: Data) -> dict[str, object]:
    """What a plan says of the data."""
    facts = data.model
    return {
        "codes": f"{facts.tokenizer}, {facts.frame_rate:g} Hz, books {facts.codebook_sizes}",
        **({} if facts.other_decoder is None else {"decoder": facts.other_decoder.tokenizer}),
        "objective": config.objective,
        **({} if data.space is None else {"latents": f"{facts.space_dim} of {facts.latent_dim} directions"}),
        "utterances (train, valid)": [len(data.train), len(data.valid)],
        "speakers": data.train.n_speakers,
        "frames": sum(data.train.codes[number].shape[1] for number in data.train.numbers),
    }


def train(
    model: Stage, data: Data, settings: AcousticTraining, *, callbacks: list[TrainerCallback], **how: Any
) -> SmallModelTrainer:
    """Trains a stage, and shows how far it is."""
    shown = [*callbacks, TrainerProgress("train-acoustic")]
    return train_acoustic(model, data.train, data.valid, settings, callbacks=shown, **how)


def scores_of(model: Stage, data: Data) -> dict[str, float]:
    """The trained stage's figures of the valid split, told too; empty without a split."""
    if not data.valid:
        return {}
    found = kind_of(data.model).scores(model, data.valid)
    if data.space is None:
        train = (data.train.codes[number] for number in data.train.numbers)
        found |= unigram_scores(train, data.valid, data.model)
        tell_book_scores(found, data.model.n_codebooks)
    else:
        log.info("explained: %.1f %% of the variance about each code's mean", 100 * found["explained"])
    return {name: round(value, 5) for name, value in found.items()}


def tell_book_scores(found: dict[str, float], n_books: int) -> None:
    """Tells the figures of each book."""
    for book in range(1, n_books):
        accuracy, unigram = (100 * found[f"{name}accuracy/book{book}"] for name in ("", "unigram_"))
        losses = (found[f"{name}loss/book{book}"] for name in ("", "unigram_"))
        log.info(
            "book %d: accuracy %.1f %% (unigram %.1f %%), loss %.3f (unigram %.3f)", book, accuracy, unigram, *losses
        )


def further_corpora(config: Config) -> list[str]:
    """What the training reads beside `corpus`."""
    return [config.decoder_corpus] if config.decoder_corpus else []


RUN = SmallModelRun("train-acoustic", open_corpus, read_data, new_model, facts_of, train, scores_of, further_corpora)


def plan(config: Config) -> dict[str, object]:
    """What a training would do; raises all that would stop it, together."""
    return RUN.plan(config)


def run(config: Config) -> Path:
    """Train, or go on where a killed run stopped; returns the model's folder."""
    return RUN.run(config)
