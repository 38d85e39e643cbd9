"""Pipelines: wiring between stages, skipping, redoing, and cells side by side in one table."""

import json
import sys
import types
from dataclasses import dataclass, replace

import numpy as np
import pytest
from typer.testing import CliRunner

import slm.embedded
import tokenizer.embedded
from eval.codes import code_statistics
from eval.merging import merge_results
from eval.protocol import Protocol, TestSet
from eval.protocol import TestSet as Scored
from eval.results_file import load_results, save_results
from eval.schema import Clip, Difference, Results, Sample, make_row
from eval.speech.quality import QualitySummary
from eval.text.normalisers import get_normaliser
from eval.text.wer import score_pairs
from recipes import cli
from recipes.commands import compare, quickstart, transcribe
from recipes.comparison.cells import Cell, Identity, identify
from recipes.comparison.table import label_results
from recipes.config import ConfigError, load_config
from recipes.runs.pipeline import PipelineConfig, Stage, StageError, describe, make_steps, refuse_stale, run_steps
from recipes.runs.run_folder import RunFolder
from tokenizer.data.utterances import DataError

RAN = []


@dataclass
class FakeConfig:
    run_dir: str = ""
    source: str = ""
    rate: float = 1.0


CHANGED: dict[str, Exception] = {}  # what a complete stage says of its inputs


def fake_recipe(name):
    def run(config):
        folder = RunFolder(config.run_dir)
        if folder.complete:
            if error := CHANGED.get(name):
                raise error
            return
        folder.start(config)
        RAN.append((name, config.run_dir, config.source, config.rate))
        folder.mark_complete()

    def plan(config):
        if config.rate < 0:
            raise ValueError("rate: below 0")
        return {}

    return types.SimpleNamespace(Config=FakeConfig, run=run, plan=plan)


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    RAN.clear()
    CHANGED.clear()
    for name in ("make", "use"):
        monkeypatch.setitem(sys.modules, f"recipes.commands.{name}", fake_recipe(name))


def pipeline(tmp_path, **more):
    stages = [Stage("make"), Stage("use", set=["source=${make}/model"])]
    return PipelineConfig(run_dir=str(tmp_path / "runs"), stages=stages, **more)


def test_a_stage_gets_a_folder_and_what_earlier_ones_made(tmp_path):
    run_steps(make_steps(pipeline(tmp_path, set=["use.rate=2"])))
    made, used = f"{tmp_path}/runs/make", f"{tmp_path}/runs/use"
    assert RAN == [("make", made, "", 1.0), ("use", used, f"{made}/model", 2.0)]


def test_complete_stages_are_skipped_and_redo_starts_from_one(tmp_path):
    run_steps(make_steps(pipeline(tmp_path)))
    run_steps(make_steps(pipeline(tmp_path)))
    assert len(RAN) == 2
    run_steps(make_steps(pipeline(tmp_path, set=["use.rate=3"])), redo="use")
    assert [name for name, *_ in RAN] == ["make", "use", "use"]
    assert (tmp_path / "runs" / "use.old-1").is_dir()


def test_a_stage_older_than_its_input_is_refused_naming_the_way_out(tmp_path, monkeypatch):
    steps = make_steps(pipeline(tmp_path))
    run_steps(steps)
    steps[0].folder.set_aside()
    monkeypatch.setattr("recipes.runs.run_folder.now", lambda: "2999-01-01T00:00:00+0000")
    steps[0].recipe.run(steps[0].config)
    for check in (run_steps, describe):
        with pytest.raises((StageError, ConfigError), match=r"use was made from an earlier .*redo=use|redo=use"):
            check(steps)


