"""How many in 1,000 spoken answers go wrong at their end: ``python benchmarks/stop_failures.py --texts FILE``.

    python benchmarks/stop_failures.py --texts MANIFEST [--model NAME_OR_FOLDER ...] [--limit 64] [--seeds 0 1]

Texts of a manifest's test split (or of a file, one a line) and, of the same sentences put together, texts twice as long
as the longest that the model's training knew. Each is spoken with every seed in these ways:

- `before`: in one go, at most 4 s and 0.25 s a character, no least duration, no guard against loops;
- `limits`: the limits that follow from the training's own rate of speech, and the guard;
- `limits, 2 retries`: an answer that did not end is drawn again, at most twice;
- `in parts`: with the limits, a text that is longer than those of the training cut as `slm synthesize task=tts` does;
- `word by word`: the same with `tts-aligned`, what `slm synthesize` asks where the model has learnt it; a word that
  runs on is drawn again, with `word by word, once` not.

All are looked at alike, whatever guard they had: an answer is cut off (it did not end), a loop (codes repeat themselves
for longer than the guard allows), too short (half of what the training's fastest took, or less), or its scores were not
finite; of a text in parts what is wrong with any of them. Beside it the length: seconds of speech over those that the
text's characters take at the training's median rate. Far below 1 words are missing, which no limit sees. Wilson
intervals of 95 %, answers taken as independent.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from eval.text.normalisers import get_normaliser
from recipes.inference.long_texts import cut_text
from slm.decoding.loops import longest_loop
from slm.embedded import SPEECH_LMS
from slm.generation import SpeechLM, SynthesizeOutput
from slm.generation.speech import generate_speech
from slm.settings import SynthesizeSettings, speech_limits, speech_loop_limit, word_limits
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.tts_aligned import word_ids

UNGUARDED = {"min_seconds": 4.0, "seconds_per_character": 0.25, "min_seconds_per_character": 0.0, "loop_s": 0.0}


@dataclass(frozen=True)
class Way:
    """A task, what is set otherwise than by default, and whether long texts are cut."""

    task: str
    settings: dict[str, float] = field(default_factory=dict)
    in_parts: bool = False


WAYS = {
    "before": Way("tts", UNGUARDED),
    "limits": Way("tts"),
    "limits, 2 retries": Way("tts", {"retries": 2}),
    "in parts": Way("tts", in_parts=True),
    "word by word, once": Way("tts-aligned", {"word_retries": 0}, in_parts=True),
    "word by word": Way("tts-aligned", in_parts=True),
}
KINDS = ("cut off", "loop", "too short", "not finite")


@dataclass
class Counts:
    """What came of some answers: of each the kinds of failure, and seconds of speech."""

    failures: list[set[str]]
    seconds: list[float]
    wall_s: float


def read_texts(path: Path, limit: int) -> list[str]:
    """The first texts of a file: a line each, or the test split of a manifest, none twice."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in lines]
        lines = [row["text"] for row in rows if row.get("split", "test") == "test"]
    return list(dict.fromkeys(line for line in lines if line.strip()))[:limit]


def long_texts(texts: Sequence[str], longer_than: int) -> list[str]:
    """As many texts, each of as many of them in a row, from its own on, as make more than so many characters."""
    found = []
    for start in range(len(texts)):
        parts: list[str] = []
        while len(" ".join(parts)) <= longer_than:
            parts.append(texts[(start + len(parts)) % len(texts)])
        found.append(" ".join(parts))
    return found


def speak(speech_lm: SpeechLM, texts: Sequence[str], way: Way, settings: SynthesizeSettings) -> Counts:
    """Says each text once and looks at what came of it."""
    task, vocabulary, tokenizer = get_task(way.task), speech_lm.vocabulary, speech_lm.text_tokenizer
    known = vocabulary.trained_on
    cut_at = {"longest": known.longest_text, "longest_piece": known.longest_piece}
    parts, whose = [], []
    for number, text in enumerate(texts):
        own = [part.said for part in cut_text(text, str, **cut_at)] if way.in_parts else [text]
        parts += own
        whose += [number] * len(own)

    def encode(text: str) -> np.ndarray:
        return vocabulary.encode_text(tokenizer, text)

    asked = [UtteranceTokens(text=encode(t), words=word_ids(encode, t) if task.by_word else None) for t in parts]
    limits = [
        word_limits(vocabulary, settings) if task.by_word else speech_limits(vocabulary, t, settings) for t in parts
    ]
    started = time.perf_counter()
    answers = generate_speech(speech_lm, task, asked, limits, settings, parts)
    counts = Counts([set() for _ in texts], [0.0] * len(texts), time.perf_counter() - started)
    for number, part, answer in zip(whose, parts, answers, strict=True):
        counts.failures[number] |= failures(speech_lm, part, answer)
        counts.seconds[number] += answer.codes.shape[1] / vocabulary.frame_rate
    return counts


