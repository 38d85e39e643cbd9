"""``slm prepare-corpus``: a corpus synthesised with espeak-ng, the same bytes every time.

Six-word commands (the grammar of GRID), connected digits, everyday sentences (`sentences.txt`) and phrases recombined
from the texts of other corpora. No text stands in two splits; one voice is in the test split only. It needs no
download, so that the whole road can be tried anywhere. Voices of flite (``flite:slt``) speak too where it is installed.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError, Problems
from recipes.runs.files import atomic_write_text, text_lines
from recipes.runs.logs import log
from recipes.runs.progress import progress
from recipes.runs.run_folder import RunFolder
from recipes.voices import espeak, flite, piper
from recipes.voices.speaking import Line, engine_of, speak, voice_name
from tokenizer.data.manifest import read_source
from tokenizer.data.utterances import SPLITS, DataSource

SENTENCES = Path(espeak.__file__).parent / "sentences.txt"
VERBS, COLOURS = ("bin", "lay", "place", "set"), ("blue", "green", "red", "white")
PREPOSITIONS, LETTERS = ("at", "by", "in", "with"), tuple("abcdefghijklmnopqrstuvxyz")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ADVERBS = ("again", "now", "please", "soon")
SHORTEST, LONGEST = 3, 7  # digits in a string
SOURCES = {espeak: "espeak-ng", flite: "flite", piper: "piper"}
PIPER_LINES = 200  # of one process: a few minutes of work


@dataclass
class Config:
    """How large the embedded corpus is and who speaks it."""

    run_dir: str = field(default="runs/corpus", metadata={"help": "the corpus's folder: audio/ and manifest.jsonl"})
    n_commands: int = field(default=600, metadata={"help": "six-word commands, over all splits"})
    n_digit_strings: int = field(default=360, metadata={"help": "strings of 3 to 7 digits, over all splits"})
    n_sentences: int = field(default=280, metadata={"help": "sentences of `sentences`, over all splits"})
    sentences: str | None = field(
        default=None,
        metadata={"help": "a text file, a sentence a line, spoken as it stands; null: 290 everyday ones of our own"},
    )
    n_phrases: int = field(
        default=0, metadata={"help": "phrases of 4 to 9 words after the word pairs of `texts_from`, over all splits"}
    )
    texts_from: list[str] = field(
        default_factory=list,
        metadata={"help": "manifests: phrases follow their training texts; a text of their other splits is never said"},
    )
    texts_excluded: list[str] = field(
        default_factory=list,
        metadata={"help": "manifests: texts of their valid and test splits are left out of all splits here"},
    )
    valid_share: float = field(default=0.08, metadata={"help": "share of the texts in the valid split"})
    test_share: float = field(default=0.1, metadata={"help": "share of the texts in the test split"})
    voices: list[str] = field(
        default_factory=lambda: ["en-us", "en-us+f2", "en-us+m1", "en-us+f4", "en+m3", "en-gb-x-rp+f1"],
        metadata={"help": "of all splits: espeak-ng's with their variants, flite:slt and so on, piper:VOICE.onnx"},
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
        if min(self.n_commands, self.n_digit_strings, self.n_sentences, self.n_phrases) < 0:
            raise ValueError("n_commands, n_digit_strings, n_sentences and n_phrases must be 0 or more")
        if self.n_phrases and not self.texts_from:
            raise ValueError("n_phrases: name the manifests whose words they use (texts_from)")


def read_sentences(file: str | None = None) -> list[str]:
    """The sentences of a file as they stand; without one our everyday ones, in lower case without punctuation.

    Raises:
        ConfigError: no such file, or not UTF-8.
    """
    if file is None:
        return [_plain(line) for line in text_lines(SENTENCES) if line.strip()]
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"sentences: no such file: {path}")
    try:
        return list(dict.fromkeys(line.strip() for line in path.read_text("utf-8").split("\n") if line.strip()))
    except UnicodeDecodeError as error:
        raise ConfigError(f"sentences: {path} is not UTF-8 ({error})") from error


def _plain(text: str) -> str:
    return re.sub(r"[^a-z' ]", "", text.lower())


def make_lines(config: Config) -> list[Line]:
    """Every utterance with its text, split and voice: a function of the configuration alone.

    Raises:
        ConfigError: more texts of one kind are asked for than there are.
    """
    sentences = read_sentences(config.sentences)
    if config.n_sentences > len(sentences):
        raise ConfigError(f"n_sentences={config.n_sentences}: there are {len(sentences)}")
    most = len(VERBS) * len(COLOURS) * len(PREPOSITIONS) * len(LETTERS) * len(DIGITS) * len(ADVERBS)
    if config.n_commands > most // 2:
        raise ConfigError(f"n_commands={config.n_commands}: at most {most // 2}, so that they can all differ")
    rng = random.Random(config.seed)
    training_texts, held_out = _other_texts(config.texts_from)
    never = held_out | _other_texts(config.texts_excluded)[1]
    said: dict[str, str] = {}  # every text so far, of any kind, and its split
    kinds: dict[str, dict[str, str]] = {}

    def distinct(kind: str, count: int, draw: Callable[[], str]) -> None:
        kinds[kind] = _distinct(_splits(count, config), draw, never, said)
        said.update(kinds[kind])

    distinct("command", config.n_commands, lambda: _command(rng))
    distinct("digits", config.n_digit_strings, lambda: _digit_string(rng))
    # As they sound: "5 cats." and "five cats" are one text, which may not stand in two splits.
    drawn = {_plain(get_normaliser("basic")(text)): text for text in rng.sample(sentences, config.n_sentences)}
    chosen = [text for plain, text in drawn.items() if not {text, plain} & (never | said.keys())]
    kinds["sentence"] = dict(zip(chosen, _splits(len(chosen), config), strict=True))
    said.update(kinds["sentence"])
    if config.n_phrases:
        follows = _word_pairs(training_texts)
        distinct("phrase", config.n_phrases, lambda: _phrase(rng, follows))
    lines = []
    for kind, texts in kinds.items():
        for number, (text, split) in enumerate(texts.items()):
            voice = config.voices[number % len(config.voices)]
            if split == "test" and number % 2:
                voice = config.held_out_voice
            speed = round(config.words_per_minute * rng.uniform(0.9, 1.1))
            lines.append(Line(f"{kind}-{number:04d}", text, split, voice, speed, rng.randint(42, 58)))
    if not lines:
        raise ConfigError("n_commands, n_digit_strings, n_sentences and n_phrases are all 0: nothing to speak")
    return lines


def _command(rng: random.Random) -> str:
    return " ".join(rng.choice(words) for words in (VERBS, COLOURS, PREPOSITIONS, LETTERS, DIGITS, ADVERBS))


def _digit_string(rng: random.Random) -> str:
    return " ".join(rng.choice(DIGITS) for _ in range(rng.randint(SHORTEST, LONGEST)))


def _other_texts(manifests: list[str]) -> tuple[list[str], set[str]]:
    """Normalised texts of manifests: those of their training splits, and those of the others."""
    training, held_out = [], []
    for manifest in manifests:
        for split in SPLITS:
            texts = training if split == "train" else held_out
            for utterance in read_source(DataSource(path=manifest), split):
                texts.append(_plain(get_normaliser("basic")(utterance.text)))
    return training, set(held_out)


def _word_pairs(texts: list[str]) -> dict[str, list[str]]:
    """Which words follow a word, as often as they do; the empty word stands before a text and after it."""
    follows: dict[str, list[str]] = {}
    for text in texts:
        words = ["", *text.split(), ""]
        for first, second in pairwise(words):
            follows.setdefault(first, []).append(second)
    return follows


def _phrase(rng: random.Random, follows: dict[str, list[str]]) -> str:
    """4 to 9 words, each after one that it followed somewhere; begun anew where a text ended."""
    words: list[str] = []
    last = ""
    for _ in range(rng.randint(4, 9)):
        last = rng.choice(follows[last]) or rng.choice(follows[""])
        words.append(last)
    return " ".join(words)


def _splits(count: int, config: Config) -> list[str]:
    """The splits of so many texts of a kind, in their order."""
    n_valid, n_test = round(count * config.valid_share), round(count * config.test_share)
    return ["valid"] * n_valid + ["test"] * n_test + ["train"] * (count - n_valid - n_test)


def _distinct(splits: list[str], draw: Callable[[], str], never: set[str], said: dict[str, str]) -> dict[str, str]:
    """A different text for each place and its split: none of `never`, and none `said` in another split.

    A text said in the same split may come again, which does no harm.
    """
    texts: dict[str, str] = {}
    for _ in range(100 * len(splits)):
        if len(texts) == len(splits):
            break
        text, split = draw(), splits[len(texts)]
        if text not in never and said.get(text, split) == split:
            texts.setdefault(text, split)
    if len(texts) < len(splits):
        raise ConfigError(
            f"{len(splits)} different texts are asked for, but only {len(texts)} were found; ask for fewer"
        )
    return texts


def plan(config: Config) -> dict[str, object]:
    """What would be synthesised; raises all that would stop it, together."""
    problems = Problems("slm prepare-corpus")
    problems.attempt(_check_voices, [*config.voices, config.held_out_voice])
    problems.attempt(RunFolder(config.run_dir).check, config)
    lines = problems.attempt(make_lines, config)
    problems.raise_all()
    splits = {split: sum(line.split == split for line in lines) for split in ("train", "valid", "test")}
    return {
        "utterances": splits,
        "voices": ", ".join(config.voices),
        "held-out voice": config.held_out_voice,
        "words": sum(len(line.text.split()) for line in lines),
        "result": str(RunFolder(config.run_dir).path("manifest.jsonl")),
    }


def _check_voices(voices: list[str]) -> None:
    """Raises ConfigError where a voice's engine is not installed, or has no such voice."""
    engines = [engine_of(voice) for voice in voices]
    if messages := [message for engine in dict.fromkeys(engines) if (message := engine.missing_message())]:
        raise ConfigError(messages[0])
    try:
        unknown = [
            message for engine, voice in zip(engines, voices, strict=True) if (message := engine.unknown_voice(voice))
        ]
    except (espeak.EspeakError, flite.FliteError, piper.PiperError) as error:
        raise ConfigError(str(error)) from error
    if unknown:
        raise ConfigError(f"{'; '.join(dict.fromkeys(unknown))}: choose others (voices, held_out_voice)")


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
    groups = _spoken_together(lines)
    pool, pending = ThreadPoolExecutor(2), {}
    try:
        for members in groups:
            done = _read_durations(_done_path(folder, members))
            if done is None:
                pending[pool.submit(_speak_voice, members, folder)] = members[0].voice
            else:
                durations |= done
        for future in progress(as_completed(pending), "voices", len(pending)):
            try:
                durations |= future.result()
            except (espeak.EspeakError, flite.FliteError, piper.PiperError, BrokenProcessPool) as error:
                why = f"voice {pending[future]}: {error}; choose others (voices, held_out_voice)"
                raise ConfigError(why) from error
    finally:
        # After an error or Ctrl-C no further voice is begun; those being spoken are waited for, and kept.
        pool.shutdown(cancel_futures=True)
    rows = [
        {
            "id": line.id,
            "audio": line.file,
            "text": line.text,
            "speaker": voice_name(line.voice),
            "duration": durations[line.id],
        }
        | {"split": line.split, "source": SOURCES[engine_of(line.voice)]}
        | {"license": "synthesised, none of its own"}
        for line in lines
    ]
    atomic_write_text(manifest, "".join(json.dumps(row) + "\n" for row in rows))
    minutes = sum(durations.values()) / 60
    counts = {split: sum(line.split == split for line in lines) for split in ("train", "valid", "test")}
    log.info("%d utterances, %.1f minutes: %s", len(lines), minutes, counts)
    folder.mark_complete({"utterances": counts, "minutes": round(minutes, 2)})
    return manifest


def _spoken_together(lines: list[Line]) -> list[list[Line]]:
    """Each voice's lines, which one process speaks; Piper's, of which there may be hours, in parts that can be kept."""
    by_voice = {
        voice: [line for line in lines if line.voice == voice] for voice in {line.voice: None for line in lines}
    }
    groups = []
    for voice, members in by_voice.items():
        size = PIPER_LINES if piper.is_piper(voice) else len(members)
        groups += [members[start : start + size] for start in range(0, len(members), size)]
    return groups


def _speak_voice(lines: list[Line], folder: RunFolder) -> dict[str, float]:
    """One voice, recorded as soon as it is spoken, whatever becomes of the others."""
    durations = _in_fresh_process(lines, folder.folder)
    atomic_write_text(_done_path(folder, lines), json.dumps(durations))
    return durations


def _in_fresh_process(lines: list[Line], folder: Path) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(speak, lines, folder).result()


def _done_path(folder: RunFolder, lines: list[Line]) -> Path:
    digest = hashlib.sha256(json.dumps([asdict(line) for line in lines]).encode()).hexdigest()[:16]
    return folder.path("checkpoints", f"{voice_name(lines[0].voice)}-{digest}.json")


def _read_durations(path: Path) -> dict[str, float] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