@pytest.mark.parametrize(
    ("made", "used", "stale"),
    [
        ("2023-11-14T22:13:20+0000", "2023-11-14T18:13:20-0500", False),  # an hour later, on another machine
        ("2023-11-14T18:13:20-0500", "2023-11-14T22:13:20+0000", True),
        ("2023-11-15T03:43:20+0530", "2023-11-14T22:13:20+0000", False),  # the same moment
        ("2023-11-14T22:13:20+0000", "some time", False),  # nobody can say
    ],
)
def test_times_of_different_zones_are_compared_as_times(tmp_path, made, used, stale):
    steps = make_steps(pipeline(tmp_path))
    run_steps(steps)
    for step, finished in zip(steps, (made, used), strict=True):
        file = step.folder.path("complete.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"finished": finished}))
    if stale:
        with pytest.raises(ConfigError, match="redo=use"):
            refuse_stale(steps[1])
    else:
        refuse_stale(steps[1])


def test_a_complete_stage_looks_at_its_inputs_again(tmp_path):
    steps = make_steps(pipeline(tmp_path))
    run_steps(steps)
    CHANGED["make"] = DataError("manifest.jsonl: no such file")
    run_steps(steps)  # what it was made from is gone: what it made still serves
    CHANGED["use"] = ConfigError("begun with other contents of corpus")
    with pytest.raises(StageError, match=r"^stage use: begun with other contents(.|\n)*redo=use"):
        run_steps(steps)


def test_a_plan_checks_each_stage_whose_inputs_are_there(tmp_path):
    broken = pipeline(tmp_path, set=["use.rate=-1"])
    describe(make_steps(broken))  # nothing is made yet: `use` cannot be checked
    run_steps(make_steps(broken)[:1])
    with pytest.raises(ConfigError, match="stage use: rate: below 0"):
        describe(make_steps(broken))


def test_a_stage_with_other_settings_is_refused_naming_the_way_out(tmp_path):
    run_steps(make_steps(pipeline(tmp_path)))
    with pytest.raises(StageError, match=r"^stage use(.|\n)*rate: was 1.0, is now 5.0(.|\n)*redo=use"):
        run_steps(make_steps(pipeline(tmp_path, set=["use.rate=5"])))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage("nothing-such")], "no command 'nothing-such'"),
        ([Stage("make", set=["source=${use}"]), Stage("use")], r"\$\{use\}.*no earlier stage"),
        ([Stage("make", set=["raet=1"])], "stage make: (.|\n)*did you mean `rate`"),
    ],
)
def test_everything_is_checked_before_anything_runs(tmp_path, stages, message):
    with pytest.raises(ConfigError, match=message):
        make_steps(PipelineConfig(run_dir=str(tmp_path), stages=stages))
    assert not RAN


def test_generate_is_known_again_as_the_command_that_it_runs_as(tmp_path):
    """The folder of `slm generate task=st` keeps the configuration of `slm transcribe`."""
    stages = [Stage("generate", set=["task=st", "model=embedded-slm-12.5hz", "corpus=runs/codes"])]
    (step,) = make_steps(PipelineConfig(run_dir=str(tmp_path), stages=stages))
    assert step.recipe is transcribe and step.config == transcribe.Config(
        run_dir=str(tmp_path / "generate"), task="st", model="embedded-slm-12.5hz", corpus="runs/codes"
    )
    step.folder.start(step.config)
    step.folder.mark_complete()
    step.folder.check(step.config)
    assert step.folder.done(step.config)


def test_a_pipeline_s_own_mistakes_are_named():
    for wrong, message in (
        ({"stages": []}, "stages: empty"),
        ({"stages": [Stage("make"), Stage("make")]}, "make stands there twice"),
        ({"stages": [Stage("make")], "redo": "mak"}, "redo=mak"),
        ({"stages": [Stage("make")], "set": ["other.rate=1"]}, "STAGE.key=value"),
    ):
        with pytest.raises(ValueError, match=message):
            PipelineConfig(**wrong)


def cells(tmp_path, **more):
    stages = [Stage("make", shared=True), Stage("use", set=["source=${make}"])]
    some = [Cell("slow", ["use.rate=2"]), Cell("fast", ["use.rate=4"])]
    return compare.Config(run_dir=str(tmp_path), stages=stages, **({"cells": some} | more))


