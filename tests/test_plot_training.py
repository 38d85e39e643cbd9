"""`slm plot-training`: which figures are drawn for which runs, and what is said where there is nothing to draw."""

from __future__ import annotations

import json

import pytest

from recipes.commands import plot_training
from recipes.commands.plot_training import Config
from recipes.config import ConfigError


@pytest.fixture
def make_run(tmp_path):
    def make(name, *rows):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder)

    return make


def tokenizer_rows(n=12):
    rows = [{"step": 25 * i, "loss/mel": 5 / i, "gradient_norm": None if i == 3 else 100 / i} for i in range(1, n + 1)]
    return [*rows, {"step": 100, "valid/mel": 2.0, "valid/perplexity_book_0": 7.0}]


def test_runs_are_laid_over_each_other_and_named_by_how_their_paths_differ(make_run, tmp_path):
    probe = [{"step": i, "loss/mel": 1.0, "loss/probe_share": 0.5} for i in range(1, 30)]
    runs = [make_run("cells/a/tokenizer", *tokenizer_rows()), make_run("cells/b/tokenizer", *probe)]
    output = tmp_path / "new/both.svg"
    assert plot_training.run(Config(runs, str(output))) == output
    svg = output.read_text()
    for text in ("mel loss", "perplexity of the books", "gradient norm, before clipping", ">probe<", ">a<", ">b<"):
        assert text in svg, text
    assert "adversarial" not in svg and "share of entries used" not in svg


def test_a_run_being_written_and_one_of_another_kind_are_drawn(make_run, tmp_path):
    running = make_run("running", *tokenizer_rows())
    with open(f"{running}/metrics.jsonl", "a") as file:
        file.write('{"step": 400, "loss/m')
    plan = plot_training.plan(Config([running]))
    assert plan["runs"] == {f"{tmp_path.name}/running": "13 lines, to step 300"}
    other = make_run("other", {"step": 1, "loss": 2.0, "eval_loss": 1.0, "time": 5.0}, {"step": 2, "loss": 1.0})
    assert plot_training.plan(Config([other]))["panels"] == ["eval_loss", "loss"]
    output = plot_training.run(Config([other], str(tmp_path / "one.png"), metrics=["loss"], smooth=1))
    assert output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": []}, "no runs"),
        ({"runs": ["nowhere"]}, "nowhere/metrics.jsonl: no such file"),
        ({"output": "a.jpeg"}, r"output=a.jpeg: its ending must be one of .png"),
        ({"metrics": ["loss/mle"]}, "no run has loss/mle; there are: gradient_norm, loss/mel"),
        ({"labels": ["a", "b"]}, "labels: 1 different names are needed"),
    ],
)
def test_what_cannot_be_drawn_is_said(make_run, changes, message):
    with pytest.raises(ConfigError, match=message):
        plot_training.run(Config(**({"runs": [make_run("run", *tokenizer_rows())]} | changes)))
