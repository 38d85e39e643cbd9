"""What makes the codec's training step fast: ``python benchmarks/training_step.py [--rounds 3] [--output FILE]``.

    python benchmarks/training_step.py [--size published|small] [--batch 1] [--channels N] [--threads N] [--busy]
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=1024 python benchmarks/training_step.py --rows published,step

The published architecture reduced for a CPU (DAC encoders of width 8, decoders in proportion, latent 128, 24 kHz, crops
of 6 s), a teacher of Whisper-base's shape (published: large-v3), all losses, discriminators of the published widths (32
and 64 channels; --channels sets both) and framing; random weights and sounds. `--size small` is what the embedded
tokenizers train on: the mel and Vocos model of `micro-12.5hz`, 8 crops of 2 s at 16 kHz, small discriminators, a small
teacher.

Rows are cumulative: the published step (benchmarks/baseline_step.py: fp32, 30 s windows, nothing shared), then one
saving after the other, then the step of `slm train-tokenizer` itself. Those before "crop" keep the arithmetic (tests
compare losses and gradients). A round takes one step of each row, after one that is not counted; ratios are of steps
in the same round, their median and range are printed. `--busy` counts processor time, for a machine that has other
work; `--dropped` measures, on top of everything, what was tried and not kept.

One saving is of the whole process, so no row shows it: compiled kernels are kept (recipes/runs/process_settings.py),
here for all rows alike. The second command above takes oneDNN as it comes; compare it with the same `--rows` without
the variable.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from accelerate import Accelerator
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

sys.path.insert(0, str(Path(__file__).parent))
from baseline_step import ARITHMETIC, OTHERS, snakes, step  # noqa: E402

from recipes.runs.machine import cpu_has_fast_bf16  # noqa: E402
from recipes.runs.process_settings import (
    CAPACITY,
    KERNELS,
    keep_freed_memory,  # noqa: E402
)
from tokenizer.model.configuration import preset_config  # noqa: E402
from tokenizer.model.modeling import LMSPTModel  # noqa: E402
from tokenizer.teacher.whisper import SpeechTeacher  # noqa: E402
from tokenizer.training.discriminator import Discriminator, DiscriminatorConfig  # noqa: E402
from tokenizer.training.losses import LossWeights, MultiScaleMelLoss, discriminator_loss, generator_losses  # noqa: E402
from tokenizer.training.objective import Objective, codec_losses, loss_weights  # noqa: E402
from tokenizer.training.state import CodecTrainingConfig, TrainState  # noqa: E402
from tokenizer.training.step import train_step  # noqa: E402

WHISPER_BASE = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}
SMALL_TEACHER = {"d_model": 192, "encoder_layers": 4, "encoder_attention_heads": 3, "encoder_ffn_dim": 768}
REDUCED = {
    "semantic_encoder_width": 8,
    "acoustic_encoder_width": 8,
    "latent_dim": 128,
    "decoder_width": 384,  # published: 1536 beside encoders of 32
    "auxiliary_decoder_width": 32,
}
WINDOW_S = 30.0
ROWS = ("published", *ARITHMETIC, *OTHERS, "step")


@dataclass(frozen=True)
class Size:
    """What is trained on what."""

    preset: str
    changes: dict[str, int]
    batch: int
    crop_s: float
    period_channels: int
    band_channels: int
    padding: str
    teacher: dict[str, int]


SIZES = {
    "published": Size("release-12.5hz", REDUCED, 1, 6.0, 32, 64, "reflect", WHISPER_BASE),
    "small": Size("micro-12.5hz", {}, 8, 2.0, 8, 8, "zeros", SMALL_TEACHER),
}


class Bench:
    """One set of weights and a batch, on which every row takes its steps.

    Args:
        size: of everything.
        accelerator: in bf16, for the step of `slm train-tokenizer`.
    """

    def __init__(self, size: Size, accelerator: Accelerator) -> None:
        self.size, self.accelerator = size, accelerator
        self.model = LMSPTModel(preset_config(size.preset, **size.changes)).train()
        self.discriminator = Discriminator(
            DiscriminatorConfig(
                period_channels=size.period_channels, band_channels=size.band_channels, padding=size.padding
            )
        )
        self.config = CodecTrainingConfig(batch_size=size.batch, revive_steps=0)
        encoder = WhisperEncoder(WhisperConfig(**size.teacher))
        self.teacher = SpeechTeacher(encoder, pad_to_seconds=WINDOW_S)
        mel = MultiScaleMelLoss(self.model.config.sampling_rate, padding=size.padding)
        self.objective = Objective(LossWeights(), mel, self.teacher, distillation_weight=1.0)
        samples = round(size.crop_s * self.model.config.sampling_rate)
        self.batch = {
            "input_values": 0.1 * torch.randn(size.batch, 1, samples),
            "padding_mask": torch.ones(size.batch, samples, dtype=torch.bool),
        }
        self.optimizers = {fused: self._optimizers(fused) for fused in (False, True)}
        prepared = [accelerator.prepare(optimizer) for optimizer in self._optimizers(True)]
        self.state = TrainState(self.model, prepared[0], self.discriminator, prepared[1])

    def _optimizers(self, fused: bool) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        return tuple(
            torch.optim.AdamW(part.parameters(), self.config.learning_rate, self.config.betas, fused=fused)
            for part in (self.model, self.discriminator)
        )

    def hear(self, whole_window: bool) -> None:
        """Sets the teacher's window, and the published weight of the distillation at it."""
        self.teacher.pad_to_seconds = WINDOW_S if whole_window else None
        self.objective.distillation_weight = 500.0 if whole_window else 500.0 * self.size.crop_s / WINDOW_S

    def piecewise(self, savings: frozenset[str]) -> None:
        """A step with some of the savings."""
        self.hear("crop" not in savings)
        optimizers = self.optimizers["optimizer" in savings]
        step(self.objective, self.model, self.discriminator, optimizers, self.batch, savings)

    def recipe(self) -> None:
        """The step of `slm train-tokenizer`."""
        self.hear(False)
        snakes(self.model, True)
        train_step(self.state, [self.batch], self.objective, self.config, self.accelerator)
        self.state.step += 1

    def shared_pass(self) -> None:
        """The step with one forward pass of the discriminators for both halves: the generator is judged as they were
        before their move, which is not the published method."""
        self.hear(False)
        weights = loss_weights(self.objective)
        with self.accelerator.autocast():
            output = self.model(**self.batch)
            losses = codec_losses(self.objective, output, self.batch["input_values"], self.model.config, None)
            with _folded(self.discriminator):
                real, fake = (self.discriminator(x) for x in (self.batch["input_values"], output.audio_values))
            judged = discriminator_loss(real, fake)
            losses["adversarial"], losses["feature_matching"] = generator_losses(real, fake)
        total = sum(weights[name] * value for name, value in losses.items() if name in weights)
        parts = (self.model, self.discriminator)
        for optimizer in self.optimizers[True]:
            optimizer.zero_grad()
        judged.backward(inputs=list(self.discriminator.parameters()), retain_graph=True)
        total.backward(inputs=list(self.model.parameters()))
        for part, optimizer in zip(parts, self.optimizers[True], strict=True):
            torch.nn.utils.clip_grad_norm_(part.parameters(), self.config.gradient_clip)
            optimizer.step()

    def fused_attention(self) -> None:
        """The step with the teacher's attention by the fused kernel, as on windows of 30 s."""
        with mock.patch("tokenizer.model.cpu_kernels.EAGER_FRAMES", 0):
            self.recipe()


