"""What is not ours is neither written over nor set aside."""

import json
import types
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from recipes import cli
from recipes.commands import compare, convert, export, plot_training, prepare_corpus, score
from recipes.comparison.cells import Cell
from recipes.config import ConfigError
from recipes.runs import own_folders, restart
from recipes.runs.pipeline import Stage
from recipes.runs.run_folder import RunFolder
from recipes.scoring.audio_pass import Players
from recipes.scoring.systems import System


@dataclass
class Config:
    run_dir: str
    model: str = ""
    data: list[str] = field(default_factory=list)
    seed: int = 0


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text("utf-8", errors="replace")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def filled(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}\n")
    return folder


def begun(folder: Path) -> Path:
    RunFolder(folder).start(Config(str(folder)))
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["manifest.jsonl"],
        ["samples/take.flac"],
        ["config.yaml", "notes.txt"],  # somebody's configuration, not a run's
        ["index.json", "manifest.jsonl", "metrics.jsonl", "results.json"],
        ["model/my/weights.bin"],
        ["train-00000-of-00001.parquet"],
    ],
)
def test_a_folder_that_no_run_was_begun_in_is_left_alone(tmp_path, names):
    folder = filled(tmp_path / "study", *names)
    before = tree(folder)
    config = Config(str(folder))
    for start in (RunFolder(folder).check, RunFolder(folder).start):
        with pytest.raises(
            ConfigError, match=rf"run_dir .*study holds {names[0].split('/')[0]}.*another run_dir="
        ) as e:
            start(config)
    assert tree(folder) == before and ("index.json, manifest.jsonl, metrics.jsonl and others" in str(e.value)) == (
        len(names) == 4
    )


def test_what_no_run_writes_empty_folders_and_other_runs_are_no_hindrance(tmp_path):
    folder = filled(tmp_path / "run", "train.log", "slurm-7.out", ".gitignore", ".cache/x", "exp.yaml", "job.sbatch")
    filled(folder, "stdout.txt", "lmspt/config.json", "heard/resynthesis.json", "curves.png", "wandb/x", "out.wav")
    (folder / "checkpoints").mkdir()
    begun(folder / "teacher")
    begun(folder / "12.5hz" / "tokenizer")
    begun(folder / "lm")
    begun(folder / "base")
    RunFolder(folder / "lm").set_aside()
    begun(folder)
    filled(folder, "mine.txt")
    assert begun(folder).joinpath("mine.txt").exists()  # a run that was begun goes on, whatever came later


def test_prepare_corpus_and_compare_refuse_before_anything_else(tmp_path):
    folder = filled(tmp_path / "corpus", "manifest.jsonl", "audio/a.wav")
    before = tree(folder)
    with pytest.raises(ConfigError, match="holds audio, manifest.jsonl"):
        prepare_corpus.run(prepare_corpus.Config(run_dir=str(folder)))
    stages = [Stage("evaluate", set=["predictions=[x]"])]
    config = compare.Config(run_dir=str(folder), stages=stages, cells=[Cell("a")])
    for start in (compare.plan, compare.run):
        with pytest.raises(ConfigError, match="holds audio, manifest.jsonl"):
            start(config)
    assert tree(folder) == before


def test_only_earlier_clips_are_replaced_among_the_samples(tmp_path):
    folder = filled(
        tmp_path / "samples", "0-0-ground-truth.flac", "7-3-tts.flac", "my take.flac", "0-0-mine.flac", "a/b"
    )
    Players(folder, ["u"]).add(0, System("ground truth", "ground_truth", "", 16000), {"u": np.zeros(160, np.float32)})
    assert set(tree(folder)) == {"0-0-ground-truth.flac", "my take.flac", "0-0-mine.flac", "a/b"}
    assert "mine" not in tree(folder)["0-0-ground-truth.flac"]


def recipe(plan=lambda config: {}):
    return types.SimpleNamespace(plan=plan)


def test_a_folder_that_is_none_of_ours_is_not_set_aside(tmp_path):
    folder = filled(tmp_path / "study", "config.yaml", "notes.txt")
    begun(folder / "run")
    for set_aside in (RunFolder(folder).set_aside, lambda: restart.start_over(recipe(), Config(str(folder)))):
        with pytest.raises(ConfigError, match="study is not set aside: it holds config.yaml, notes.txt, run, but not"):
            set_aside()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study"]


def test_an_input_in_the_folder_keeps_it_where_it_is(tmp_path, monkeypatch):
    folder = begun(tmp_path / "runs")
    filled(folder, "x/model/config.json", "a.jsonl")
    (tmp_path / "link").symlink_to(folder / "x")
    monkeypatch.chdir(tmp_path)
    config = Config(str(folder))
    inside = ["runs", "runs/x/model", "./runs/x/../x", str(folder / "x"), "link/model"]
    for name in [*inside, "model=runs/x", "data=[{path: runs/a.jsonl}]"]:
        with pytest.raises(
            ConfigError, match=r"--restart: .*runs is not set aside, because data.1 reads .*Name another"
        ):
            restart.start_over(recipe(), Config(str(folder), data=["elsewhere", name]))
    with pytest.raises(ConfigError, match="because model reads"):
        restart.start_over(recipe(), Config("runs", model="runs"))  # the same text as run_dir's
    config.data = ["runs-b/x", "hub/runs", "", "key=", "run_dir=[", "elsewhere"]
    assert restart.start_over(recipe(), config) == tmp_path / "runs.old-1"


