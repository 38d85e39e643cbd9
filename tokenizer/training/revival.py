"""When an entry of a codebook counts as dead: by how long it was not chosen, measured by what the batches could show.

A batch of 400 frames shows a book of 16,384 entries each of them once in 41 steps at even use: an entry that was not
chosen in a hundred steps is nothing special there, and in a book of 256 it is. So time is counted in frames per entry.

Shapes: N entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tokenizer.model.book import DEAD_USAGE, Book

# An entry chosen at LIVE_FRACTION of even use is missed in WINDOW frames per entry with this chance:
# that is how often a look finds it dead though it is not.
LIVE_FRACTION, CHANCE = 0.1, 0.05
WINDOW = math.log(1 / CHANCE) / LIVE_FRACTION
# One that was never chosen since it was drawn has learnt nothing that could be lost: it is drawn anew sooner.
TRIAL = 10.0
RATE = 0.3  # the running use decays by exp(-RATE) in as many frames as there are entries


@dataclass(frozen=True)
class DeadRule:
    """How a book's running use (`Book.usage`) tells dead entries in a training of one batch size.

    Attributes:
        decay: of the running use, per step.
        threshold: the use under which an entry is dead.
        trial: the use that a new entry begins with.
        hit: the use that one frame gives its entry.
    """

    decay: float
    threshold: float
    trial: float
    hit: float

    @property
    def trial_steps(self) -> float:
        """Steps after which a new entry that is never chosen is dead."""
        return self._steps(self.trial)

    @property
    def steps_of_a_hit(self) -> float:
        """Steps that an entry lives for by one frame alone; 0 where one is not enough."""
        return self._steps(self.hit)

    def _steps(self, usage: float) -> float:
        if usage <= self.threshold:
            return 0.0
        return math.log(usage / self.threshold) / -math.log(self.decay) if self.decay else 1.0

    def chance(self, fraction: float) -> float:
        """About how often a look finds an entry dead that is chosen at `fraction` of even use, all its life.

        The running use is shot noise: Poisson arrivals, each of one height, decaying. Below one arrival's height its
        distribution function is a power; above, a gamma distribution of the same mean and variance is near it.
        """
        arrivals = fraction / self.hit
        if self.threshold <= self.hit:
            euler = 0.5772156649015329
            log_chance = arrivals * (math.log(self.threshold / self.hit) - euler) - math.lgamma(1 + arrivals)
            return math.exp(log_chance)
        shape, reach = torch.tensor(2 * arrivals), torch.tensor(2 * self.threshold / self.hit)
        return float(torch.special.gammainc(shape.double(), reach.double()))


def dead_rule(size: int, frames: int, decay: float | None = None) -> DeadRule:
    """The rule for a book of N entries in a training with so many frames in a step.

    Args:
        size: N.
        frames: of all processes and micro-batches.
        decay: of the running use, per step, with DEAD_USAGE of even use as the threshold; None derives both, so that an
            entry is dead that was not chosen in WINDOW frames per entry, or never in its first TRIAL.
    """
    per_entry = frames / size
    if decay is not None:
        return DeadRule(decay, DEAD_USAGE, 1.0, (1 - decay) / per_entry)
    decay = math.exp(-RATE * per_entry)
    hit = (1 - decay) / per_entry
    threshold = hit * math.exp(-RATE * WINDOW)
    return DeadRule(decay, threshold, threshold * math.exp(RATE * TRIAL), hit)


@torch.no_grad()
def begin_trial(books: list[Book], frames: int, decay: float | None) -> None:
    """Lets the entries of books that no frame has met yet begin as new ones; others stay as they are."""
    for book in books:
        if bool((book.usage == 1).all()):
            book.usage.fill_(dead_rule(book.size, frames, decay).trial)


def describe(size: int, frames: int, decay: float | None) -> str:
    """For a plan: when an entry is revived, and how often one is by chance."""
    rule = dead_rule(size, frames, decay)
    when = (
        f"not chosen for {rule.steps_of_a_hit:,.0f} steps, or never in its first {rule.trial_steps:,.0f}"
        if decay is None
        else f"running use under {DEAD_USAGE:g}, a new one after {rule.trial_steps:,.0f} steps"
    )
    return (
        f"{size:,} entries, {frames:,} frames a step: {when}; at {LIVE_FRACTION:.0%} of even use dead by chance at "
        f"{rule.chance(LIVE_FRACTION):.1%} of the looks"
    )
