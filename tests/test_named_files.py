"""A file named on the command line that cannot be used: the others are made, and the exit status and last line tell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from recipes import cli
from recipes.commands import align
from recipes.config import load_config
from recipes.inference.named_files import unusable_files
from slm.tasks import Task, register, registry
from slm.tasks.registry import Mark, Speech, Turn
from slm.vocabulary import SYNTHESIZE
from tokenizer.data.utterances import DataError


@pytest.fixture
def good(tmp_path: Path) -> str:
    """A recording of a second that can be used."""
    soundfile.write(tmp_path / "good.wav", 0.3 * np.sin(np.arange(16000) * 0.1), 16000)
    return str(tmp_path / "good.wav")


@pytest.fixture
def repeating():
    """A task that answers speech in speech, without a mark of its own that the model would have to know."""
    register(Task("repeat", "speech", lambda u: Turn([Speech(u.codes), Mark(SYNTHESIZE)], [Speech(u.codes)])))
    yield
    registry._TASKS.pop("repeat")


NEEDS_MODEL = [
    ["transcribe"],
    ["transcribe", "run_dir=out"],
    ["generate", "task=asr"],
    ["generate", "task=repeat", "run_dir=out", "decoding.seconds_per_character=0.1"],
]


@pytest.mark.parametrize("words", [*NEEDS_MODEL, ["resynthesize", "tokenizers=dmel-25hz", "judge=null", "-o", "out"]])
def test_one_bad_file_among_good_ones_is_told_by_the_exit_status(
    recipe, repeating, tmp_path, good, words, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [f"model={tmp_path / 'slm'}", "device=cpu"] if words in NEEDS_MODEL else []
    for _ in range(2 if "run_dir=out" in words else 1):  # a complete run tells it again
        found = CliRunner().invoke(cli.app, [*words, good, "missing.wav", *model])
        assert found.exit_code == 2, found.output
        last = found.stderr.splitlines()[-1]
        assert last.startswith("1 of 2 files could not be used, the others are ")
        assert last.endswith(": missing.wav")
    if "run_dir=out" in words:
        rows = [json.loads(line) for line in Path("out/predictions.jsonl").read_text().splitlines()]
        assert [row["error"] is None for row in rows] == [True, False] and Path("out/complete.json").is_file()
    else:
        assert good in found.stdout or Path("out/good-recording.wav").is_file()
    alone = [word.replace("out", "alone") for word in words]
    assert CliRunner().invoke(cli.app, [*alone, good, *model]).exit_code == 0


def test_rows_of_a_data_source_that_cannot_be_used_are_counted(recipe, tmp_path, good, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"id": name, "audio": f"{name}.wav", "text": "lay red", "split": "test"} for name in ("good", "missing")]
    Path("manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["data.path=manifest.jsonl", "run_dir=out", f"model={tmp_path / 'slm'}", "device=cpu"]
    for _ in range(2):
        found = CliRunner().invoke(cli.app, ["transcribe", *given])
        assert found.exit_code == 0, found.output
    assert json.loads(Path("out/predictions.json").read_text())["n_failed"] == 1


def test_a_source_that_cannot_be_read_in_one_split_is_not_left_out(tmp_path) -> None:
    rows = [{"id": i, "audio": "a.wav", "text": "a", "split": s} for i, s in (("1", "train"), ("2", "valid"))]
    rows.append(rows[1])  # twice
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(align.Config, None, [f"data.0.path={tmp_path}", f"run_dir={tmp_path / 'out'}"])
    with pytest.raises(DataError, match="id '2' stands for both"):
        align.plan(config)


def test_the_last_line_counts_and_names() -> None:
    failed = {f"{n}.wav": f"{n}.wav: why" for n in range(12)}
    lines = str(unusable_files(failed, 20, "the others are there")).splitlines()
    assert lines[:12] == list(failed.values())
    assert lines[12].startswith("12 of 20 files could not be used, the others are there: 0.wav, 1.wav")
    assert lines[12].endswith("9.wav and 2 more")