def test_what_the_recipe_refuses_leaves_the_earlier_run(tmp_path):
    seen = []

    def plan(config):
        seen.append(config.run_dir)
        if config.seed < 0:
            raise ConfigError("seed: below 0")
        return {}

    folder = begun(tmp_path / "run")
    with pytest.raises(ConfigError, match="seed: below 0"):
        restart.start_over(recipe(plan), Config(str(folder), seed=-1))
    assert (folder / "run.json").is_file() and seen == [str(tmp_path / ".run.anew")]
    config = Config(str(folder), seed=1)  # another than it was begun with: that is what --restart is for
    assert restart.start_over(recipe(plan), config) == tmp_path / "run.old-1" and config.run_dir == str(folder)
    assert restart.start_over(recipe(plan), config) is None and len(seen) == 2
    with pytest.raises(ConfigError, match="--restart: .*no folder to set aside"):
        restart.start_over(recipe(plan), Config(""))


def refused(*arguments: str) -> str:
    found = CliRunner().invoke(cli.app, [*arguments, "--restart"])
    assert found.exit_code == 2, (found.output, found.exception)
    return " ".join(found.stderr.replace("│", " ").split())


def test_an_export_or_a_conversion_moves_neither_its_source_nor_what_holds_it(tmp_path):
    source = begun(tmp_path / "runs" / "tokenizer")
    filled(source, "model/config.json", "model/model.safetensors")
    begun(tmp_path / "runs" / "other")
    before = tree(tmp_path)
    for out in ("runs", "runs/tokenizer", "runs/tokenizer/model", "runs/other"):
        message = refused("export", str(source), "-o", str(tmp_path / out))
        assert "is not set aside" in message and "Name another folder" in message, message
    message = refused("convert", str(source / "model"), str(source / "model"))
    assert "because paths.0 reads" in message
    assert tree(tmp_path) == before


def test_an_earlier_export_is_set_aside_only_for_a_source_that_can_be_exported(tmp_path):
    filled(tmp_path / "shared", "config.json", "README.md")
    message = refused("export", str(tmp_path / "absent"), "-o", str(tmp_path / "shared"))
    assert "neither a finished run" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shared"]


def test_recordings_are_not_moved_with_the_folder_they_lie_in(tmp_path):
    folder = filled(tmp_path / "rec", "a.wav", "b.wav")
    assert "rec is not set aside: it holds a.wav, b.wav" in refused(
        "resynthesize", str(folder / "a.wav"), "-o", str(folder)
    )
    (folder / "resynthesis.json").write_text(json.dumps({"recordings": []}))
    assert "because files.0 reads" in refused("resynthesize", str(folder / "a.wav"), "-o", str(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rec"]


def test_a_command_without_a_folder_takes_no_restart(tmp_path):
    assert "slm plot-training takes no --restart" in refused("plot-training", str(tmp_path))
    assert "--restart" not in CliRunner().invoke(cli.app, ["plot-training", "--help"]).output
    assert "--restart" in CliRunner().invoke(cli.app, ["encode", "--help"]).output


def test_a_name_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    @dataclass
    class Named(Config):
        name: str = ""
        rows: list[str] = field(default_factory=list)
        judges: list[dict] = field(default_factory=list)

    begun(tmp_path / "mine")
    with pytest.raises(ConfigError, match="because judges.0.name reads mine"):
        restart.start_over(recipe(), Named("mine", judges=[{"name": "mine"}]))
    assert restart.start_over(recipe(), Named("mine", name="mine", rows=["mine"])) == Path("mine.old-1")


def test_another_process_may_begin_the_run_meanwhile(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    begun(folder)
    answers = iter([False, True, False, False])  # begun between the two looks, and never
    monkeypatch.setattr(own_folders, "is_run_folder", lambda folder: next(answers))
    own_folders.refuse_foreign(folder)
    with pytest.raises(ConfigError, match="no run was begun there"):
        own_folders.refuse_foreign(folder)


OUTPUTS = {
    "export": lambda out: export._check_output(export.Config(output=out), Path("model")),
    "convert": convert._check_output,
    "plot-training": lambda out: plot_training._check_output(f"{out}/curves.svg"),
    "score": lambda out: score._check_output(score.Config(hypothesis="a", output=out)),
    "any run": lambda out: RunFolder(out).check(Config(out)),
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_where_nothing_can_be_written_a_command_says_so_at_once(command, tmp_path, monkeypatch):
    """A file system that is read-only refuses root as well, so that its answer alone is put in."""
    OUTPUTS[command](str(tmp_path / "new" / "folder"))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/new/folder: {tmp_path} may not be written to"):
        OUTPUTS[command](str(tmp_path / "new" / "folder"))


def test_a_complete_run_on_a_read_only_share_is_still_there_to_be_read(tmp_path, monkeypatch):
    begun(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(RunFolder, "complete", True)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    folder.check(Config(str(tmp_path / "run")))
