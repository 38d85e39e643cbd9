"""The quickstart: steps that fit the machine, chosen once; what it opens and ends with."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import yaml
from slm_tiny import save_llm

from eval.protocol import Protocol, TestSet
from eval.results_file import save_results
from eval.schema import Results, make_row
from eval.text.normalisers import get_normaliser
from eval.text.wer import score_pairs
from recipes.commands import compare, finetune, quickstart
from recipes.comparison.running import make_cells
from recipes.config import ConfigError, load_config
from recipes.finetuning import step_budget
from recipes.finetuning.step_budget import STEPS_FILE, StepBudget, choose_steps
from recipes.runs.pipeline import make_steps
from recipes.runs.run_folder import RunFolder


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Starts the shipped quickstart with steps of so many seconds, its stages left out; returns what was to be run."""
    ran, timed = [], []

    def make_table(config, notes):
        ran.append((config, notes))
        RunFolder(config.run_dir).start(config)
        save_results(Results("", []), RunFolder(config.run_dir).folder)
        return {}

    monkeypatch.setattr(compare, "make_table", make_table)

    def start(*overrides, seconds=0.1):
        def time_step(config, speech_tokenizer, texts):
            timed.append(speech_tokenizer)
            assert config.training.tokens_per_step and len(texts) > 500
            return seconds

        monkeypatch.setattr(quickstart, "time_step", time_step)
        config = load_config(quickstart.Config, "quickstart/quickstart", [f"run_dir={tmp_path / 'runs'}", *overrides])
        quickstart.run(config)
        made, notes = ran[-1]
        steps = {cell.name: make_steps(made, cell.name, cell.set) for cell in made.cells}
        return SimpleNamespace(
            config=config,
            notes=notes,
            timed=list(timed),
            steps=[s.config.training.steps for some in steps.values() for s in some if s.stage.name == "finetune"],
        )

    return start


def test_every_rate_takes_the_steps_that_fit_and_later_starts_take_them_too(started, tmp_path, capsys):
    budget = ["budget.minutes=3", "budget.min_steps=100", "budget.max_steps=2000"]
    first = started(*budget, seconds=0.1)
    assert first.timed == ["embedded-25hz", "embedded-12.5hz", "embedded-6.25hz"]
    assert first.steps == [600, 600, 600]
    assert "600 fine-tuning steps" in capsys.readouterr().out and "600 fine-tuning steps" in first.notes[0]
    # Another machine goes on: nothing is timed and nothing chosen anew.
    again = started(*budget, seconds=2.0)
    assert again.timed == first.timed and again.steps == first.steps and again.notes == first.notes
    assert "600 fine-tuning steps" in quickstart.plan(again.config)["fine-tuning steps"]
    # The resolved configuration runs again as it is.
    (tmp_path / "runs" / STEPS_FILE).unlink()
    resolved = yaml.safe_load((tmp_path / "runs" / "config.yaml").read_text())
    assert "finetune.training.steps=600" in resolved["set"]
    assert not load_config(quickstart.Config, tmp_path / "runs" / "config.yaml").chooses


def test_steps_that_are_given_are_not_chosen(started, tmp_path):
    found = started("set=[finetune.training.steps=30]")
    assert found.steps == [30, 30, 30] and not found.timed and not found.notes
    assert not (tmp_path / "runs" / STEPS_FILE).exists()


def test_another_budget_needs_another_folder(started):
    started("budget.minutes=3")
    with pytest.raises(ConfigError, match=r"budget.minutes: was 3.0, is now 4.0(.|\n)*--restart"):
        started("budget.minutes=4")


def test_a_plan_times_nothing(started, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "time_step", None)
    config = load_config(quickstart.Config, "quickstart/quickstart", [f"run_dir={tmp_path / 'runs'}"])
    assert "measured at the start" in quickstart.plan(config)["fine-tuning steps"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("seconds", "steps", "bound"),
    [(0.1, 1200, ""), (0.0999, 1200, ""), (2.0, 400, "min_steps"), (0.01, 2000, "max_steps")],
)
def test_the_budget_s_bounds_hold(seconds, steps, bound):
    chosen = choose_steps(StepBudget(minutes=4, min_steps=400, max_steps=2000), 512, {"a": seconds, "b": seconds})
    assert chosen.steps == steps
    assert chosen.wall_s == pytest.approx(steps * 2 * seconds)
    assert (bound or "as many as fit 4 min for 2 models") in chosen.why and f"{seconds:.2f} s" in chosen.why


def test_a_budget_is_checked(tmp_path):
    for wrong in ({"minutes": 0}, {"min_steps": 0}, {"min_steps": 9, "max_steps": 8}, {"reference_s": 0}):
        with pytest.raises(ValueError, match="must be above 0"):
            StepBudget(**wrong)
    with pytest.raises(ConfigError, match="budget: needs the stages .*; not there: finetune, prepare-corpus"):
        load_config(quickstart.Config, None, ["cells=[{name: a}]", "stages=[{command: encode}]", "budget.minutes=1"])


