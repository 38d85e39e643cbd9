"""Folders of audio without a manifest: published corpora as they are downloaded, and audio with texts beside it.

Which layout a folder has is found by what is in it, and the log says which. LibriSpeech and LibriTTS say their splits
by their folders (train-clean-100, dev-clean, test-other: here train, valid, test), be they in the path or below it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import soundfile

from tokenizer.data.utterances import LONE_SURROGATE, DataError, Utterance, text_of

logger = logging.getLogger(__name__)

NAMED = 5
SPLIT_FOLDER = re.compile(r"(train|dev|test)-(clean|other)(-\d+)?")
SPLIT_OF = {"train": "train", "dev": "valid", "test": "test"}


@dataclass(frozen=True)
class Folder:
    """All files of a folder, in the order of their paths."""

    path: Path
    files: list[Path]

    @cached_property
    def audio(self) -> list[Path]:
        """What soundfile may read."""
        endings = {f".{name.lower()}" for name in soundfile.available_formats()} | {".mp3", ".opus", ".aif"}
        return [file for file in self.files if file.suffix.lower() in endings]

    def ending(self, *endings: str) -> list[Path]:
        return [file for file in self.files if file.name.endswith(endings)]


@dataclass(frozen=True)
class Layout:
    """How one kind of folder is laid out.

    Attributes:
        name: for the log.
        fits: whether a folder is laid out so.
        read: its recordings, each with its transcript (None: it has none) and speaker.
    """

    name: str
    fits: Callable[[Folder], bool]
    read: Callable[[Folder], Iterator[tuple[Path, str | None, str]]]


def _librispeech(folder: Folder) -> Iterator[tuple[Path, str | None, str]]:
    """SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac; lines `SPEAKER-CHAPTER-NUMBER TEXT` in the chapter's .trans.txt."""
    texts = {}
    for file in folder.ending(".trans.txt"):
        for line in text_of(file).split("\n"):
            name, _, text = line.strip().partition(" ")
            texts[file.parent / name] = text.strip()
    for file in folder.audio:
        yield file, texts.get(file.with_suffix("")), file.stem.split("-")[0]


def _libritts(folder: Folder) -> Iterator[tuple[Path, str | None, str]]:
    """SPEAKER/CHAPTER/SPEAKER_CHAPTER_....wav; the text in .normalized.txt beside it, else in .original.txt."""
    text_files = set(folder.ending(".normalized.txt", ".original.txt"))
    for file in folder.audio:
        texts = [file.with_suffix(f".{kind}.txt") for kind in ("normalized", "original")]
        found = next((text_of(text).strip() for text in texts if text in text_files), None)
        yield file, found, file.stem.split("_")[0]


def _ljspeech(folder: Folder) -> Iterator[tuple[Path, str | None, str]]:
    """wavs/ID.wav; lines `ID|text|normalised text` in metadata.csv, without quotes; one speaker, the folder's name."""
    texts = {}
    for line in text_of(folder.path / "metadata.csv").split("\n"):
        name, *given = line.split("|")
        if given:
            texts[name.strip()] = next((text.strip() for text in reversed(given[:2]) if text.strip()), "")
    for file in folder.audio:
        if file.parent == folder.path / "wavs":
            yield file, texts.get(file.stem), folder.path.resolve().name


def _vctk(folder: Folder) -> Iterator[tuple[Path, str | None, str]]:
    """wav48_silence_trimmed/SPEAKER/SPEAKER_NUMBER_mic1.flac (0.80: wav48/SPEAKER/SPEAKER_NUMBER.wav) and txt/...txt.

    Of the two microphones that recorded each utterance the first is taken.
    """
    texts = set(folder.ending(".txt"))
    for file in folder.audio:
        if file.relative_to(folder.path).parts[0] in VCTK_AUDIO and not file.stem.endswith("_mic2"):
            text = folder.path / "txt" / file.parent.name / f"{file.stem.removesuffix('_mic1')}.txt"
            yield file, text_of(text).strip() if text in texts else None, file.parent.name


