"""Speed of the SLM beside the bare operations: ``python benchmarks/slm_speed.py [--rounds 5] [--threads N]``.

    python benchmarks/slm_speed.py [--model embedded-lm] [--utterances 400] [--rounds 5] [--threads N] [--output FILE]

Every row is a ratio of two things that take turns in one run, on made-up utterances at 12.5 Hz (1 to 12 s, 2
to 30 words):

- a training step of `slm finetune` beside a loop that calls the model on the same packed tensors, with the loss over
  whole logits and the same optimizer: tokens a second;
- packed rows beside one padded row for each sequence;
- transcripts written 16 at a time beside one at a time;
- a step of sampling beside a greedy one, when speech is generated;
- growing a table by 45,056 rows and saving the model, in seconds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from slm.generation import SpeechLM, generate_speech, generate_text
from slm.model.modeling import load_llm, save_slm
from slm.model.speech_rows import extend_with_speech
from slm.settings import SpeechLimits, SynthesizeSettings, TranscribeSettings
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import IGNORE
from slm.training.batches import PackedBatches
from slm.training.config import TrainingConfig
from slm.training.samples import SpeechSamples
from slm.training.train import train
from slm.vocabulary import add_speech

FRAME_RATE = 12.5
BOOK = 2048
PACK = 256
GROWN = (2048, *[2048] * 21)  # 22 books: 45,056 rows
WORDS = "place set lay bin red blue green white at by in with now soon please again one two three four five six".split()


def make_slm(options: argparse.Namespace) -> tuple[SpeechLM, list[UtteranceTokens]]:
    """An untrained SLM, and utterances to train it on."""
    model, tokenizer, _ = load_llm(options.model)
    vocabulary = add_speech(tokenizer, [BOOK], frame_rate=FRAME_RATE)
    extend_with_speech(model, vocabulary, seed=0)
    rng, utterances = np.random.default_rng(0), []
    for _ in range(options.utterances):
        seconds = float(np.exp(rng.uniform(0.0, np.log(12.0))))
        text = " ".join(rng.choice(WORDS, max(2, round(2.5 * seconds))))
        codes = rng.integers(0, BOOK, (1, round(FRAME_RATE * seconds)))
        utterances.append(UtteranceTokens(codes, vocabulary.encode_text(tokenizer, text)))
    return SpeechLM(model, tokenizer, vocabulary), utterances


def alternate(one: Callable[[], float], other: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both, turn by turn, after a round that nothing is taken of."""
    pairs = [(one(), other()) for _ in range(rounds + 1)][1:]
    return [a for a, _ in pairs], [b for _, b in pairs]


def ratio(over: list[float], under: list[float]) -> str:
    """Median and spread of the rounds' ratios."""
    values = sorted(a / b for a, b in zip(over, under, strict=True))
    return f"{median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"