def test_cells_share_what_is_shared_and_have_folders_of_their_own(tmp_path):
    config = cells(tmp_path)
    for cell in config.cells:
        run_steps(make_steps(config, cell.name, cell.set))
    made = str(tmp_path / "make")
    assert RAN == [
        ("make", made, "", 1.0),
        ("use", str(tmp_path / "slow" / "use"), made, 2.0),
        ("use", str(tmp_path / "fast" / "use"), made, 4.0),
    ]


def scored(monkeypatch, tmp_path, broken=(), raised=None):
    """Cells slow and fast whose last stage is an evaluation; in those that are ``broken``, `use` raises."""

    def use(config):
        if any(f"/{cell}/" in config.run_dir for cell in broken):
            raise raised
        return fake_recipe("use").run(config)

    def evaluate(config):
        protocol = Protocol("asr", {}, "basic", "1", TestSet("few", "abc", 1), bootstrap_samples=10)
        rates = score_pairs(["one two"], ["one two"], get_normaliser("basic"), ["u"])
        folder = RunFolder(config.run_dir).start(config).folder
        save_results(Results("", [make_row("SLM ASR", "asr", "m", protocol, rates)]), folder)
        RunFolder(config.run_dir).mark_complete()

    using = types.SimpleNamespace(**vars(fake_recipe("use")) | {"run": use})
    monkeypatch.setitem(sys.modules, "recipes.commands.use", using)
    kind = types.SimpleNamespace(**vars(fake_recipe("evaluate")) | {"run": evaluate})
    monkeypatch.setitem(sys.modules, "recipes.commands.evaluate", kind)
    config = cells(tmp_path)
    config.stages.append(Stage("evaluate", set=["source=${use}"]))
    return config


@pytest.mark.parametrize("raised", [ConfigError("rate: too slow\nmore of it"), RuntimeError("a bug")])
def test_a_failed_cell_is_named_and_the_others_go_on(tmp_path, monkeypatch, raised):
    config = scored(monkeypatch, tmp_path, ["slow"], raised)
    with pytest.raises(compare.CellsFailed, match=f"1 of the cells failed:\n  - slow: stage use: {raised}"):
        compare.run(config)
    results = load_results(tmp_path)
    assert [row.label for row in results.rows] == ["fast: SLM ASR"]
    assert results.notes == [f"failed: slow, stage use: {str(raised).splitlines()[0]}"]
    assert "failed: slow" in (tmp_path / "report.html").read_text()
    # The same command tries it again, and then nothing is left to tell.
    compare.run(scored(monkeypatch, tmp_path))
    results = load_results(tmp_path)
    assert [row.label for row in results.rows] == ["slow: SLM ASR", "fast: SLM ASR"] and not results.notes


