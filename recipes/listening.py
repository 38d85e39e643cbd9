"""What a report lets one hear: clips of a few utterances, and the quality of the tokenizer's audio."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from eval.audio import resample
from eval.schema import SYSTEMS, Clip, Row, Sample
from eval.speech import QualitySummary, compare_audio, summarise_quality
from eval.text import get_normaliser
from eval.wer import error_listing, score_pairs
from recipes.progress import progress
from recipes.runtime import atomic_write_text
from recipes.systems import System

CLIP_HZ = 16_000


def quality_of(systems: Sequence[System], test_set: str, samples: int, seed: int) -> list[QualitySummary]:
    """The tokenizer's audio against the recordings (synthesised speech does not run in step with them).

    ``samples`` and ``seed`` are those of the bootstrap over clips.
    """
    truth = next((system for system in systems if system.kind == "ground_truth"), None)
    summaries = []
    for system in systems:
        if truth is None or system.kind not in ("reconstruction", "semantic_reconstruction", "resynthesis"):
            continue
        pairs = [(truth.audios[i], audio) for i, audio in system.audios.items() if audio is not None]
        compared = [
            compare_audio(reference, audio, truth.sampling_rate, system.sampling_rate)
            for reference, audio in progress(pairs, f"quality of {system.name}", total=len(pairs))
        ]
        summaries.append(summarise_quality(system.name, system.model, compared, test_set, samples, seed))
    return summaries


def listening_samples(
    folder: Path,
    count: int,
    references: dict[str, str],
    systems: Sequence[System],
    heard: Sequence[dict[str, dict[str, str | None]]],
) -> list[Sample]:
    """A few utterances, spread over the test set, as FLAC files (a lossy format would add a codec of its own).

    Args:
        folder: where the files go; earlier ones of such names are replaced, others stay.
        count: how many utterances.
        references: id -> text of the test set.
        systems: what was scored.
        heard: for each system, judge -> id -> text.
    """
    spoken = [(i, system) for i, system in enumerate(systems) if system.kind != "asr"]
    ids = [i for i in references if spoken and any(system.audios.get(i) is not None for _, system in spoken)]
    chosen = [ids[k] for k in np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)]
    folder.mkdir(parents=True, exist_ok=True)
    own = re.compile(rf"\d+-\d+-({'|'.join(map(slug, SYSTEMS))})\.flac")
    for path in folder.iterdir():
        if own.fullmatch(path.name):
            path.unlink()
    samples = []
    for number, utterance_id in enumerate(chosen):
        sample = Sample(utterance_id, references[utterance_id])
        for i, system in spoken:
            audio = system.audios.get(utterance_id)
            if audio is None:
                continue
            file = folder / f"{number}-{i}-{slug(system.kind)}.flac"
            soundfile.write(file, np.clip(resample(audio, system.sampling_rate, CLIP_HZ), -1, 1), CLIP_HZ)
            texts = {judge: str(found.get(utterance_id) or "") for judge, found in heard[i].items()}
            if system.kind == "ground_truth":
                texts |= {s.name: str(s.texts.get(utterance_id) or "") for s in systems if s.kind == "asr"}
            sample.clips.append(Clip(system.name, str(file.resolve()), texts))
        samples.append(sample)
    return samples


def slug(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def write_listings(folder: Path, rows: Sequence[Row]) -> None:
    """``errors-<judge>-<row>-<model>.txt``: every utterance, worst first."""
    for row in rows:
        parts = [str(row.protocol.judge.get("name", "")), row.name, row.model]
        rates = score_pairs(
            [u.reference for u in row.utterances],
            [u.hypothesis for u in row.utterances],
            get_normaliser("none"),
            [u.id for u in row.utterances],
        )
        title = ", ".join(part for part in parts if part)
        atomic_write_text(folder / f"errors-{slug(title)}.txt", error_listing(rates, title))
