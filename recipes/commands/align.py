"""``slm align``: forced alignment of texts to their audio; each word and character with its times.

It writes a manifest of its own, ``run_dir/manifest.jsonl``: the rows of the data with the columns ``words``
(``[{word, start, end}]``) and ``characters`` in seconds, ``phones`` by pocketsphinx, and, with ``corpus``,
``word_frames`` (first frame of each word and the one behind its last, at the corpus' rate). What cannot be aligned
stands by its id and reason in ``skipped.jsonl``; with ``keep_unaligned`` in the manifest too, without times, for
trainings whose other tasks need none. A killed run goes on where it stopped. ``plot=N`` draws the first N utterances.

Errors: ConfigError for data, corpus or aligner that are not there; one utterance that fails stops nothing.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eval.judges.aligner import Aligner, aligner_config, delay_error, load_aligner
from eval.judges.config import JudgeConfig, JudgeError
from eval.judges.judge import check_judge
from eval.judges.sphinx_aligner import SphinxAligner
from eval.judges.whisper_aligner import WhisperAligner
from eval.speech.alignment import AlignmentError, word_frames
from recipes.config import ConfigError
from recipes.encoding.plan import read_splits
from recipes.runs.embedded import model_path, resolve
from recipes.runs.files import disk_errors, write_jsonl
from recipes.runs.inputs import digest, refuse_other_inputs
from recipes.runs.logs import log, the_first
from recipes.runs.machine import resolve_device
from recipes.runs.manifests import kept_rows, manifest_row
from recipes.runs.progress import Progress
from recipes.runs.run_folder import ADJUSTABLE, RunFolder
from slm.corpus import CodedCorpus
from tokenizer.data.audio import load_audio
from tokenizer.data.utterances import SPLITS, AudioError, DataSource, Utterance

SPHINX = "pocketsphinx"
CHECKED = 5  # utterances that show whether an aligner's times follow the audio
MOST_DELAY_ERROR_S = 0.1


@dataclass
class Config:
    """What is aligned, and by which recogniser."""

    data: list[DataSource] = field(default_factory=list, metadata={"help": "sources with texts, of files"})
    splits: list[str] = field(default_factory=lambda: list(SPLITS), metadata={"help": "splits that are aligned"})
    run_dir: str = field(default="runs/align", metadata={"help": "where manifest.jsonl and skipped.jsonl go"})
    aligner: str = field(
        default=SPHINX,
        metadata={
            "help": "pocketsphinx (extra eval; American English, phones too), or by folder or hub name a Whisper "
            "(openai/whisper-base) or a CTC model of characters (facebook/wav2vec2-base-960h); one whose times do not "
            "follow the audio is refused"
        },
    )
    revision: str | None = field(default=None, metadata={"help": "commit or tag of a hub model"})
    corpus: str | None = field(
        default=None, metadata={"help": "coded corpus of the same ids (slm encode): adds word_frames at its frame rate"}
    )
    keep_unaligned: bool = field(
        default=False,
        metadata={
            "help": "manifest.jsonl also holds what could not be aligned, without times: for a training whose other "
            "tasks need none"
        },
    )
    plot: int = field(default=0, metadata={"help": "pictures of the first N utterances, in plots/", **ADJUSTABLE})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda", **ADJUSTABLE})

    def __post_init__(self) -> None:
        if self.plot < 0 or not set(self.splits) <= set(SPLITS):
            raise ValueError(f"plot must be 0 or more, and splits some of {', '.join(SPLITS)}")

    @property
    def judge(self) -> JudgeConfig:
        """The aligner as a judge."""
        if self.aligner == SPHINX:
            return JudgeConfig(name=SPHINX)
        return aligner_config(resolve(self.aligner), self.aligner, self.revision)


def plan(config: Config) -> dict[str, object]:
    """What would be aligned; raises all that would stop it."""
    RunFolder(config.run_dir).check(config)
    utterances = _utterances(config)
    try:
        identity = check_judge(config.judge)
    except JudgeError as error:
        raise ConfigError(str(error)) from error
    facts = {"utterances": len(utterances), "aligner": config.aligner, "kind": identity["kind"]}
    if config.corpus is not None:
        facts["frame rate"] = CodedCorpus.open(config.corpus).metadata.frame_rate
    return facts | {"result": str(RunFolder(config.run_dir).path("manifest.jsonl"))}


def run(config: Config) -> Path:
    """Align, or go on where a killed run stopped; returns the manifest."""
    folder = RunFolder(config.run_dir)
    folder.check(config)
    utterances = _utterances(config)
    fingerprint = _fingerprint(config, utterances, folder)
    refuse_other_inputs(folder, fingerprint, "data, aligner or corpus" if config.corpus else "data or aligner")
    manifest = folder.path("manifest.jsonl")
    if folder.complete:
        log.info("%s is complete: skipped", config.run_dir)
        return manifest
    plan(config)
    folder.start(config, fingerprint)
    n_frames, frame_rate = _coded(config)
    parts = folder.checkpoints / "rows.jsonl"
    done = kept_rows(parts)
    progress = Progress("align", len(utterances), len(done))
    aligner = _load(config, utterances) if len(done) < len(utterances) else None
    with disk_errors(parts), parts.open("a", encoding="utf-8") as stream:
        for number, utterance in enumerate(utterances):
            if utterance.id in done:
                continue
            row = manifest_row(utterance, manifest.parent, {})
            try:
                audio = load_audio(utterance, aligner.sampling_rate)
                found = aligner.align(audio, utterance.text)
                row |= {"words": found.words, "characters": found.characters}
                row |= {"phones": found.phones} if found.phones else {}
                row["duration"] = row["duration"] or round(len(audio) / aligner.sampling_rate, 4)
                if config.corpus is not None:
                    row["word_frames"] = _word_frames(row, n_frames, frame_rate)
            except (AudioError, AlignmentError) as error:
                row = {"id": utterance.id, "error": str(error)}
            else:
                if number < config.plot:
                    _draw(audio, aligner.sampling_rate, row, folder.path("plots", f"{number:03d}.png"))
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            done[utterance.id] = row
            progress.update()
    progress.close()
    rows = [done[utterance.id] for utterance in utterances]
    aligned = [row for row in rows if "error" not in row]
    skipped = [row for row in rows if "error" in row]
    if not config.keep_unaligned:
        for line in the_first(f"{row['id']}: not aligned: {row['error']}" for row in skipped):
            log.warning("%s", line)
    write_jsonl(folder.path("skipped.jsonl"), skipped)
    if config.keep_unaligned:
        plain = [manifest_row(utterance, manifest.parent, {}) for utterance in utterances]
        write_jsonl(manifest, [own if "error" in row else row for row, own in zip(rows, plain, strict=True)])
    else:
        write_jsonl(manifest, aligned)
    kept_too = "; they are in the manifest without times" if config.keep_unaligned and skipped else ""
    log.info("aligned %d of %d utterances (skipped.jsonl)%s: %s", len(aligned), len(rows), kept_too, manifest)
    if not aligned:
        parts.unlink()  # so that the same command tries again what has been mended
        raise ConfigError(
            f"none of the {len(rows)} utterances could be aligned; {folder.path('skipped.jsonl')} says why: "
            f"{skipped[0]['error']}"
        )
    folder.mark_complete({"aligned": len(aligned), "skipped": len(skipped)})
    return manifest


def _utterances(config: Config) -> list[Utterance]:
    if not config.data:
        raise ConfigError("data: nothing to align; give data=[{path: manifest.jsonl}]")
    found = [utterance for own in read_splits(config.data, config.splits).values() for utterance in own]
    if strays := [item.id for item in found if not isinstance(item.audio, str)]:
        raise ConfigError(f"data: {strays[0]} lies in a table; align reads files: give a manifest or a folder")
    return found


def _fingerprint(config: Config, utterances: list[Utterance], folder: RunFolder) -> str:
    """A hash of the rows that the manifest takes over, of the aligner, and of the corpus that counts the frames."""
    rows = [json.dumps(manifest_row(utterance, folder.folder, {})) for utterance in utterances]
    aligner = SPHINX if config.aligner == SPHINX else model_path(config.aligner)
    return digest(rows, aligner, *([Path(config.corpus).expanduser()] if config.corpus else []))


def _load(config: Config, utterances: list[Utterance]) -> Aligner | SphinxAligner | WhisperAligner:
    if config.aligner == SPHINX:
        return SphinxAligner()
    aligner = load_aligner(config.judge, resolve_device(config.device))
    _check_times(config, aligner, utterances)
    return aligner


def _check_times(config: Config, aligner: Aligner | WhisperAligner, utterances: list[Utterance]) -> None:
    """Raises ConfigError where the words do not move with the audio in the median of the first few utterances."""
    errors: list[float] = []
    for utterance in utterances:
        if len(errors) == CHECKED:
            break
        with contextlib.suppress(AudioError, AlignmentError):  # each is named when its turn comes
            errors.append(delay_error(aligner, load_audio(utterance, aligner.sampling_rate), utterance.text))
    if errors and (error := float(np.median(errors))) > MOST_DELAY_ERROR_S:
        raise ConfigError(
            f"aligner {config.aligner}: its times do not follow the audio. With 0.4 s of silence put in front, words "
            f"move by another amount, {error:.2f} s off in the median of {len(errors)} utterances (at most "
            f"{MOST_DELAY_ERROR_S}); name another aligner, such as pocketsphinx"
        )


def _coded(config: Config) -> tuple[dict[str, int], float]:
    """Frames of each utterance of the corpus, and its frame rate; nothing where none is named."""
    if config.corpus is None:
        return {}, 0.0
    corpus = CodedCorpus.open(config.corpus)
    rows = (row for split in corpus.splits for row in corpus.rows(split))
    return {row["id"]: row["audio_codes"].shape[1] for row in rows}, corpus.metadata.frame_rate


def _word_frames(row: dict[str, Any], n_frames: dict[str, int], frame_rate: float) -> list[list[int]]:
    if row["id"] not in n_frames:
        raise AlignmentError("the coded corpus has no utterance of this id")
    return word_frames([(word["start"], word["end"]) for word in row["words"]], frame_rate, n_frames[row["id"]])


def _draw(audio: np.ndarray, rate: int, row: dict[str, Any], path: Path) -> None:
    """Waveform and spectrogram with the words' boundaries."""
    figure = Figure(figsize=(max(6.0, 2.5 * len(audio) / rate), 4.0), layout="constrained")
    wave, spectrum = figure.subplots(2, 1, sharex=True)
    wave.plot(np.arange(len(audio)) / rate, audio, linewidth=0.4, color="#3d8fd1")
    spectrum.specgram(audio + 1e-6, NFFT=512, Fs=rate, noverlap=384, cmap="magma")
    for word in row["words"]:
        for axes in (wave, spectrum):
            axes.axvspan(word["start"], word["end"], color="#e0803c", alpha=0.2)
        wave.text(
            (word["start"] + word["end"]) / 2, wave.get_ylim()[1], word["word"], ha="center", va="top", fontsize=8
        )
    wave.set_title(row["id"], fontsize=9, loc="left")
    spectrum.set_xlabel("seconds")
    spectrum.set_ylabel("Hz")
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        figure.savefig(path, dpi=110)
