"""The health of a tokenizer's training: every line in the log appears once and only when it should."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch

from recipes.commands import train_tokenizer
from recipes.config import from_values
from recipes.tokenizer_training.data import make_crops
from tokenizer.data.mixing import TrainingAudio
from tokenizer.model.code_use import CodeCounts, book_use, count_codes
from tokenizer.model.quantizer import VectorQuantizer
from tokenizer.training.health import PATIENCE_STEPS, HealthMonitor, window_means
from tokenizer.training.state import CodecTrainingConfig, HealthRecord

TINY = {f"{part}_width": 32 for part in ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder")} | {
    "latent_dim": 32,
    "head_dim": 16,
    "codebook_sizes": [32, 16, 16],
}
SIZE = 64
STEPS, LOG = 1000, 25
WEIGHTS = {"mel": 15.0, "distillation": 50.0, "probe": 10.0}
HEALTHY = {
    "loss/mel": 2.0,
    "loss/distillation": 0.1,
    "loss/total": 40.0,
    "loss/discriminator": 0.9,
    "loss/adversarial": 0.6,
    "gradient_norm": 40.0,
}  # two discriminators


class Run:
    """A training without one: figures, codes and crops of one's own go to a monitor."""

    def __init__(self, record: HealthRecord | None = None, **config):
        self.state = SimpleNamespace(
            step=0,
            health=record or HealthRecord(),
            counts=CodeCounts(),
            model=SimpleNamespace(quantizer=SimpleNamespace(books=[VectorQuantizer(4, SIZE, 2) for _ in range(2)])),
            discriminator=SimpleNamespace(parts=[0, 1]),
        )
        settings = CodecTrainingConfig(steps=STEPS, batch_size=4, log_steps=LOG, warmup_steps=50, **config)
        accelerator = SimpleNamespace(is_main_process=True, gather=lambda tensor: tensor)
        self.monitor = HealthMonitor(self.state, settings, WEIGHTS, 200, None, accelerator, None)
        self.draws = torch.Generator().manual_seed(0)
        self.logged = {}

    def go(self, until: int, entries: int = SIZE, peak: float = 0.5, **figures: float) -> list[str]:
        """Trains to a step with figures other than healthy ones; returns the kinds of warnings given so far."""
        crops = [{"input_values": torch.full((4, 1, 8), peak)}]
        while self.state.step < until:
            codes = torch.randint(entries, (4, 2, 10), generator=self.draws)
            self.state.counts.add(count_codes(codes, [SIZE, SIZE]))
            self.state.step += 1
            self.monitor.step(HEALTHY | {f"loss/{k}": v for k, v in figures.items()}, True, crops)
            if self.state.step % LOG == 0:
                self.logged = self.monitor.window()
        return list(self.state.health.warnings)


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.WARNING, logger="tokenizer.training.health")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "tokenizer.training.health"]


def test_use_and_perplexity_of_counted_codes():
    counts = CodeCounts()
    codes = torch.tensor([[[0, 0, 1, 1], [3, 3, 3, -1]], [[2, 2, 3, 3], [3, -1, -1, -1]]])
    counts.add(count_codes(codes, [8, 4]))
    first, second = counts.take()
    assert (first.frames, first.entries, first.used) == (8, 4, 0.5)
    assert first.perplexity == pytest.approx(4)  # 2 bits
    assert (second.frames, second.used, second.perplexity) == (4, 0.25, pytest.approx(1))
    assert counts.take() == []
    # what even use shows in as many frames as there are entries: all but 1/e of them
    assert book_use(torch.ones(100)).even == pytest.approx(100 * (1 - math.exp(-1)))
    assert book_use(torch.zeros(5)).perplexity == 0


def test_window_means_leave_out_what_is_not_finite_and_keep_what_only_some_steps_have():
    means = window_means([{"a": 1.0, "revived": 6.0}, {"a": math.nan}, {"a": 3.0, "bad": math.inf}])
    assert means["a"] == 2 and means["revived"] == 6 and math.isnan(means["bad"])


def test_a_healthy_run_is_silent_and_logs_its_books(lines):
    run = Run()
    run.state.model.quantizer.books[1].usage[:16] = 0.0
    assert run.go(STEPS) == [] and not lines()
    assert run.logged["codes/book_0/used"] == 1 and run.logged["codes/book_0/perplexity"] > 0.9 * SIZE
    assert run.logged["codes/book_0/dead"] == 0 and run.logged["codes/book_1/dead"] == 0.25
    assert run.logged["health/silent_crops"] == run.logged["health/non_finite_steps"] == 0


