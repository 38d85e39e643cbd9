"""Which entries are taken for dead: counts drawn at known shares, looked at as a training looks at them."""

from __future__ import annotations

import logging

import pytest
import torch
from test_codec_training import config

from recipes.commands import train_tokenizer
from tokenizer.model.book import DEAD_USAGE
from tokenizer.model.quantizer import VectorQuantizer
from tokenizer.training.revival import CHANCE, LIVE_FRACTION, TRIAL, WINDOW, begin_trial, dead_rule
from tokenizer.training.state import CodecTrainingConfig

# (entries of the book, frames in a step): the published books with 16 crops of 2 s at 12.5 Hz or 128 of 6 s, and ours
CASES = [(16_384, 400), (4096, 400), (16_384, 9600), (1024, 200), (1024, 100), (32, 400)]


def looked_dead(size: int, frames: int, share: float, decay: float | None, entries: int = 4000) -> float:
    """The share of looks at which entries of a share of even use are found dead, once long in use."""
    rule = dead_rule(size, frames, decay)
    draws = torch.Generator().manual_seed(0)
    mean = torch.full((entries,), share * frames / size)
    usage = torch.full((entries,), share)
    settle = round(6 / (1 - rule.decay)) if decay else round(2 * WINDOW * size / frames) + 1
    dead = []
    for step in range(settle + 400):
        usage.lerp_(torch.poisson(mean, draws) * (size / frames), 1 - rule.decay)
        if step >= settle and step % 20 == 0:
            dead.append((usage < rule.threshold).float().mean())
    return float(torch.stack(dead).mean())


@pytest.mark.parametrize(("size", "frames"), CASES)
def test_a_live_entry_is_hardly_ever_taken_for_dead(size, frames):
    """At a tenth of even use at no more than 5 % of the looks, at even use never; the rule knows how often."""
    rule = dead_rule(size, frames)
    found = looked_dead(size, frames, LIVE_FRACTION, None)
    assert found <= CHANCE
    if frames < size:
        assert rule.chance(LIVE_FRACTION) == pytest.approx(found, abs=0.02)
    assert looked_dead(size, frames, 1.0, None, entries=1000) == 0


@pytest.mark.parametrize(("size", "frames"), [(16_384, 400), (1024, 200), (1024, 4000)])
def test_what_a_fixed_decay_takes_for_dead_is_told(size, frames):
    """The former default, 0.97 a step whatever the batch: right for 4,000 frames, and not for 400 of 16,384 entries."""
    found = {share: looked_dead(size, frames, share, 0.97) for share in (LIVE_FRACTION, 1.0)}
    rule = dead_rule(size, frames, 0.97)
    for share, chance in found.items():
        assert rule.chance(share) == pytest.approx(chance, abs=0.03)
    assert (found[LIVE_FRACTION] > CHANCE) == (frames < 4000)
    if size == 16_384:
        assert 0.04 < found[1.0] < 0.13  # of the live entries, at every look


@pytest.mark.parametrize(("size", "frames"), [(64, 16), (64, 40), (32, 400)])
def test_a_book_in_training_tells_dead_from_live(size, frames):
    """New entries that are never chosen die after TRIAL frames per entry, others after WINDOW; one hit keeps alive."""
    book, rule = VectorQuantizer(8, size, 4), dead_rule(size, frames)
    begin_trial([book], frames, None)
    others = torch.arange(frames) % (size - 2) + 2  # entries 0 and 1 are never among them
    hit = others.clone()
    hit[0] = 0

    def dead_after(entry: int) -> int:
        for step in range(1, 10_000):
            book.update_usage(others[None], decay=rule.decay)
            if book.usage[entry] < rule.threshold:
                return step
        raise AssertionError("never dead")

    assert dead_after(1) == pytest.approx(TRIAL * size / frames, abs=1)
    book.update_usage(hit[None], decay=rule.decay)
    assert dead_after(0) == pytest.approx(WINDOW * size / frames, rel=0.05, abs=1)
    candidates = torch.randn(9, 4)
    assert book.revive(candidates, torch.Generator().manual_seed(0), rule.threshold, rule.trial) >= 2
    assert dead_after(1) == pytest.approx(TRIAL * size / frames, abs=1)


def test_a_book_that_was_trained_keeps_its_use():
    fresh, trained = VectorQuantizer(8, 16, 4), VectorQuantizer(8, 16, 4)
    trained.usage[3] = 0.5
    begin_trial([fresh, trained], 4, None)
    assert bool((fresh.usage == dead_rule(16, 4).trial).all()) and trained.usage[3] == 0.5 and trained.usage[0] == 1


def test_a_decay_of_ones_own_is_the_former_rule():
    rule = dead_rule(1024, 200, 0.97)
    assert (rule.decay, rule.threshold, rule.trial) == (0.97, DEAD_USAGE, 1.0)
    assert round(rule.trial_steps) == 98
    assert CodecTrainingConfig().usage_decay is None
    CodecTrainingConfig(usage_decay=0.97)


def test_the_plan_says_when_entries_are_revived_and_warns(make_corpus, tmp_path, caplog):
    manifest = make_corpus()

    def plan(**training):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="slm"):
            facts = train_tokenizer.plan(config(manifest, tmp_path / "run", None, training=training))
        return facts["dead entries"], caplog.text

    # books of 32 and 16 entries, 2 crops of 0.5 s at 12.5 Hz: 14 frames a step
    told, warned = plan(steps=1000)
    assert told[0].startswith("32 entries, 14 frames a step: not chosen for 68 steps, or never in its first 23;")
    assert not warned
    assert "no entry of a book of 32 is revived: it takes 23 steps" in plan(steps=20)[1]
    assert "usage_decay=0.5: of the 32 entries" in plan(steps=1000, usage_decay=0.5)[1]
    assert plan(revive_steps=0) == ("are left as they are", "")