@contextmanager
def _folded(discriminator: Discriminator) -> Iterator[None]:
    """Weights multiplied out once, with their graph."""
    layers = [module for module in discriminator.modules() if hasattr(module, "folded")]
    for layer in layers:
        layer.folded = layer.fold()
    yield
    for layer in layers:
        layer.folded = None


def rows(bench: Bench) -> dict[str, tuple[str, Callable[[], None]]]:
    """The table's rows: name -> what it adds, a step."""
    savings: frozenset[str] = frozenset()
    table = {"published": ("fp32, 30 s windows, nothing shared", lambda: bench.piecewise(frozenset()))}
    for name, text in (ARITHMETIC | OTHERS).items():
        savings = savings | {name}
        table[name] = (text, lambda now=savings: bench.piecewise(now))
    return table | {"step": ("the step of `slm train-tokenizer`, all of the above", bench.recipe)}


def dropped(bench: Bench) -> dict[str, tuple[str, Callable[[], None]]]:
    """What was tried on top and not kept: name -> why, a step."""
    return {
        "step": ("what is kept", bench.recipe),
        "shared pass": ("another method: the generator meets the discriminators before their move", bench.shared_pass),
        "fused attention": ("in the teacher: its backward pass is slow on short windows", bench.fused_attention),
    }


