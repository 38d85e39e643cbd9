"""``slm prepare-corpus``: the embedded corpus, synthesised with espeak-ng the same bytes every time.

Six-word commands (the grammar of GRID), connected digits and everyday sentences (`sentences.txt`). No text stands in
two splits; one voice is in the test split only. It needs no download, so that the whole road can be tried anywhere.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import soundfile
import soxr

from recipes.config import ConfigError
from recipes.espeak import Espeak, EspeakError, missing_message
from recipes.runtime import RunFolder, atomic_write_text, disk_errors, log, progress

SAMPLING_RATE_HZ = 16000
SENTENCES = Path(__file__).parent / "sentences.txt"
VERBS, COLOURS = ("bin", "lay", "place", "set"), ("blue", "green", "red", "white")
PREPOSITIONS, LETTERS = ("at", "by", "in", "with"), tuple("abcdefghijklmnopqrstuvxyz")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ADVERBS = ("again", "now", "please", "soon")
SHORTEST, LONGEST = 3, 7  # digits in a string


@dataclass
class Config:
    """How large the embedded corpus is and who speaks it."""

    run_dir: str = field(default="runs/corpus", metadata={"help": "the corpus's folder: audio/ and manifest.jsonl"})
    n_commands: int = field(default=600, metadata={"help": "six-word commands, over all splits"})
    n_digit_strings: int = field(default=360, metadata={"help": "strings of 3 to 7 digits, over all splits"})
    n_sentences: int = field(default=280, metadata={"help": "everyday sentences, over all splits"})
    valid_share: float = field(default=0.08, metadata={"help": "share of the texts in the valid split"})
    test_share: float = field(default=0.1, metadata={"help": "share of the texts in the test split"})
    voices: list[str] = field(
        default_factory=lambda: ["en-us", "en-us+f2", "en-us+m1", "en-us+f4", "en+m3", "en-gb-x-rp+f1"],
        metadata={"help": "espeak-ng voices of all splits, with their variants"},
    )
    held_out_voice: str = field(
        default="en-us+m7", metadata={"help": "speaks every other test utterance, nothing else"}
    )
    words_per_minute: int = field(default=165, metadata={"help": "mean speed; each utterance differs by up to 10 %"})
    seed: int = field(default=0, metadata={"help": "of the texts, the splits and the speeds"})

    def __post_init__(self) -> None:
        if not self.voices or self.held_out_voice in self.voices:
            raise ValueError("voices: name at least one, and not the held_out_voice, which is for the test split alone")
        if self.valid_share <= 0 or self.test_share <= 0 or self.valid_share + self.test_share >= 1:
            raise ValueError("valid_share and test_share must be above 0 and leave something for training")
        if min(self.n_commands, self.n_digit_strings, self.n_sentences) < 0:
            raise ValueError("n_commands, n_digit_strings and n_sentences must be 0 or more")


@dataclass(frozen=True)
class Line:
    """One utterance to be spoken."""

    id: str
    text: str
    split: str
    voice: str
    words_per_minute: int
    pitch: int

    @property
    def file(self) -> str:
        return f"audio/{self.voice}/{self.id}.flac"

    @property
    def spoken(self) -> str:
        """What espeak-ng gets: the letter a as a letter, not as an article."""
        return (
            re.sub(r"\b(at|by|in|with) a (?=\w+ \w+$)", r"\1 [[e'I]] ", self.text)
            if "command" in self.id
            else self.text
        )


def read_sentences() -> list[str]:
    """The everyday sentences, in lower case without punctuation."""
    lines = SENTENCES.read_text(encoding="utf-8").splitlines()
    return [re.sub(r"[^a-z' ]", "", line.lower()) for line in lines if line.strip()]


def make_lines(config: Config) -> list[Line]:
    """Every utterance with its text, split and voice: a function of the configuration alone.

    Raises:
        ConfigError: more texts of one kind are asked for than there are.
    """
    sentences = read_sentences()
    if config.n_sentences > len(sentences):
        raise ConfigError(f"n_sentences={config.n_sentences}: there are {len(sentences)}")
    most = len(VERBS) * len(COLOURS) * len(PREPOSITIONS) * len(LETTERS) * len(DIGITS) * len(ADVERBS)
    if config.n_commands > most // 2:
        raise ConfigError(f"n_commands={config.n_commands}: at most {most // 2}, so that they can all differ")
    rng = random.Random(config.seed)
    kinds = {
        "command": _distinct(config.n_commands, lambda: _command(rng)),
        "digits": _distinct(config.n_digit_strings, lambda: _digit_string(rng)),
        "sentence": rng.sample(sentences, config.n_sentences),
    }
    lines = []
    for kind, texts in kinds.items():
        n_valid, n_test = round(len(texts) * config.valid_share), round(len(texts) * config.test_share)
        for number, text in enumerate(texts):
            split = "valid" if number < n_valid else "test" if number < n_valid + n_test else "train"
            voice = config.voices[number % len(config.voices)]
            if split == "test" and number % 2:
                voice = config.held_out_voice
            speed = round(config.words_per_minute * rng.uniform(0.9, 1.1))
            lines.append(Line(f"{kind}-{number:04d}", text, split, voice, speed, rng.randint(42, 58)))
    if not lines:
        raise ConfigError("n_commands, n_digit_strings and n_sentences are all 0: nothing to speak")
    return lines


def _command(rng: random.Random) -> str:
    return " ".join(rng.choice(words) for words in (VERBS, COLOURS, PREPOSITIONS, LETTERS, DIGITS, ADVERBS))


def _digit_string(rng: random.Random) -> str:
    return " ".join(rng.choice(DIGITS) for _ in range(rng.randint(SHORTEST, LONGEST)))


def _distinct(count: int, draw) -> list[str]:
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts[draw()] = None
    return list(texts)


def speak(lines: list[Line], folder: Path) -> dict[str, float]:
    """Synthesise one voice's lines to FLAC files, in a process of its own.

    espeak-ng carries state from one utterance to the next, so a voice is always spoken whole, from a fresh engine.

    Returns:
        id -> duration in seconds.
    """
    engine, durations = Espeak(), {}
    for line in lines:
        waveform = engine.synthesise(line.spoken, line.voice, words_per_minute=line.words_per_minute, pitch=line.pitch)
        waveform = soxr.resample(waveform, engine.sampling_rate, SAMPLING_RATE_HZ)
        file = folder / line.file
        temporary = file.with_suffix(".tmp")
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(temporary, 0.9 * waveform, SAMPLING_RATE_HZ, format="FLAC", subtype="PCM_16")
            temporary.replace(file)
        durations[line.id] = round(len(waveform) / SAMPLING_RATE_HZ, 4)
    return durations


def plan(config: Config) -> dict[str, object]:
    """What would be synthesised; raises what would stop it."""
    if message := missing_message():
        raise ConfigError(message)
    RunFolder(config.run_dir).check(config)
    lines = make_lines(config)
    splits = {split: sum(line.split == split for line in lines) for split in ("train", "valid", "test")}
    return {
        "utterances": splits,
        "voices": ", ".join(config.voices),
        "held-out voice": config.held_out_voice,
        "words": sum(len(line.text.split()) for line in lines),
        "result": str(RunFolder(config.run_dir).path("manifest.jsonl")),
    }


def run(config: Config) -> Path:
    """Synthesise the corpus, or go on where a killed run stopped; returns the manifest."""
    folder = RunFolder(config.run_dir)
    folder.check(config)
    manifest = folder.path("manifest.jsonl")
    if folder.complete:
        log.info("%s is complete: skipped", config.run_dir)
        return manifest
    plan(config)
    folder.start(config)
    lines = make_lines(config)
    durations: dict[str, float] = {}
    by_voice = {
        voice: [line for line in lines if line.voice == voice] for voice in {line.voice: None for line in lines}
    }
    pending = {}
    with ThreadPoolExecutor(2) as pool:
        for voice, members in by_voice.items():
            done = _read_durations(_done_path(folder, members))
            if done is None:
                pending[voice] = pool.submit(_in_fresh_process, members, folder.folder)
            else:
                durations |= done
        for voice, future in progress(pending.items(), "voices", len(pending)):
            try:
                spoken = future.result()
            except (EspeakError, BrokenProcessPool) as error:
                raise ConfigError(f"voice {voice}: {error}; choose others (voices, held_out_voice)") from error
            atomic_write_text(_done_path(folder, by_voice[voice]), json.dumps(spoken))
            durations |= spoken
    rows = [
        {"id": line.id, "audio": line.file, "text": line.text, "speaker": line.voice, "duration": durations[line.id]}
        | {"split": line.split, "source": "espeak-ng"}
        for line in lines
    ]
    atomic_write_text(manifest, "".join(json.dumps(row) + "\n" for row in rows))
    minutes = sum(durations.values()) / 60
    counts = {split: sum(line.split == split for line in lines) for split in ("train", "valid", "test")}
    log.info("%d utterances, %.1f minutes: %s", len(lines), minutes, counts)
    folder.mark_complete({"utterances": counts, "minutes": round(minutes, 2)})
    return manifest


def _in_fresh_process(lines: list[Line], folder: Path) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(speak, lines, folder).result()


def _done_path(folder: RunFolder, lines: list[Line]) -> Path:
    digest = hashlib.sha256(json.dumps([asdict(line) for line in lines]).encode()).hexdigest()[:16]
    return folder.path("checkpoints", f"{lines[0].voice}-{digest}.json")


def _read_durations(path: Path) -> dict[str, float] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
