"""``slm report``: results shown anew, and the page that it serves."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import soundfile
from test_contrasts import cell
from typer.testing import CliRunner

from eval.results_file import save_results
from eval.schema import Results
from recipes import cli
from recipes.commands import report
from recipes.config import ConfigError
from tokenizer.data.utterances import AudioError

MODEL = "embedded-slm-12.5hz"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    save_results(Results("kept", cell(1)), tmp_path / "run")
    return tmp_path / "run"


def test_results_are_shown_anew_and_stay_as_they_are(kept: Path, tmp_path: Path, capsys) -> None:
    before = (kept / "results.json").read_bytes()
    lengths = report.LengthBin("six", 6, 6)
    assert report.run(report.Config(results=str(kept), text_lengths=[lengths])) == kept / "report.html"
    assert "By length of text" in (kept / "report.html").read_text("utf-8")
    assert "By length of text" in capsys.readouterr().out
    assert "By length of text" in (kept / "results.md").read_text("utf-8")
    assert (kept / "results.json").read_bytes() == before
    other = report.run(report.Config(results=str(kept / "results.json"), output=str(tmp_path / "other")))
    assert other == tmp_path / "other" / "report.html" and "By length" not in other.read_text("utf-8")


def test_what_cannot_be_shown_is_named(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="nothing to show"):
        report.plan(report.Config())
    with pytest.raises(FileNotFoundError, match="slm evaluate"):
        report.plan(report.Config(results=str(tmp_path)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs gradio, .* pip install 'lmspt-slm\[serve\]'"):
        report._need_gradio()
    with pytest.raises(ConfigError, match="embedded-lm is a text LM without speech"):
        report._check_model("embedded-lm")


def test_serve_is_a_flag_of_this_command_alone(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(cli, "execute", lambda command, arguments, *more, **others: asked.append(arguments))
    assert CliRunner().invoke(cli.app, ["report", "runs/x", "--serve"]).exit_code == 0
    assert asked == [["runs/x", "serve=true"]]
    assert CliRunner().invoke(cli.app, ["encode", "--serve"]).exit_code == 2 and len(asked) == 1


def test_a_model_speaks_into_a_file_and_hears_one(tmp_path: Path) -> None:
    first, second = (report.say(MODEL, "bin blue at f two now", tmp_path, "cpu") for _ in range(2))
    assert first != second and Path(first).name == "12.5hz.wav"  # an earlier answer still plays
    assert soundfile.info(first).frames > 1600
    assert isinstance(report.hear(MODEL, first, "cpu"), str)
    silent = tmp_path / "silent.wav"
    soundfile.write(silent, np.zeros(10), 16_000)
    with pytest.raises(AudioError):
        report.hear(MODEL, str(silent), "cpu")


def test_the_page_has_a_player_and_a_text_for_each_model(kept: Path) -> None:
    gradio = pytest.importorskip("gradio", reason="gradio is not installed (extra serve)")
    models = ["embedded-slm-25hz", MODEL]
    page = report.make_page(report.Config(serve=True, models=models), report.run(report.Config(results=str(kept))))
    labels = [(type(block), getattr(block, "label", None)) for block in page.blocks.values()]
    for kind in (gradio.Audio, gradio.Textbox):
        assert {label for one, label in labels if one is kind} >= {"25hz", "12.5hz"}
    assert "Report" in {label for one, label in labels if one is gradio.Tab}
    with pytest.raises(gradio.Error, match="give a sentence first"):
        next(f for f in page.fns.values() if f.api_name == "speak").fn(" ")


def test_a_model_that_cannot_answer_stops_no_other(monkeypatch) -> None:
    gradio = pytest.importorskip("gradio", reason="gradio is not installed (extra serve)")
    warned = []
    monkeypatch.setattr(gradio, "Warning", warned.append)

    def say(model: str, *_: object) -> str:
        if model != MODEL:
            raise ValueError("too <long>")
        return "spoken.wav"

    monkeypatch.setattr(report, "say", say)
    for models, answer in ((["embedded-slm-25hz", MODEL], [None, "spoken.wav"]), ([MODEL], "spoken.wav")):
        page = report.make_page(report.Config(serve=True, models=models))
        assert next(f for f in page.fns.values() if f.api_name == "speak").fn("a text") == answer
    assert warned == ["25hz: too &lt;long&gt;"]
    page = report.make_page(report.Config(serve=True, models=["embedded-slm-25hz"]))
    with pytest.raises(gradio.Error, match="25hz: too"):
        next(f for f in page.fns.values() if f.api_name == "speak").fn("a text")
