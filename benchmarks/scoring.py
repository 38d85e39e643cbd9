"""Scoring beside its bare parts: ``python benchmarks/scoring.py [--utterances 10000] [--words 20] [--rounds 5]``.

    python benchmarks/scoring.py [--normaliser basic] [--resamples 1000] [--speakers 0] [--output FILE]

Ours is what a row of `slm evaluate` and `slm score` costs: both sides normalised, words aligned, characters counted,
all counts kept for each utterance, and the intervals of WER and CER from a bootstrap. Beside it stand the normaliser
and jiwer alone: the same texts normalised, then `jiwer.process_words`; and the same with `jiwer.process_characters`,
for the CER. The candidates take turns, round after round; the table gives medians in processor time (all run on one
thread) and the ratio of ours to each, with its range. The rest of `slm score` is measured once: reading two JSONL
files, the tables of errors, the matched pairs of two systems, results.json and the page.

The texts are random words of 2 to 8 letters, of which 7 % are swapped, 5 % dropped and 3 % added in the hypothesis.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import string
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jiwer

from eval.differences import compare_segments
from eval.protocol import Protocol, TestSet, test_set_sha256
from eval.report.errors import error_tables
from eval.report.page import write_report
from eval.results_file import save_results
from eval.schema import Results, make_row
from eval.text.normalisers import get_normaliser
from eval.text.skips import skip_rates
from eval.text.wer import score_pairs
from recipes.scoring.text_files import read_texts

OURS, BARE, BARE_WITH_CHARACTERS = "ours", "normaliser and jiwer, words", "normaliser and jiwer, words and characters"


def texts(utterances: int, words: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """References and hypotheses."""
    rng = random.Random(seed)
    known = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8))) for _ in range(2000)]
    said = [" ".join(rng.choices(known, k=words)) for _ in range(utterances)]
    heard = []
    for text in said:
        found = []
        for word in text.split():
            draw = rng.random()
            found += [] if draw < 0.05 else [rng.choice(known) if draw < 0.12 else word]
            found += [rng.choice(known)] if rng.random() < 0.03 else []
        heard.append(" ".join(found))
    return said, heard


def candidates(options: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """Each as a function that scores everything and returns the WER."""
    said, heard = texts(options.utterances, options.words)
    normaliser = get_normaliser(options.normaliser)
    speakers = [f"s{i % options.speakers}" for i in range(len(said))] if options.speakers else None
    test_set = TestSet("random words", test_set_sha256([(str(i), text) for i, text in enumerate(said)]), len(said))
    protocol = Protocol(
        "asr",
        {},
        normaliser.name,
        normaliser.version,
        test_set,
        bootstrap_samples=options.resamples,
        resampled="speakers" if options.speakers else "utterances",
        n_speakers=options.speakers or None,
    )

    def bare(characters: bool) -> float:
        one, two = [normaliser(text) for text in said], [normaliser(text) for text in heard]
        if characters:
            jiwer.process_characters(one, two)
        return jiwer.process_words(one, two).wer

    def ours() -> float:
        return make_row(OURS, "asr", "", protocol, score_pairs(said, heard, normaliser, speakers=speakers)).wer

    return {OURS: ours, BARE: lambda: bare(False), BARE_WITH_CHARACTERS: lambda: bare(True)}


def measure(found: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every round; they must agree on the WER."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds):
        rates = {}
        for name in found if turn % 2 == 0 else reversed(found):
            started = time.process_time()
            rates[name] = found[name]()
            seconds[name].append(time.process_time() - started)
        if max(rates.values()) - min(rates.values()) > 1e-12:
            raise ValueError(f"the candidates disagree: {rates}")
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """The Markdown table: medians, and ours over each, round by round."""
    lines = ["| what | seconds | ours over it, median (smallest to largest) |", "|---|---:|---:|"]
    for name, found in seconds.items():
        ratios = [ours / other for ours, other in zip(seconds[OURS], found, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {name} | {statistics.median(found):.2f} | {'1' if name == OURS else ratio} |")
    return "\n".join(lines)


def rest(options: argparse.Namespace, folder: Path) -> str:
    """What `slm score` does besides, as a Markdown table."""
    said, heard = texts(options.utterances, options.words)
    for name, column, side in (("ref", "text", said), ("hyp", "hypothesis", heard)):
        rows = [json.dumps({"id": f"u{i}", column: text}) for i, text in enumerate(side)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    normaliser = get_normaliser(options.normaliser)
    protocol = Protocol("asr", {}, normaliser.name, normaliser.version, TestSet("t", "0", len(said)))
    rows = [make_row(n, "asr", "", protocol, score_pairs(said, h, normaliser)) for n, h in (("a", heard), ("b", said))]
    results = Results("Scoring", rows)
    parts: dict[str, Callable[[], object]] = {
        "reading two JSONL files": lambda: [
            read_texts(str(folder / f"{name}.jsonl"), role)
            for name, role in (("ref", "reference"), ("hyp", "hypothesis"))
        ],
        "matched pairs of two systems": lambda: compare_segments(*rows),
        "words skipped and repeated of one row": lambda: skip_rates(rows[0].utterances, samples=options.resamples),
        "tables of errors of one row": lambda: error_tables(rows[0]),
        "results.json of two rows": lambda: save_results(results, folder),
        "the page of two rows": lambda: write_report(results, folder),
    }
    lines = ["| what else | seconds |", "|---|---:|"]
    for name, work in parts.items():
        started = time.process_time()
        work()
        lines.append(f"| {name} | {time.process_time() - started:.2f} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return "\n".join([*lines, "", f"Peak resident memory of the whole: {peak:.0f} MB."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, default=10_000)
    parser.add_argument("--words", type=int, default=20)
    parser.add_argument("--normaliser", default="basic")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--speakers", type=int, default=0, help="draw so many speakers in place of utterances")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = table(measure(candidates(options), options.rounds))
    with tempfile.TemporaryDirectory() as folder:
        text += "\n\n" + rest(options, Path(folder))
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