def measure(steps: dict[str, Callable[[], None]], rounds: int, busy: bool) -> dict[str, list[float]]:
    """Seconds of one step of each, round after round; the first round is not counted.

    On a busy machine the processor's seconds are counted, of all threads together.
    """
    clock = time.process_time if busy else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, take in steps.items():
            started = clock()
            take()
            if number:
                seconds[name].append(clock() - started)
            print(f"round {number}: {name}", file=sys.stderr, flush=True)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> str:
    """How many times faster: median of the rounds, and their range."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def report(table: dict[str, tuple[str, Callable[[], None]]], rounds: int, busy: bool) -> list[str]:
    """The rows of a Markdown table."""
    seconds = measure({name: take for name, (_, take) in table.items()}, rounds, busy)
    first, before = next(iter(seconds)), None
    lines = []
    for name, (text, _) in table.items():
        kind = "a" if name in ARITHMETIC else {"crop": "b", "bf16": "c", "even": "a"}.get(name, "")
        gain = "" if before is None else ratio(seconds[before], seconds[name])
        median = statistics.median(seconds[name])
        lines.append(f"| {kind} | {name} | {text} | {median:.2f} | {gain} | {ratio(seconds[first], seconds[name])} |")
        before = name
    return lines


def summary(bench: Bench, options: SimpleNamespace | argparse.Namespace) -> str:
    """What was measured, in a line."""
    counts = {"tokenizer": bench.model, "discriminators": bench.discriminator, "teacher": bench.teacher}
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.1f} M" for name, part in counts.items()
    )
    size = bench.size
    return (
        f"{size.preset} {size.changes or ''}: {sizes}; {size.batch} crop(s) of {size.crop_s:g} s, discriminators of "
        f"{size.period_channels} and {size.band_channels} channels, padding {size.padding}; "
        f"{options.threads} thread(s), {platform.machine()}, fast bf16: "
        f"{cpu_has_fast_bf16()}, torch {torch.__version__}, {os.environ.get(CAPACITY, 'unknown')} kernels kept; "
        f"{options.rounds} rounds"
        f"{', processor time' if options.busy else ''}"
    )


HEADINGS = (
    "| | saving | what it is | s per step | over the row above | over the first row |\n|---|---|---|---:|---:|---:|"
)


def tables(size: Size, accelerator: Accelerator, options: SimpleNamespace | argparse.Namespace) -> str:
    """Everything that is printed."""
    bench = Bench(size, accelerator)
    table = {name: row for name, row in rows(bench).items() if name in (options.rows or ROWS)}
    text = [summary(bench, options), "", HEADINGS, *report(table, options.rounds, options.busy)]
    if options.dropped:
        text += ["", "Not kept:", "", HEADINGS, *report(dropped(bench), options.rounds, options.busy)]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="published")
    parser.add_argument("--batch", type=int, help="crops (1; small: 8)")
    parser.add_argument("--channels", type=int, help="of all discriminators (periods 32, bands 64; small: 8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--busy", action="store_true", help="count processor time: something else is running")
    parser.add_argument("--rows", type=lambda names: names.split(","), help="these only: published,step (all)")
    parser.add_argument("--dropped", action="store_true", help="measure what was tried and not kept, too")
    parser.add_argument("--output", type=Path, help="write the tables to this file as well")
    options = parser.parse_args()
    if unknown := set(options.rows or ()) - set(ROWS):
        parser.error(f"--rows: no {', '.join(sorted(unknown))} among {', '.join(ROWS)}")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    # as every `slm` command does, for all rows alike; one row alone needs an eighth of so many kernels
    keep_freed_memory()
    os.environ.setdefault(CAPACITY, str(8 * KERNELS))
    chosen = SIZES[options.size]
    size = Size(
        chosen.preset, chosen.changes, options.batch or chosen.batch, chosen.crop_s,
        options.channels or chosen.period_channels, options.channels or chosen.band_channels, chosen.padding,
        chosen.teacher,
    )  # fmt: skip
    text = tables(size, Accelerator(mixed_precision="bf16", cpu=True), options)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