def test_a_failed_shared_stage_and_an_interrupt_stop_at_once(tmp_path, monkeypatch):
    config = scored(monkeypatch, tmp_path, ["slow"], KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        compare.run(config)
    assert [name for name, *_ in RAN] == ["make"]
    monkeypatch.setattr(sys.modules["recipes.commands.make"], "run", fail)
    with pytest.raises(ValueError, match="^no voice is installed$"):
        compare.run(scored(monkeypatch, tmp_path / "again"))
    assert len(RAN) == 1


def fail(config):
    raise ValueError("no voice is installed")


def test_a_failed_cell_ends_in_exit_code_2(tmp_path, monkeypatch):
    config = scored(monkeypatch, tmp_path, ["slow"], ValueError("rate: too slow"))
    monkeypatch.setattr(cli, "build_config", lambda *arguments: (compare, config))
    found = CliRunner().invoke(cli.app, ["compare"])
    assert found.exit_code == 2 and "slow: stage use: rate: too slow" in found.stderr


def test_a_shared_stage_may_not_depend_on_a_cell(tmp_path):
    with pytest.raises(ConfigError, match="cell a: sets make, which is shared"):
        make_steps(cells(tmp_path), "a", ["make.rate=2"])
    config = cells(tmp_path)
    config.stages = [Stage("use"), Stage("make", shared=True, set=["source=${use}"])]
    with pytest.raises(ConfigError, match=r"\$\{use\}.*no earlier stage"):
        make_steps(config, "a")


def test_cells_are_checked(tmp_path):
    for wrong in ([], [Cell("a"), Cell("a")], [Cell("use")]):
        with pytest.raises(ValueError, match="cells"):
            cells(tmp_path, cells=wrong)
    with pytest.raises(ValueError, match="folder's name"):
        Cell("../a")


def steps_of(config):
    return {
        cell.name: {s.stage.name: s.config for s in make_steps(config, cell.name, cell.set)} for cell in config.cells
    }


@pytest.mark.parametrize("name", ["quickstart", "from-scratch", "compare"])
def test_the_shipped_quickstarts_are_wired_whole(tmp_path, name):
    kind = compare.Config if name == "compare" else quickstart.Config
    config = load_config(kind, f"quickstart/{name}", [f"run_dir={tmp_path}"])
    for cell, steps in steps_of(config).items():
        # No path of the default folder is left.
        for stage, settings in steps.items():
            assert "runs/" not in repr(settings), f"{cell}, {stage} reads from another pipeline's folder: {settings}"
        assert steps["encode"].tokenizer == steps["evaluate"].tokenizer
        if name == "quickstart":
            assert steps["encode"].tokenizer == f"embedded-{cell}" and steps["finetune"].model == f"embedded-slm-{cell}"
            assert steps["encode"].precision == "fp32"  # as the SLM's own codes, on every machine
            assert [judge.name for judge in steps["evaluate"].judges] == ["embedded-recogniser"]
        else:
            assert steps["encode"].tokenizer == str(tmp_path / cell / "train-tokenizer" / "model")
            assert [judge.name for judge in steps["evaluate"].judges] == [str(tmp_path / "train-teacher" / "model")]


def test_the_quickstart_says_at_once_which_embedded_files_are_missing(tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    monkeypatch.setattr(tokenizer.embedded, "WEIGHTS", weights)
    monkeypatch.setattr(slm.embedded, "WEIGHTS", weights)
    config = load_config(quickstart.Config, "quickstart/quickstart", [f"run_dir={tmp_path / 'runs'}"])
    present = ["embedded-25hz", "embedded-12.5hz", "embedded-6.25hz", "embedded-recogniser"]
    for name in present:
        (weights / name).mkdir(parents=True)
        (weights / name / "config.json").touch()
        (weights / name / "model.safetensors").touch()
    for start in (quickstart.plan, quickstart.run):
        with pytest.raises(ConfigError, match=r"embedded-slm-25hz: its files are missing(.|\n)*--train-tokenizer"):
            start(config)
    assert not (tmp_path / "runs").exists()
    for name in slm.embedded.SPEECH_LMS:
        (weights / name).mkdir()
        for file in ("config.json", "model.safetensors", "tokenizer.json", "speech_vocabulary.json"):
            (weights / name / file).touch()
    plan = quickstart.plan(config)
    assert "prepare-corpus" in repr(plan) and "6.25hz" in repr(plan)


def scored_row(system: str, name: str, **facts):
    protocol = Protocol("speech", {"name": "judge"}, "basic", "1", Scored("t", "0", 2), bootstrap_samples=20)
    rates = score_pairs(["one two", "three"], ["one", "three"], get_normaliser("none"))
    return make_row(name, system, "m", protocol, rates, **facts)


def test_a_cell_is_said_of_all_that_depends_on_it_and_not_of_the_ground_truth():
    row = scored_row("tts", "SLM TTS", difference=Difference("ground truth", 0.1, (0.0, 0.2), 0.1))
    results = Results(
        "",
        [scored_row("ground_truth", "ground truth"), row],
        codes=[code_statistics([np.zeros((1, 3), int)], [4], 25.0, name) for name in ("tokenizer", "25hz/tokenizer")],
        quality=[QualitySummary("resynthesis", "m", 1, {}, {}, [])],
        samples=[Sample("u", "said", [Clip("ground truth", "a.flac"), Clip("SLM TTS", "b.flac")])],
    )
    label_results(results, Identity("25hz", "pooled", 3))
    assert [item.label for item in results.codes] == ["25hz: tokenizer", "25hz/tokenizer"]
    assert [item.label for item in results.quality] == ["25hz: resynthesis"]
    assert [one.label for one in results.rows] == ["ground truth", "25hz: SLM TTS"]
    assert (row.name, row.cell, row.method, row.seed) == ("SLM TTS", "25hz", "pooled", 3)
    assert [clip.cell for clip in results.samples[0].clips] == ["", "25hz"]
    assert row.difference.against == "ground truth"


def test_every_cell_s_transcript_shows_beside_the_recording():
    def cell(name, text):
        clip = Clip("ground truth", "a.flac", {"judge": "said", "SLM ASR": text})
        results = Results("", [scored_row("asr", "SLM ASR")], samples=[Sample("u", "said", [clip])])
        return label_results(results, Identity(name))

    (clip,) = merge_results([cell("25hz", "sad"), cell("6hz", "sat")], "both").samples[0].clips
    assert clip.heard == {"judge": "said", "25hz: SLM ASR": "sad", "6hz: SLM ASR": "sat"}


def identities_of(name: str, rate_of, **changes) -> dict[str, tuple[str, int | None]]:
    config = load_config(compare.Config, name)
    config = replace(config, **changes)
    stages = {
        cell.name: {s.stage.name: s.config for s in make_steps(config, cell.name, cell.set) if not s.stage.shared}
        for cell in config.cells
    }
    found = identify(config.cells, stages, {cell.name: rate_of(cell.name) for cell in config.cells})
    return {cell: (one.method, one.seed) for cell, one in found.items()}


def test_method_and_seed_follow_from_what_the_cells_set():
    def rate(cell: str) -> float:
        return float(cell.partition("hz")[0])

    found = identities_of("mixed/compare-distillation", rate)
    for name, (method, seed) in found.items():
        kind = name.split("-")[1]
        assert method == (f"{kind}, weights.distillation=25" if "quarter" in name else kind) and seed == int(name[-1])
    for name in ("embedded/compare", "embedded/compare-tokenizers", "grid-s1/compare", "quickstart/compare"):
        assert {method for method, _ in identities_of(name, rate).values()} == {""}, name
    assert {seed for _, seed in identities_of("grid-s1/compare", rate).values()} == {0}


def test_a_cell_may_state_its_method_and_seed_and_nothing_is_guessed():
    def cells(*sets, **stated):
        return [Cell(str(n), list(one), **stated) for n, one in enumerate(sets)]

    def found(*some):
        return list(identities_of("grid-s1/compare", lambda cell: 12.5, cells=some[0]).values())

    # Another preset at the same rate is a method; stages of several seeds are no one seed.
    assert found(cells(["tokenizer.preset=nano-12.5hz"], ["tokenizer.preset=micro-12.5hz"])) == [
        ("nano", 0),
        ("micro", 0),
    ]
    mixed = cells(["tokenizer.seed=1", "slm.seed=2"], ["tokenizer.seed=2", "slm.seed=2"])
    assert found(mixed) == [("tokenizer.seed=1", None), ("tokenizer.seed=2", 2)]
    assert found(cells(["tokenizer.seed=1", "slm.seed=2"], [], method="ours", seed=5)) == [("ours", 5)] * 2
    # The default said aloud is the default.
    assert found(cells(["tokenizer.distillation.kind=resynthesis"], [])) == [("", 0)] * 2


def test_train_tokenizer_is_a_switch_of_the_quickstart_alone(tmp_path):
    words = ["quickstart", "--train-tokenizer", "--dry-run", f"run_dir={tmp_path / 'runs'}"]
    found = CliRunner().invoke(cli.app, words)
    assert found.exit_code == 0 and "12.5hz.train-teacher" in found.stdout and "embedded" not in found.stdout
    for wrong in (
        ["quickstart", "--train-tokenizer", "--config", "quickstart/quickstart"],
        ["encode", "--train-tokenizer"],
    ):
        found = CliRunner().invoke(cli.app, wrong)
        assert found.exit_code == 2 and "--train-tokenizer" in found.stderr