@pytest.mark.parametrize(
    ("kind", "wrong", "says"),
    [
        ("collapse", {"entries": 2}, ["perplexity 2.0, 2 of 64 entries", "even use would show 64", "learning_rate"]),
        # 40 - 50 x 0.001 are the rest; a quarter of that is a fifth of the whole
        ("distillation", {"distillation": 0.001}, ["0.13 % of the loss", "weights.distillation=9.99e+03 would"]),
        ("distillation", {"distillation": 0.7}, ["87 % of the loss", "weights.distillation=1.79 would"]),
        ("discriminator", {"discriminator": 0.1, "adversarial": 1.9}, ["0.050 each", "0.95", "start_step"]),
    ],
)
def test_what_is_wrong_is_said_once_after_grace_and_patience(lines, kind, wrong, says):
    run = Run(usage_decay=0.97)
    begins = 100  # a tenth of the steps, twice the warm-up
    begins += {"discriminator": 200, "collapse": 25}.get(kind, 0)  # their start; the first revival, at 150
    assert run.go(begins + PATIENCE_STEPS - LOG, **wrong) == []
    assert run.go(begins + PATIENCE_STEPS, **wrong) == [kind]
    assert run.go(STEPS, **wrong) == [kind]
    (line,) = lines()
    assert line.startswith(f"step {begins + PATIENCE_STEPS}: ") and all(part in line for part in says), line


def test_a_fault_that_passes_is_not_said(lines):
    run = Run()
    for start in range(100, STEPS, 100):  # three windows wrong, one right
        run.go(start + 75, entries=1, distillation=0.0001, discriminator=0.0, adversarial=2.0)
        run.go(start + 100)
    assert not lines()


def test_a_discriminator_that_is_certain_but_fooled_has_not_won(lines):
    assert Run().go(STEPS, discriminator=0.1, adversarial=0.5) == []


def test_small_windows_are_no_collapse(lines):
    """In 40 frames 64 entries cannot show a perplexity of 64: the measure is what even use would show."""
    run = Run()
    run.monitor.patience = 0
    crops = [{"input_values": torch.ones(1, 1, 8)}]
    for step in range(150, 160):
        run.state.step = step
        run.state.counts.add(count_codes(torch.randint(SIZE, (1, 2, 2)), [SIZE, SIZE]))
        run.monitor.step(HEALTHY, True, crops)
        run.monitor.window()
    assert not lines()


def test_the_probe_weighs_on_nothing():
    """0.2 of 40 is too little; that 36 of the 40 are the probe's makes it 0.2 of 4."""
    assert Run().go(STEPS, distillation=0.004) == ["distillation"]
    assert Run().go(STEPS, distillation=0.004, probe=3.6) == []


def test_gradients_that_are_cut_by_far_are_said(lines):
    run = Run()
    run.state.step = 100
    for norm, kinds in ((900.0, []), (2000.0, ["clipped"])):
        for _ in range(200):
            run.state.step += 1
            run.monitor.step(HEALTHY | {"gradient_norm": norm}, True, [{"input_values": torch.ones(1, 1, 8)}])
            if run.state.step % LOG == 0:
                run.monitor.window()
        assert list(run.state.health.warnings) == kinds
    assert "its norm is 2000, training.gradient_clip 1" in lines()[0]


def test_silent_crops_are_counted_and_said(lines):
    run = Run()
    assert run.go(400) == []
    assert run.go(450, peak=1e-4) == [] and run.logged["health/silent_crops"] == 1
    assert run.go(600, peak=1e-4) == ["silence"]
    assert "of 2100 crops are silent (peak below -60 dBFS)" in lines()[0]


@pytest.mark.parametrize(
    ("valid", "train", "said"),
    [
        ([3.0, 2.0, 1.9], [3.0, 2.0, 1.9], False),
        ([2.0, 2.1, 2.2], [2.0, 1.8, 1.6], True),
        ([2.0, 2.1, 2.0], [2.0, 1.8, 1.6], False),  # once is noise
        ([2.0, 2.1, 2.2], [2.0, 2.1, 2.2], False),  # both rise: something else
        ([2.0, 2.02, 2.03], [2.0, 1.8, 1.6], False),  # within the noise
        ([math.nan, 2.0, 2.1, 2.2], [2.0, 2.0, 1.8, 1.6], True),
    ],
)
def test_learning_by_heart_is_said(lines, valid, train, said):
    run = Run()
    for index, (one, other) in enumerate(zip(valid, train, strict=True)):
        run.go(100 * (index + 1), mel=other)
        run.monitor.validated({"valid/mel": one})
    assert (["overfit"] if said else []) == list(run.state.health.warnings)
    if said:
        assert "risen from 2.000" in lines()[0] and "to 2.200" in lines()[0]