def failures(speech_lm: SpeechLM, text: str, answer: SynthesizeOutput) -> set[str]:
    """The kinds of failure of an answer, by the defaults' limits, whatever it was drawn with."""
    vocabulary, usual = speech_lm.vocabulary, SynthesizeSettings()
    if answer.finish_reason == "non_finite":
        return {"not finite"}
    most = speech_loop_limit(vocabulary, usual)
    if answer.finish_reason == "loop" or longest_loop(answer.codes[:1]) > most:
        return {"loop"}
    if answer.finish_reason == "length":
        return {"cut off"}
    least = speech_limits(vocabulary, text, usual).least_s
    return {"too short"} if answer.codes.shape[1] < int(least * vocabulary.frame_rate) else set()


def wilson(count: int, n: int) -> tuple[float, float]:
    """A share's interval of 95 %.

    >>> [round(end, 3) for end in wilson(0, 100)]
    [0.0, 0.037]
    """
    z = 1.959964
    middle, half = (count + z * z / 2) / (n + z * z), z * math.sqrt(count * (n - count) / n + z * z / 4) / (n + z * z)
    return max(0.0, middle - half), min(1.0, middle + half)


def rows(
    name: str, texts: Sequence[str], ways: Sequence[str], seeds: Sequence[int], temperature: float
) -> Iterator[str]:
    """The table's lines of one model."""
    speech_lm = SpeechLM.load(name)
    known = speech_lm.vocabulary.trained_on
    if known is None:
        raise SystemExit(f"{name}: its folder does not tell what it was trained on, so nothing tells an end too late")
    normalise = get_normaliser(speech_lm.vocabulary.normaliser_of_prompts)
    usual = [said for said in map(normalise, texts) if said]
    twice = long_texts(usual, 2 * known.longest_text)
    for kind, said in (("as they are", usual), (f"above {2 * known.longest_text} characters", twice)):
        for way in ways:
            asked = WAYS[way]
            if asked.task not in (known.tasks or ("tts",)):
                continue
            counts = [
                speak(speech_lm, said, asked, SynthesizeSettings(temperature=temperature, seed=seed, **asked.settings))
                for seed in seeds
            ]
            found = [kinds for one in counts for kinds in one.failures]
            n, failed = len(found), sum(map(bool, found))
            low, high = (1000 * end for end in wilson(failed, n))
            each = " | ".join(f"{1000 * sum(kind in kinds for kinds in found) / n:.0f}" for kind in KINDS)
            by_seed = ", ".join(f"{1000 * sum(map(bool, one.failures)) / len(one.failures):.0f}" for one in counts)
            seconds, wall = sum(sum(one.seconds) for one in counts), sum(one.wall_s for one in counts)
            length = seconds / (len(seeds) * sum(map(len, said)) / known.characters_per_s[1])
            yield (
                f"| {name} | {kind} | {way} | {n} | {each} | {1000 * failed / n:.0f} [{low:.0f}, {high:.0f}] | "
                f"{by_seed} | {length:.2f} | {seconds / n:.1f} | {wall / n:.2f} |"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="a text a line, or a manifest")
    parser.add_argument("--model", nargs="+", default=list(SPEECH_LMS), help="embedded names or folders")
    parser.add_argument("--limit", type=int, default=64, help="texts")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", help="a Markdown file for the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    texts = read_texts(options.texts, options.limit)
    lines = [
        f"{len(texts)} texts, seeds {', '.join(map(str, options.seeds))}, temperature {options.temperature:g}, "
        f"{options.threads} threads, torch {torch.__version__}; failures in 1,000 answers",
        "",
        f"| model | texts | way | answers | {' | '.join(KINDS)} | any [95 %] | by seed | length | s of speech | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in options.model:
        for row in rows(name, texts, options.ways, options.seeds, options.temperature):
            lines.append(row)
            print(row, flush=True)
    if options.output:
        Path(options.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
