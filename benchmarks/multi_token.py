"""What multi-token heads save: ``python benchmarks/multi_token.py --model FOLDER --texts FILE [--rounds 3]``.

    python benchmarks/multi_token.py --model FOLDER --texts FILE [--limit 32] [--rounds 3] [--threads N] [--output FILE]

A model that was trained with `training.multi_token` says the same texts (a file of them, one a line, or a manifest)
with a token a pass and with 2 to n, verified and unverified, greedily and drawn, one text at a time and eight together.
The ways take turns, round after round: tokens a pass, seconds of a token a pass over seconds of n (above 1: faster),
and how many texts have the codes of a token a pass, which verified must be all but for rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch

from slm.generation import SpeechLM, SynthesizeOutput, synthesize_codes
from slm.model.multi_token import predicted_tokens
from slm.settings import SynthesizeSettings

BATCHES = (1, 8)
TEMPERATURES = (0.0, 0.6)


def read_texts(path: Path, limit: int) -> list[str]:
    """The first texts of a file: a line each, or the test split of a manifest."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in lines]
        lines = [row["text"] for row in rows if row.get("split", "test") == "test"]
    return [line for line in lines if line.strip()][:limit]


def say(speech_lm: SpeechLM, texts: list[str], settings: SynthesizeSettings) -> tuple[float, list[SynthesizeOutput]]:
    """Seconds of all texts, and what was said."""
    started = time.perf_counter()
    outputs = synthesize_codes(speech_lm, texts, settings)
    return time.perf_counter() - started, outputs


def rows(speech_lm: SpeechLM, texts: list[str], tokens: int, rounds: int) -> Iterator[str]:
    """The table's: a batch size, a temperature and a way each."""
    ways = [(1, True), *((n, True) for n in range(2, tokens + 1)), (tokens, False)]
    for batch in BATCHES:
        for temperature in TEMPERATURES:
            seconds: dict[tuple[int, bool], list[float]] = {way: [] for way in ways}
            said: dict[tuple[int, bool], list[SynthesizeOutput]] = {}
            for turn in range(rounds + 1):
                for n, verify in ways:
                    settings = SynthesizeSettings(batch, temperature, multi_token=n, multi_token_verify=verify)
                    elapsed, said[n, verify] = say(speech_lm, texts, settings)
                    if turn:  # the first warms up
                        seconds[n, verify].append(elapsed)
            plain, plain_s = said[ways[0]], seconds[ways[0]]
            for n, verify in ways[1:]:
                own = said[n, verify]
                ratios = sorted(a / b for a, b in zip(plain_s, seconds[n, verify], strict=True))
                per_pass = sum(one.codes.size for one in own) / sum(one.n_passes for one in own)
                same = sum(np.array_equal(a.codes, b.codes) for a, b in zip(plain, own, strict=True))
                yield (
                    f"| {n}, {'verified' if verify else 'taken unseen'} | {batch} | {temperature:g} | {per_pass:.2f} | "
                    f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {same} of {len(own)} |"
                )


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="RUN_DIR/model of `slm finetune training.multi_token.tokens=4`")
    parser.add_argument("--texts", type=Path, required=True, help="a text a line, or a manifest")
    parser.add_argument("--limit", type=int, default=32, help="texts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", help="a Markdown file for the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if (tokens := predicted_tokens(options.model)) == 1:
        parser.error(f"--model {options.model}: has no multi-token heads; train it with training.multi_token.tokens=4")
    texts = read_texts(options.texts, options.limit)
    lines = [
        f"{options.model}, {len(texts)} texts, {options.threads} threads, torch {torch.__version__}, "
        f"{options.rounds} rounds",
        "",
        "| tokens proposed | batch | temperature | tokens a pass | times as fast as a token a pass | same codes |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for row in rows(SpeechLM.load(options.model), texts, tokens, options.rounds):
        lines.append(row)
        print(row, flush=True)
    if options.output:
        Path(options.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
