"""Progress: a bar on a terminal, elsewhere a line of the log every few per cent."""

import logging
from types import SimpleNamespace

import pytest

from recipes.runs import progress as module
from recipes.runs.progress import Progress, progress
from recipes.runs.times import clock
from recipes.runs.tracking import TrainerProgress


@pytest.fixture
def lines(monkeypatch, caplog):
    """Runs so many steps of so many seconds where no terminal is; returns the log's lines."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    caplog.set_level(logging.INFO, logger="slm")
    monkeypatch.setattr(module.log, "propagate", True)

    def run(total, seconds, done=0):
        caplog.clear()
        shown = Progress("finetune", total, done, terminal=False)
        for step in range(done, total):
            now[0] += seconds
            shown.show(loss=f"{step / 100:.2f}")
            shown.update()
        shown.close()
        return [record.getMessage() for record in caplog.records]

    return run


def test_a_long_stage_is_told_every_few_per_cent_with_figures_speed_and_time_left(lines, capfd):
    found = lines(500, 8.0)  # 66 minutes
    assert found[0] == "finetune: 2 of 500 (0 %), loss 0.01, 8.00 s each, 66 min 24 s left"
    assert found[-1] == "finetune: 500 of 500 (100 %), loss 4.99, 8.00 s each"
    assert 20 <= len(found) <= 23
    assert "%|" not in capfd.readouterr().err  # no bar, where the log's lines go too


def test_a_short_stage_says_nothing_and_a_very_long_one_is_never_silent_for_long(lines):
    assert lines(78, 0.1) == []
    assert len(lines(1000, 3600.0)) == 1000  # 5 per cent would be two days


def test_a_resumed_stage_counts_its_own_speed(lines):
    found = lines(500, 1.0, done=400)
    assert found[0] == "finetune: 410 of 500 (82 %), loss 4.09, 1.00 a second, 1 min 30 s left"


def test_a_terminal_sees_one_bar(capfd):
    shown = Progress("finetune", 3, terminal=True)
    shown.show(loss="1.5")
    shown.update(3)
    shown.close()
    bar = capfd.readouterr().err
    assert "3/3" in bar and "loss=1.5" in bar and bar.count("\n") == 1


def test_iterating_passes_everything_on(capfd):
    assert list(progress(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert capfd.readouterr().err == ""


def test_only_the_first_process_tells(lines, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert lines(500, 8.0) == []


def test_clock():
    assert clock(7.4) == "7 s" and clock(135) == "2 min 15 s"


def test_a_trainer_s_progress_shows_its_loss_and_rewards(monkeypatch):
    state = SimpleNamespace(is_world_process_zero=True, max_steps=10, global_step=0)
    shown = TrainerProgress("train-preference")
    shown.on_train_begin(None, state, None)
    figures = []
    monkeypatch.setattr(shown.progress, "show", lambda **found: figures.append(found))
    shown.on_log(None, state, None, logs={"loss": 0.6931, "reward_margin": 0.25, "reward_accuracy": 1.0})
    shown.on_log(None, state, None, logs={"loss": 1e-5, "reward": -0.5, "kl": 0.1})
    assert figures == [{"loss": "0.693", "reward_margin": "0.250"}, {"loss": "0.000", "reward": "-0.500"}]
