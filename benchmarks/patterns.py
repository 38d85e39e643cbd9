"""What speech costs an SLM by each pattern of codes: ``python benchmarks/patterns.py [--codebooks 4] [--rounds 5]``.

    python benchmarks/patterns.py [--model embedded-lm] [--codebooks 4] [--seconds 8] [--rounds 5] [--threads N]
        [--output FILE]

The same LLM is given speech by `semantic` (one codebook), `flatten`, `delay` and `parallel` (`--codebooks` of them).
Their models take turns, round after round, to say as many seconds of made-up codes, one text at a time and eight
together: seconds of each, and the ratio to `delay`. Beside it the positions and the cache of keys and values that a
second of speech takes, as `slm finetune --dry-run` tells them. Random codes do: speed does not depend on what is said.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import median

import torch

from recipes.finetuning.pattern_costs import pattern_costs
from slm.generation import SpeechLM, generate_speech
from slm.model.modeling import describe_llm, load_llm
from slm.model.speech_rows import extend_with_speech
from slm.patterns import DELAY, PATTERNS, SEMANTIC
from slm.settings import SpeechLimits, SynthesizeSettings
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.vocabulary import add_speech

FRAME_RATE = 12.5
BOOK = 2048
BATCHES = (1, 8)
TEXT = "place red at five again and set blue in two now please"


def make_slm(model_name: str, pattern: str, codebooks: int) -> SpeechLM:
    """An untrained SLM."""
    model, tokenizer, _ = load_llm(model_name)
    n = 1 if pattern == SEMANTIC else codebooks
    vocabulary = add_speech(tokenizer, [BOOK] * codebooks, n_codebooks=n, frame_rate=FRAME_RATE, pattern=pattern)
    extend_with_speech(model, vocabulary, seed=0)
    return SpeechLM(model.eval(), tokenizer, vocabulary)


def speak(speech_lm: SpeechLM, seconds: float, batch: int) -> float:
    """Seconds that a batch of answers takes, all of one length, drawn as `slm synthesize` does."""
    one = UtteranceTokens(text=speech_lm.vocabulary.encode_text(speech_lm.text_tokenizer, TEXT))
    limits, settings = [SpeechLimits(seconds, seconds)] * batch, SynthesizeSettings(batch_size=batch, loop_s=0)
    started = time.perf_counter()
    outputs = generate_speech(speech_lm, get_task("tts"), [one] * batch, limits, settings)
    elapsed = time.perf_counter() - started
    expected = (speech_lm.vocabulary.n_codebooks, round(seconds * FRAME_RATE))
    assert all(output.codes.shape == expected for output in outputs)
    return elapsed


def rows(options: argparse.Namespace) -> list[str]:
    """The table's."""
    models = {pattern: make_slm(options.model, pattern, options.codebooks) for pattern in PATTERNS}
    facts = describe_llm(options.model)
    costs = pattern_costs(facts, models[DELAY].vocabulary, [BOOK] * options.codebooks, "fp32")
    lines = []
    for batch in BATCHES:
        found: dict[str, list[float]] = {pattern: [] for pattern in PATTERNS}
        for turn in range(options.rounds + 1):
            for pattern, speech_lm in models.items():
                seconds = speak(speech_lm, options.seconds, batch)
                if turn:  # the first warms up
                    found[pattern].append(seconds)
        for pattern, own in found.items():
            ratios = sorted(a / b for a, b in zip(own, found[DELAY], strict=True))
            cost = costs[pattern]
            lines.append(
                f"| {pattern} | {cost['codebooks']} | {batch} | {cost['positions per s']:g} | "
                f"{cost['vocabulary rows']} + {cost['rows beside it']} | {cost['GFLOPs per s']:g} | "
                f"{cost['KV cache KiB per s']:g} | {median(own):.2f} s | "
                f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
            )
    return lines


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded-lm")
    parser.add_argument("--codebooks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0, help="of speech that each answer holds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", help="a Markdown file for the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        f"{options.model}, {options.seconds:g} s of speech at {FRAME_RATE:g} Hz, {options.threads} threads, "
        f"torch {torch.__version__}, {options.rounds} rounds",
        "",
        "| pattern | codebooks | batch | positions/s | rows | GFLOP/s of audio | cache, KiB/s | time | beside delay |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows(options),
    ]
    print("\n".join(lines))
    if options.output:
        Path(options.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
