"""The health of a codec training: figures beside the losses, and one line in the log for what goes wrong, once each.

`HealthMonitor` sees every step. Its thresholds are constants here, each with its reason; they are meant to stay silent
in a run that works and to speak where a person who looked at the curves would stop it.

Shapes: B crops of a micro-batch, S samples.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from tokenizer.data.crops import TrainingCrops
from tokenizer.model.code_use import BookUse
from tokenizer.training.revival import dead_rule
from tokenizer.training.state import Batch, CodecTrainingConfig, Metrics, TrainState

logger = logging.getLogger(__name__)

# A run that does not recover by itself in five steps does not recover; a bad crop or two is one or two steps.
NON_FINITE_LIMIT = 5
NON_FINITE_FILE = "non_finite_batches.json"

# Nothing but finiteness is judged before twice the warm-up and a tenth of the run: books are being revived, the
# distillation falls fast, norms are at their largest.
GRACE_FRACTION, GRACE_WARMUPS = 0.1, 2
# What is wrong must be so in every logged window of at least 100 steps, 2 % of the run and two windows.
PATIENCE_STEPS, PATIENCE_FRACTION, PATIENCE_WINDOWS = 100, 0.02, 2

# Of what even use would show. Working books of ours stand at 0.2 to 0.65. A twentieth means over four bits of a code's
# ten or so say nothing; a tenth of the entries in use means the rest is ballast.
COLLAPSED_PERPLEXITY, COLLAPSED_USE = 0.05, 0.1
# Distillation's part of the generator's loss, by value. Working runs of ours go from 0.4 down to 0.1. At a hundredth
# its gradient is lost beside the mel loss; at three quarters the waveform is.
DISTILLATION_LOW, DISTILLATION_HIGH, DISTILLATION_BALANCED = 0.01, 0.75, 0.2
# Least squares, per discriminator: undecided is 0.5 for the discriminator and 0.25 for the generator; told apart with
# certainty is 0 and 1. Below 0.1 the verdicts are on average within about 0.2 of certain.
WON_DISCRIMINATOR, WON_ADVERSARIAL = 0.1, 0.8
# The objective's own norms run from about 800 down to 20 (published clip: 1), which AdamW forgives: it does not see a
# common factor. DAC's published training (arXiv 2306.06546), with the same loss weights, clips at 1000.
CLIPPED_FACTOR, CLIPPED_FRACTION = 1000.0, 0.9
# Two validations in a row above the best by more than their noise (1 % on 32 crops), training below it by as much.
OVERFIT_MARGIN, OVERFIT_VALIDATIONS = 0.03, 2
# A peak of -60 dBFS is quieter than a quiet room. Read speech has some such crops, a fifth means untrimmed recordings.
SILENT_PEAK, SILENT_FRACTION, SILENT_CROPS = 1e-3, 0.2, 200


def window_means(window: Sequence[Metrics]) -> Metrics:
    """The mean of every figure over the steps that have it, those that are not finite left out; NaN if all are."""
    means = {}
    for name in dict.fromkeys(name for metrics in window for name in metrics):
        values = [m[name] for m in window if math.isfinite(m.get(name, math.nan))]
        means[name] = sum(values) / len(values) if values else math.nan
    return means


class HealthMonitor:
    """Watches one training. Lines go to the log of the first process, each kind once in a run.

    Args:
        state: of the training; its `health` is read and written, its books' `usage` and `counts` are read.
        config: of the training.
        weights: of the losses, by name, as `loss_weights` gives them.
        discriminator_start: the step at which the discriminators begin.
        crops: asked for the recordings of steps that were not finite.
        accelerator: of all processes.
        folder: the run folder.
    """

    def __init__(
        self,
        state: TrainState,
        config: CodecTrainingConfig,
        weights: dict[str, float],
        discriminator_start: int,
        crops: TrainingCrops,
        accelerator: Accelerator,
        folder: Path,
    ) -> None:
        self.state, self.record, self.config, self.weights = state, state.health, config, weights
        self.crops, self.accelerator, self.folder = crops, accelerator, folder
        self.n_judges = len(state.discriminator.parts) if state.discriminator is not None else 0
        self.grace = round(max(GRACE_WARMUPS * config.warmup_steps, GRACE_FRACTION * config.steps))
        self.judged_from = discriminator_start + self.grace
        self.patience = max(PATIENCE_STEPS, PATIENCE_FRACTION * config.steps)
        self._window: list[Metrics] = []
        self._bad: list[dict[str, object]] = []
        self._lasted: dict[str, tuple[int, int]] = {}  # fault -> steps and windows in a row
        self._silent: list[torch.Tensor] = []  # per step, on the device: crops, silent crops
        self._crops_seen = self._crops_silent = 0.0  # before this window
        self._train_mels: list[float] = []
        self._overfit = 0

    def step(self, metrics: Metrics, sound: bool, batches: Sequence[Batch]) -> None:
        """Takes the figures of a step, after `state.step` has moved on.

        Args:
            metrics: of the step.
            sound: whether loss and gradient were finite, or fp16's loss scale is still finding its place.
            batches: this process's micro-batches, with `input_values` (B, 1, S).

        Raises:
            FloatingPointError: at the fifth step in a row that is not sound; names the file with the recordings' ids.
        """
        metrics = dict(metrics)
        self.record.skipped_discriminator_steps += int(metrics.pop("discriminator_skipped", 0))
        self._window.append(metrics)
        peaks = torch.cat([batch["input_values"].flatten(1).abs().amax(1) for batch in batches])
        self._silent.append(torch.stack([torch.ones_like(peaks), (peaks < SILENT_PEAK).to(peaks)]).sum(1))
        if sound:
            self._bad = []
            return
        self.record.non_finite_steps += 1
        step, wrong = self.state.step, [name for name, value in metrics.items() if not math.isfinite(value)]
        terms = wrong or ["the gradient"]
        finite = self.accelerator.gather(torch.isfinite(peaks).to(torch.uint8)).tolist()
        self._bad.append({"step": step, "not_finite": terms, "poisoned": [i for i, ok in enumerate(finite) if not ok]})
        self._say(
            "non_finite",
            f"{', '.join(terms)} not finite: the step is left out and counted in health/non_finite_steps; "
            f"{NON_FINITE_LIMIT} in a row stop the training",
        )
        if len(self._bad) == NON_FINITE_LIMIT:
            self._stop()

    def window(self) -> Metrics:
        """The figures of the steps since the last call, to be logged; judges them."""
        means, steps = window_means(self._window), len(self._window)
        norms = [m["gradient_norm"] for m in self._window if math.isfinite(m.get("gradient_norm", math.nan))]
        self._window = []
        self._train_mels.append(means.get("loss/mel", math.nan))
        counts = self.state.counts.take()  # none where no step was taken
        for index, (use, book) in enumerate(zip(counts, self.state.model.quantizer.books, strict=False)):
            means[f"codes/book_{index}/used"] = use.used
            means[f"codes/book_{index}/perplexity"] = use.perplexity
            rule = dead_rule(use.size, max(1, use.frames // steps), self.config.usage_decay)
            means[f"codes/book_{index}/dead"] = float((book.usage < rule.threshold).float().mean())
        crops, silent = torch.stack(self._silent).sum(0).tolist()
        self._silent = []
        means["health/silent_crops"] = silent / crops
        means["health/non_finite_steps"] = float(self.record.non_finite_steps)
        if self.n_judges:
            means["health/skipped_discriminator_steps"] = float(self.record.skipped_discriminator_steps)
        self._judge_silence(crops, silent)
        if counts and self.state.step > self._books_from(counts[0], steps):
            self._judge_book(counts[0], steps)
        if self.state.step > self.grace:
            self._judge_distillation(means, steps)
            self._judge_norms(norms, means, steps)
        if self.n_judges and self.state.step > self.judged_from:
            self._judge_discriminator(means, steps)
        return means

    def validated(self, scores: Metrics) -> None:
        """Takes the scores of a validation: is the tokenizer learning its recordings by heart?"""
        trained = [mel for mel in self._train_mels if math.isfinite(mel)]
        valid, self._train_mels = scores.get("valid/mel", math.nan), []
        if not trained or not math.isfinite(valid):
            return
        train, record = sum(trained) / len(trained), self.record
        if valid < record.best_valid_mel:
            record.best_step, record.best_valid_mel, record.best_train_mel = self.state.step, valid, train
        apart = valid > (1 + OVERFIT_MARGIN) * record.best_valid_mel
        apart = apart and train < (1 - OVERFIT_MARGIN) * record.best_train_mel
        self._overfit = self._overfit + 1 if apart else 0
        if self._overfit >= OVERFIT_VALIDATIONS:
            self._say(
                "overfit",
                f"the valid mel loss has risen from {record.best_valid_mel:.3f} (step {record.best_step}) to "
                f"{valid:.3f} while the training one fell from {record.best_train_mel:.3f} to {train:.3f}: the "
                "tokenizer learns these recordings by heart. Give it more data, raise augmentation.speed and "
                f"augmentation.noise_probability, take a smaller preset, or stop at training.steps={record.best_step}",
            )

    def _books_from(self, use: BookUse, steps: int) -> float:
        """The step from which on a book is judged: before new entries can be dead, none can have been revived."""
        if not self.config.revive_steps:
            return self.grace
        rule = dead_rule(use.size, max(1, use.frames // steps), self.config.usage_decay)
        return max(self.grace, rule.trial_steps + self.config.revive_steps)

    def _judge_book(self, use: BookUse, steps: int) -> None:
        perplexity, entries = use.perplexity / use.even, use.entries / use.even
        if not self._lasts("collapse", perplexity < COLLAPSED_PERPLEXITY or entries < COLLAPSED_USE, steps):
            return
        revival = "" if self.config.revive_steps else "Turn revival on (training.revive_steps=50). "
        self._say(
            "collapse",
            f"the semantic book has collapsed: perplexity {use.perplexity:.1f}, {use.entries} of {use.size} entries in "
            f"{use.frames} frames, where even use would show {use.even:.0f}. {revival}Lower training.learning_rate or "
            "lengthen training.warmup_steps and start over; a smaller first entry of model.codebook_sizes, or "
            "model.semantic_quantizer=fsq, cannot collapse so",
        )

    def _judge_distillation(self, means: Metrics, steps: int) -> None:
        weight, term = self.weights.get("distillation", 0.0), means.get("loss/distillation", math.nan)
        probe = self.weights.get("probe", 0.0) * means.get("loss/probe", 0.0)  # trains the probe alone
        total = means.get("loss/total", math.nan) - probe
        if not (weight > 0 and term > 0 and total > 0):
            return
        fraction = weight * term / total
        if not self._lasts("distillation", not DISTILLATION_LOW <= fraction <= DISTILLATION_HIGH, steps):
            return
        balanced = DISTILLATION_BALANCED / (1 - DISTILLATION_BALANCED) * (total - weight * term) / term
        effect = (
            "the teacher is hardly heard, and book 0 will not be semantic"
            if fraction < DISTILLATION_LOW
            else "the tokenizer hardly learns to sound right"
        )
        self._say(
            "distillation",
            f"the distillation term is out of scale: {100 * fraction:.2g} % of the loss (weight {weight:.3g} times "
            f"{term:.3g}; the rest is {total - weight * term:.3g}): {effect}. weights.distillation={balanced:.3g} "
            f"would make it {100 * DISTILLATION_BALANCED:.0f} %; null takes 100 / variance of this teacher's encoding",
        )

    def _judge_discriminator(self, means: Metrics, steps: int) -> None:
        loss = means.get("loss/discriminator", math.nan) / self.n_judges
        fooled = means.get("loss/adversarial", math.nan) / self.n_judges
        if not self._lasts("discriminator", loss < WON_DISCRIMINATOR and fooled > WON_ADVERSARIAL, steps):
            return
        self._say(
            "discriminator",
            f"the discriminators have won: their loss is {loss:.3f} each (undecided: 0.5), the generator's adversarial "
            f"one {fooled:.2f} (undecided: 0.25), so its gradient says little. Let them start later "
            "(discriminator.start_step), make them smaller (discriminator.period_channels, band_channels), or train "
            "without (discriminator.enabled=false)",
        )

    def _judge_norms(self, norms: Sequence[float], means: Metrics, steps: int) -> None:
        clip = self.config.gradient_clip
        cut = sum(norm > CLIPPED_FACTOR * clip for norm in norms)
        if norms and self._lasts("clipped", cut >= CLIPPED_FRACTION * len(norms), steps):
            self._say(
                "clipped",
                f"the gradient is cut on nearly every step, and by far: its norm is {means['gradient_norm']:.0f}, "
                f"training.gradient_clip {clip:g}. Look for the term that is too large (loss/* times weights.*), lower "
                "training.learning_rate, or raise training.gradient_clip if the losses still fall",
            )

    def _judge_silence(self, crops: float, silent: float) -> None:
        crops, silent = self._crops_seen + crops, self._crops_silent + silent
        self._crops_seen, self._crops_silent = crops, silent
        if crops >= SILENT_CROPS and silent > SILENT_FRACTION * crops:
            self._say(
                "silence",
                f"{silent:.0f} of {crops:.0f} crops are silent (peak below {20 * math.log10(SILENT_PEAK):.0f} dBFS): "
                "the books learn silence. Trim the recordings or leave the empty ones out; if they are only quiet, "
                "raise their level",
            )

    def _lasts(self, fault: str, present: bool, steps: int) -> bool:
        """Whether a fault has been present in every window for long enough."""
        before_steps, before_windows = self._lasted.get(fault, (0, 0))
        lasted = (before_steps + steps, before_windows + 1) if present else (0, 0)
        self._lasted[fault] = lasted
        return lasted[0] >= self.patience and lasted[1] >= PATIENCE_WINDOWS

    def _say(self, name: str, message: str) -> None:
        if name in self.record.warnings:
            return
        self.record.warnings[name] = f"step {self.state.step}: {message}"
        if self.accelerator.is_main_process:
            logger.warning("%s", self.record.warnings[name])

    def _stop(self) -> None:
        """Writes which recordings the bad steps were made of, and raises."""
        steps, file = len(self._bad), self.folder / NON_FINITE_FILE
        if self.accelerator.is_main_process:
            rows = []
            for bad in self._bad:
                first = (bad["step"] - 1) * self.config.batch_size
                ids = [self.crops.utterance(first + i).id for i in range(self.config.batch_size)]
                poisoned = [ids[i] for i in bad["poisoned"]]
                rows.append(bad | {"positions": [first, first + len(ids) - 1], "ids": ids, "poisoned": poisoned})
            file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        self.accelerator.wait_for_everyone()  # a process that ends early has the others ended by their launcher
        terms = dict.fromkeys(name for bad in self._bad for name in bad["not_finite"])
        raise FloatingPointError(
            f"not finite in {steps} steps in a row, to step {self.state.step}: {', '.join(terms)}. {file} holds the "
            "ids of their recordings (`poisoned`: those whose samples are not finite: leave them out). If there are "
            f"none, lower training.learning_rate or use precision=fp32; {self.folder / 'checkpoints'} is untouched"
        )
