"""The recordings of a training: read, cut into crops, and their hash."""

from __future__ import annotations

import dataclasses
import json
import os

import torch

from recipes.config import ConfigError
from recipes.exporting.discriminators import discriminator_file
from recipes.runs.embedded import model_path
from recipes.runs.inputs import digest
from recipes.runs.logs import log
from recipes.runs.machine import process_count
from recipes.tokenizer_training.config import Config, model_sizes
from recipes.tokenizer_training.objective import teacher_config
from tokenizer.data.characters import COLUMN, read_spans
from tokenizer.data.crops import TrainingCrops, micro_batch_size, validation_crops
from tokenizer.data.manifest import read_source
from tokenizer.data.mixing import CACHE_BYTES, TrainingAudio, training_audio, validation_utterances
from tokenizer.data.utterances import DataError, DataSource
from tokenizer.teacher.recogniser_training import RecogniserTrainingConfig
from tokenizer.training.state import CodecTrainingConfig


def inputs_digest(config: Config) -> str:
    """A hash of what decides the weights beside the configuration: training recordings, teacher, initial weights."""
    sources = training_sources(config)
    tables = [read_source(source, "train", needs_text=False) for source in sources if not source.stream]
    listed = [utterance for table in tables for utterance in table]
    rows = (json.dumps([u.id, u.speaker, u.duration, *u.columns.values()]) for u in listed)
    taught_by = teacher_config(config)
    judges = [discriminator_file(config.init_from)[0]] if config.init_discriminators and config.init_from else []
    return digest(rows, model_path(taught_by.name if taught_by else None), model_path(config.init_from), *judges)


def read_audio(config: Config) -> TrainingAudio:
    """The recordings of the train split, with their aligned characters where contrastive distillation reads them."""
    # Each process of this machine that decodes, a loader's worker or a training itself, keeps its part of the whole.
    decoding = max(1, config.training.num_workers) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    audio = training_audio(
        training_sources(config),
        model_sizes(config).sampling_rate,
        config.seed,
        needs_text=False,
        cache_bytes=CACHE_BYTES // decoding,
    )
    if config.distillation.kind == "contrastive":
        for utterance in (row for part in audio.parts for row in part.utterances):
            read_spans(utterance)
    return audio


def training_sources(config: Config) -> list[DataSource]:
    """The sources, for contrastive distillation with the column of aligned characters.

    Raises:
        ConfigError: one of them is streamed, and what it holds is not known beforehand.
    """
    if config.distillation.kind != "contrastive":
        return config.data
    if streamed := [source.path for source in config.data if source.stream]:
        raise ConfigError(
            f"distillation.kind=contrastive reads aligned characters, which a stream has not: give {streamed[0]} as a "
            "manifest.jsonl with the column `characters` (stream=false), or take another distillation.kind"
        )
    return [
        dataclasses.replace(source, columns=list(dict.fromkeys([*source.columns, COLUMN]))) for source in config.data
    ]


def make_crops(config: Config) -> TrainingCrops:
    """The crops of all steps, in the order that the seed decides."""
    model_config, audio = model_sizes(config), read_audio(config)
    length = config.training.steps * config.training.batch_size
    hop = model_config.hop_length if config.distillation.kind == "contrastive" else None
    changes = config.invariance.changes if config.invariance.weight else None
    n_books = len(model_config.codebook_sizes)
    return TrainingCrops(audio, config.crops, config.augmentation, n_books, length, config.seed, hop, changes)


def valid_crops(config: Config, min_samples: int) -> list[torch.Tensor] | None:
    """Crops (1, S) of the valid split; None, with a warning, where there is none."""
    limit = config.training.validate_crops
    try:
        sources = validation_utterances(config.data, limit)
    except DataError as error:
        log.warning("training without validation: %s", error)
        return None
    return validation_crops(sources, model_sizes(config).sampling_rate, config.crops.crop_s, limit, min_samples)


def items_at_once(training: CodecTrainingConfig | RecogniserTrainingConfig) -> int:
    """Items in one forward pass of one process. Raises ConfigError where a step's batch cannot be divided so."""
    try:
        return micro_batch_size(training.batch_size, training.accumulation, process_count())
    except ValueError as error:
        raise ConfigError(str(error)) from None