def test_a_step_is_timed_on_rows_of_the_real_shape(tmp_path, monkeypatch):
    seen = []
    real = step_budget.train

    def train(model, samples, valid, config, folder, **more):
        seen.append((model, samples, config))
        return real(model, samples, valid, config, folder, **more)

    monkeypatch.setattr(step_budget, "train", train)
    llm = save_llm(tmp_path / "llm")
    settings = [f"model={llm}", "training.tokens_per_step=200", "training.pack_length=64", "training.keep=best"]
    config = load_config(finetune.Config, None, [*settings, "device=cpu", "precision=fp32"])
    assert 0 < step_budget.time_step(config, "embedded-12.5hz", ["set white at b four now"] * 20) < 60
    ((model, samples, training),) = seen
    assert (training.tokens_per_step, training.pack_length) == (200, 64)
    assert model.get_input_embeddings().weight.shape[0] >= 1024  # the tokenizer's codes have rows
    assert samples.utterances[0].codes.shape == (1, round(23 * step_budget.SECONDS_PER_CHARACTER * 12.5))
    assert set(samples.task_weights) == {1.0}
    # A further task's mark and column are there too, before any corpus is.
    config = load_config(finetune.Config, None, [*settings, "task_weights.st=2", "device=cpu", "precision=fp32"])
    step_budget.time_step(config, "embedded-12.5hz", ["set white at b four now"] * 20)
    assert seen[-1][1].task_names == ("asr", "st", "tts")


def results(**wers):
    rows = []
    for system in ("tts", "asr"):
        protocol = Protocol("speech" if system == "tts" else "asr", {}, "basic", "1", TestSet("few", "abc", 1))
        for rate, wrong in wers.items():
            hz = float(rate.removeprefix("r").replace("_", "."))
            heard = " ".join(["no"] * wrong + ["yes"] * (10 - wrong))
            rates = score_pairs([" ".join(["yes"] * 10)], [heard], get_normaliser("none"), ["u"])
            rows.append(
                make_row(f"{hz}: {system}", system, "m", protocol, rates, frame_rate_hz=hz, tokens_per_second=hz)
            )
    return Results("", rows)


def test_the_lines_that_matter_name_the_best_rate_its_cost_and_the_one_seed():
    tts, asr, cost, seed = quickstart.headlines(results(r25=3, r12_5=1, r6_25=5))
    assert tts.startswith("SLM TTS: best at 12.5 Hz, WER 10.0 % [") and tts.endswith("25 Hz 30.0 %, 6.25 Hz 50.0 %")
    assert asr.startswith("SLM ASR: best at 12.5 Hz")
    assert cost == "Cost in tokens per second of speech: 25 Hz 25, 12.5 Hz 12.5, 6.25 Hz 6.25"
    assert seed.startswith("One seed")
    one = quickstart.headlines(results(r12_5=1))
    assert one[0].startswith("SLM TTS: 12.5 Hz, WER 10.0 %") and not any("best" in line for line in one)


def test_a_further_task_has_a_line_of_its_own():
    found = results(r25=3, r12_5=1)
    found.rows += [dataclasses.replace(row, system="slm-st") for row in found.rows[2:]]
    assert quickstart.headlines(found)[2].startswith("SLM st: best at 12.5 Hz, WER 10.0 %")


def test_the_shipped_quickstart_contrasts_its_rates():
    config = load_config(quickstart.Config, "quickstart/quickstart")
    assert [(c.a, c.b) for c in config.contrasts] == [(["25hz"], ["12.5hz"]), (["12.5hz"], ["6.25hz"])]


@pytest.mark.parametrize("name", ["quickstart", "from-scratch"])
def test_the_opening_tells_every_stage_and_its_time(tmp_path, capsys, name):
    config = load_config(quickstart.Config, f"quickstart/{name}", [f"run_dir={tmp_path}"])
    cells = make_cells(config)
    chosen = None
    if config.budget:
        seconds = dict.fromkeys(cells, 2 * config.budget.reference_s)
        chosen = choose_steps(config.budget, 512, seconds)
    quickstart.show_opening(config, cells, chosen)
    said = capsys.readouterr().out
    for stage in config.stages:
        assert stage.name in said and stage.rough_s
    assert "unknown" not in said and "All together about" in said
    assert ("measured" in said) == bool(config.budget)


def test_the_opening_knows_what_was_done_before_and_what_is_redone(tmp_path, capsys):
    for redo, done in (("null", True), ("prepare-corpus", False)):
        config = load_config(quickstart.Config, "quickstart/quickstart", [f"run_dir={tmp_path}", f"redo={redo}"])
        cells = make_cells(config)
        first = cells["25hz"][0]
        if not first.folder.complete:
            RunFolder(first.config.run_dir).start(first.config).mark_complete()
        quickstart.show_opening(config, cells, None)
        assert ("done before" in capsys.readouterr().out) == done


def test_a_record_that_cannot_be_read_names_the_way_out(tmp_path):
    (tmp_path / STEPS_FILE).write_text(json.dumps({"steps": "many"}))
    with pytest.raises(ConfigError, match=r"steps.json(.|\n)*--restart"):
        step_budget.saved_steps(RunFolder(tmp_path))