def _seed_tts_eval(folder: Folder) -> Iterator[tuple[Path, str | None, str]]:
    """Lines `ID|prompt's text|prompt's audio|text[|recording]` in meta.lst; wavs/ID.wav says the text.

    The prompts are voices to speak in and no utterances of the test set; their speaker is not known.
    """
    texts, there = {}, set(folder.files)
    for line in text_of(folder.path / "meta.lst").split("\n"):
        name, *given = line.strip().split("|")
        if len(given) >= 3:
            recording = given[3] if len(given) > 3 else f"wavs/{name.removesuffix('.wav')}.wav"
            texts[folder.path / recording] = given[2].strip()
    if missing := [file for file in texts if file not in there]:
        logger.warning("%s: meta.lst names %d recordings that are not there", folder.path, len(missing))
    for file in folder.audio:
        if file in texts:
            yield file, texts[file], ""


def _text_beside_audio(folder: Folder) -> Iterator[tuple[Path, str | None, str]]:
    """Any tree: the text in a .txt beside the audio, the speaker is the folder."""
    texts = set(folder.ending(".txt"))
    for file in folder.audio:
        text = file.with_suffix(".txt")
        yield file, text_of(text).strip() if text in texts else None, file.parent.name


VCTK_AUDIO = ("wav48_silence_trimmed", "wav48")
LAYOUTS = (
    Layout("LibriSpeech (*.trans.txt)", lambda f: bool(f.ending(".trans.txt")), _librispeech),
    Layout("LibriTTS (*.normalized.txt)", lambda f: bool(f.ending(".normalized.txt", ".original.txt")), _libritts),
    Layout(
        "LJSpeech (metadata.csv, wavs/)",
        lambda f: f.path / "metadata.csv" in f.files and (f.path / "wavs").is_dir(),
        _ljspeech,
    ),
    Layout(
        "VCTK (wav48*/, txt/)",
        lambda f: (f.path / "txt").is_dir() and any((f.path / name).is_dir() for name in VCTK_AUDIO),
        _vctk,
    ),
    Layout("seed-tts-eval (meta.lst)", lambda f: f.path / "meta.lst" in f.files, _seed_tts_eval),
    Layout("audio with .txt beside it", lambda f: True, _text_beside_audio),
)


def read_folder(path: Path, split: str, own_split: str | None) -> list[Utterance]:
    """The recordings of one split of a folder, by path.

    Args:
        path: the folder.
        split: train, valid or test.
        own_split: where all of it goes; None: by its folders' names, or train.

    Raises:
        DataError: if there is no audio, a name or a text is not UTF-8.
    """
    folder = Folder(path, sorted(_files(path)))
    if not folder.audio:
        raise DataError(f"{path}: no audio files in this folder")
    layout = next(layout for layout in LAYOUTS if layout.fits(folder))
    utterances, without = [], []
    for file, text, speaker in layout.read(folder):
        if split != (own_split or _split_of(path, file)):
            continue
        identity = file.relative_to(path).with_suffix("").as_posix()
        if LONE_SURROGATE.search(identity):  # how Python shows bytes of a name that are no characters
            raise DataError(f"{identity!r} in {path}: its name is not UTF-8: rename it")
        if text is None:
            without.append(identity)
        utterances.append(Utterance(id=identity, audio=str(file), text=text or "", speaker=speaker, split=split))
    logger.info("%s: read as %s: %d recordings in split %s", path, layout.name, len(utterances), split)
    # Without any it is audio alone, as the tokenizer's training needs no more.
    if without and (len(without) < len(utterances) or layout.read is not _text_beside_audio):
        shown = ", ".join(without[:NAMED]) + (f" and {len(without) - NAMED} more" if len(without) > NAMED else "")
        logger.warning("%s: %d of %d have no transcript: %s", path, len(without), len(utterances), shown)
    return utterances


def _split_of(path: Path, file: Path) -> str:
    for name in reversed((*path.resolve().parts, *file.relative_to(path).parts[:-1])):
        if found := SPLIT_FOLDER.fullmatch(name):
            return SPLIT_OF[found[1]]
    return "train"


def _files(path: Path) -> Iterator[Path]:
    """Every file below a folder, those behind links too; a link that leads back up is not followed twice."""
    seen = {os.path.realpath(path)}
    for folder, below, files in os.walk(path, followlinks=True):
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in below}
        below[:] = [name for name in below if real[name] not in seen]
        seen.update(real[name] for name in below)
        yield from (Path(folder, name) for name in files)