def timed(function: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def bare_steps(model: nn.Module, batches: PackedBatches, steps: int, attention: str) -> float:
    """Seconds of optimizer steps written by hand, on tensors that are there already."""
    tensors = [batches[index] for index in range(steps)]
    model.set_attn_implementation(attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()
    started = time.perf_counter()
    for batch in tensors:
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        labels, weights = batch["labels"][:, 1:].flatten(), batch["loss_weights"][:, 1:].flatten()
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels, reduction="none", ignore_index=IGNORE)
        ((losses * weights).sum() / weights.sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def trained_steps(model: nn.Module, samples: SpeechSamples, settings: dict[str, Any]) -> float:
    """Seconds of the same number of steps by the recipe, without what begins and ends it."""
    clock: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(**settings, eval_steps=0, save_steps=10_000, log_steps=10_000, learning_rate=1e-4)
        train(model, samples, None, config, folder, callbacks=[Clock()])
    return clock[-1] - clock[0]


def training_rows(speech_lm: SpeechLM, utterances: list[UtteranceTokens], options: argparse.Namespace) -> list[str]:
    """The recipe beside a bare loop, and packed beside padded."""
    samples = SpeechSamples(speech_lm.vocabulary, utterances, {"asr": 1.0, "tts": 1.0})
    settings = {"steps": options.steps, "tokens_per_step": options.tokens, "pack_length": PACK}
    packed, padded = (
        PackedBatches(
            samples, steps=options.steps, tokens_per_step=options.tokens, micro_batches=1, pack_length=n, seed=0
        )
        for n in (128, 0)
    )
    model = speech_lm.model
    ours, bare = alternate(
        lambda: trained_steps(model, samples, settings),
        lambda: bare_steps(model, packed, options.steps, "eager"),
        options.rounds,
    )
    rows, one = alternate(
        lambda: bare_steps(model, packed, options.steps, "eager"),
        lambda: bare_steps(model, padded, options.steps, "eager"),
        options.rounds,
    )
    waste = np.mean([(padded[i]["input_ids"] == 0).float().mean().item() for i in range(options.steps)])
    return [
        f"| training step, tokens a second beside a bare loop | {ratio(bare, ours)} | "
        f"{options.tokens * options.steps / median(ours):,.0f} tokens/s |",
        f"| packed rows beside a padded row a sequence ({100 * waste:.0f} % padding) | {ratio(one, rows)} | |",
    ]


def generation_rows(speech_lm: SpeechLM, utterances: list[UtteranceTokens], options: argparse.Namespace) -> list[str]:
    """Batches beside one at a time, and sampling beside greedy decoding."""
    speech_lm.model.eval()
    asr, tts = get_task("asr"), get_task("tts")
    prompts = [UtteranceTokens(codes=u.codes) for u in utterances[: options.transcripts]]
    alone, together = alternate(
        lambda: timed(lambda: generate_text(speech_lm, asr, prompts, TranscribeSettings(batch_size=1))),
        lambda: timed(lambda: generate_text(speech_lm, asr, prompts, TranscribeSettings(batch_size=16))),
        options.rounds,
    )
    texts = [UtteranceTokens(text=u.text) for u in utterances[:16]]

    def speak(temperature: float) -> float:
        settings = SynthesizeSettings(temperature=temperature, batch_size=16)
        frames = []

        def call() -> None:
            spoken = generate_speech(speech_lm, tts, texts, [SpeechLimits(4.0, 4.0)] * len(texts), settings)
            frames.append(max(item.codes.shape[1] for item in spoken))

        return timed(call) / max(1, frames[0])

    sampled, greedy = alternate(lambda: speak(1.0), lambda: speak(0.0), options.rounds)
    return [
        f"| transcripts 16 at a time beside one at a time | {ratio(alone, together)} | "
        f"{len(prompts) / median(together):.1f} utterances/s |",
        f"| a step of sampling beside a greedy one | {ratio(sampled, greedy)} | {1000 * median(sampled):.1f} ms |",
    ]


def growth_row(options: argparse.Namespace) -> str:
    """Growing by 45,056 rows and saving."""
    model, tokenizer, _ = load_llm(options.model)
    vocabulary = add_speech(tokenizer, GROWN, n_codebooks=len(GROWN))

    def grow() -> None:
        extend_with_speech(model, vocabulary, seed=0)
        with tempfile.TemporaryDirectory() as folder:
            save_slm(model, tokenizer, vocabulary, Path(folder) / "model")

    return f"| growing by 45,056 rows and saving | {timed(grow):.1f} s | {model.config.hidden_size} wide |"


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded-lm")
    parser.add_argument("--utterances", type=int, default=400)
    parser.add_argument("--transcripts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", help="a Markdown file for the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    speech_lm, utterances = make_slm(options)
    lines = [f"{options.model}, {options.threads} threads, torch {torch.__version__}, {options.rounds} rounds", ""]
    lines += ["| what | ratio, median (range) | |", "|---|---|---|"]
    print("\n".join(lines), flush=True)
    for make in (
        lambda: generation_rows(speech_lm, utterances, options),
        lambda: training_rows(speech_lm, utterances, options),
        lambda: [growth_row(options)],
    ):
        rows = make()
        lines += rows
        print("\n".join(rows), flush=True)
    if options.output:
        Path(options.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