def test_a_resumed_run_keeps_quiet_about_what_was_said_and_goes_on_counting(lines):
    before = HealthRecord(non_finite_steps=3, warnings={"collapse": "step 200: ..."}, best_step=100, best_valid_mel=2.0)
    record = HealthRecord()
    record.load_state_dict(before.state_dict())
    assert record == before
    run = Run(record)
    run.go(STEPS, entries=1)
    assert not lines() and run.logged["health/non_finite_steps"] == 3


def settings(manifest, run_dir, **training):
    values = {
        "run_dir": str(run_dir),
        "data": [{"path": str(manifest)}],
        "model": TINY,
        "teacher": None,
        "distillation": {"kind": "none"},
        "discriminator": {"enabled": False},
        "crops": {"crop_s": 0.3},
        "training": {"batch_size": 3, "log_steps": 1, "save_steps": 2} | training,
        "precision": "fp32",
    }
    return from_values(train_tokenizer.Config, values)


@pytest.fixture
def poison(monkeypatch):
    """Makes what is read at some positions, or of some recordings, not a number."""

    def poison(positions=(), ids=()):
        real = TrainingAudio.recording

        def recording(self, key, *part):
            utterance, waveform = real(self, key, *part)
            wrong = key[0] in positions or utterance.id in ids
            return utterance, waveform * float("nan") if wrong else waveform

        monkeypatch.setattr(TrainingAudio, "recording", recording)

    return poison


def test_a_step_that_is_not_finite_is_left_out_and_counted(make_corpus, tmp_path, poison, lines):
    poison(positions={4})  # of step 2
    folder = train_tokenizer.run(settings(make_corpus(), tmp_path / "run", steps=4))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["health/non_finite_steps"] for row in rows] == [0, 1, 1, 1]
    assert rows[1]["loss/total"] is None and rows[2]["loss/total"] is not None
    assert "codes/book_0/used" not in rows[1] and 0 < rows[2]["codes/book_0/used"] <= 1
    (line,) = lines()
    assert line.startswith("step 2: ") and "loss/mel" in line and "left out" in line
    from tokenizer import load_tokenizer

    assert all(p.isfinite().all() for p in load_tokenizer(folder).parameters())
    checkpoint = torch.load(tmp_path / "run/checkpoints/checkpoint-0000004/optimizers.pt", weights_only=True)
    assert checkpoint["health"]["non_finite_steps"] == 1 and "non_finite" in checkpoint["health"]["warnings"]
    summary = json.loads((tmp_path / "run/complete.json").read_text())["summary"]
    assert summary["non_finite_steps"] == 1 and summary["warnings"] == [line]


def test_five_in_a_row_stop_the_run_and_name_the_recordings(make_corpus, tmp_path, poison):
    poison(ids={"train1"})  # three recordings, three crops a step: it is in every step
    with pytest.raises(FloatingPointError, match=r"5 steps in a row, to step 5: .*loss/mel.*non_finite_batches.json"):
        train_tokenizer.run(settings(make_corpus(3), tmp_path / "run", steps=9))
    rows = json.loads((tmp_path / "run/non_finite_batches.json").read_text())
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[1]["positions"] == [3, 5]
    for row in rows:
        assert sorted(row["ids"]) == ["train0", "train1", "train2"] and row["poisoned"] == ["train1"]
        assert "loss/mel" in row["not_finite"]


def test_the_ids_are_those_that_the_crops_were_cut_from(make_corpus, tmp_path, monkeypatch):
    crops = make_crops(settings(make_corpus(), tmp_path / "run", steps=4))
    seen, real = [], TrainingAudio.recording

    def recording(self, key, *part):
        utterance, waveform = real(self, key, *part)
        seen.append(utterance.id)
        return utterance, waveform

    monkeypatch.setattr(TrainingAudio, "recording", recording)
    for position in range(12):
        crops[position]
    assert [crops.utterance(position).id for position in range(12)] == seen[:12] and len(set(seen)) == 6
