"""Cells of a comparison side by side: the same folders as one after the other, whatever fails or dies on the way."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from test_matrix import matrix

from recipes.comparison.workers import LOGS, run_with_workers
from recipes.config import ConfigError
from recipes.runs.pipeline import Stage, Step

STAGE = '''
"""A stage that writes who ran it, after so many seconds; `fails` and `dies` say how it ends instead."""
import os, signal, time
from dataclasses import dataclass
from pathlib import Path

@dataclass
class Config:
    run_dir: str = ""
    seconds: float = 0.0
    end: str = "well"
    seed: int = 0

def run(config):
    from recipes.runs.run_folder import RunFolder
    folder = RunFolder(config.run_dir)
    if folder.complete:
        return
    print("speaks", config.run_dir, flush=True)
    time.sleep(config.seconds)
    if config.end == "error":
        raise ValueError("has no data")
    if config.end == "bug":
        raise KeyError("unheard of")
    if config.end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    folder.start(config)
    import torch
    with folder.path("ran").open("a") as file:
        file.write(f"{os.getpid()} {torch.get_num_threads()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
    folder.mark_complete()
'''


@pytest.fixture
def step(tmp_path, monkeypatch):
    """Makes a step of ``folder``, whose stage is the module above; a worker finds it as we do, by ``sys.path``."""
    (tmp_path / "plain_stage.py").write_text(STAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = importlib.import_module("plain_stage")

    def make(folder: str, name: str = "work", shared: bool = False, **settings) -> Step:
        stage = Stage("plain-stage", name=name, shared=shared)
        return Step(stage, recipe, recipe.Config(run_dir=str(tmp_path / folder), **settings))

    yield make
    del sys.modules["plain_stage"]


def lines(tmp_path: Path, folder: str) -> list[list[str]]:
    return [line.split() for line in (tmp_path / folder / "ran").read_text().splitlines()]


def test_two_at_once_a_shared_step_once_and_an_error_alone(step, tmp_path):
    """Six cells, two workers: who fails and who is killed is named, the rest is whole, and nothing is run twice."""
    cells = {
        "a": [step("shared"), step("a")],
        "b": [step("shared"), step("b")],
        "no-data": [step("no-data", end="error"), step("after")],
        "bug": [step("bug", end="bug")],
        "killed": [step("killed", end="killed")],
        "last": [step("last")],
    }
    seconds, failed = run_with_workers(cells, 2, tmp_path / LOGS)
    assert {cell: list(some) for cell, some in seconds.items()} == {"a": ["work"], "b": ["work"], "last": ["work"]}
    assert failed["no-data"] == "stage work: has no data"
    assert failed["bug"] == "stage work: 'unheard of'"
    assert failed["killed"].startswith("stage work: its process was ended from outside (signal 9")
    assert not (tmp_path / "after").exists()
    assert len(lines(tmp_path, "shared")) == 1
    assert all(int(process) != os.getpid() for folder in "ab" for process, *_ in lines(tmp_path, folder))
    assert f"speaks {tmp_path / 'last'}" in (tmp_path / LOGS / "last-work.log").read_text()
    again, failed = run_with_workers({name: cells[name] for name in ("a", "last")}, 2, tmp_path / LOGS)
    assert again == {"a": {}, "last": {}} and not failed
    assert len(lines(tmp_path, "last")) == 1


def test_workers_are_processes_with_a_part_of_the_threads_or_a_gpu_of_their_own(step, tmp_path, monkeypatch):
    """Two stages that last are two processes at a time."""
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cells = {name: [step(name, seconds=1.0)] for name in "ab"}
    run_with_workers(cells, 2, tmp_path / LOGS)
    (a, *on_a), (b, *on_b) = lines(tmp_path, "a")[0], lines(tmp_path, "b")[0]
    assert a != b
    assert [on_a, on_b] == [["3", "0"], ["3", "1"]]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_shared_stage_that_fails_ends_all(step, tmp_path):
    cells = {"a": [step("teacher", shared=True, end="error"), step("a")], "b": [step("b", seconds=30.0)]}
    began = time.monotonic()
    with pytest.raises(ConfigError, match="stage work: has no data"):
        run_with_workers(cells, 2, tmp_path / LOGS)
    assert time.monotonic() - began < 25
    assert not (tmp_path / "b" / "ran").exists()


def test_nobody_works_on_when_the_comparison_is_killed(step, tmp_path):
    """Started again at once, it must not find another process in its folders."""
    script = tmp_path / "main.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parents[1])!r}]
        from pathlib import Path
        import plain_stage
        from recipes.comparison.workers import run_with_workers
        from recipes.runs.pipeline import Stage, Step
        if __name__ == "__main__":
            config = plain_stage.Config(run_dir={str(tmp_path / "long")!r}, seconds=4.0)
            cells = {{"long": [Step(Stage("plain-stage"), plain_stage, config)]}}
            run_with_workers(cells, 2, Path({str(tmp_path / LOGS)!r}))
        """)
    )
    main = subprocess.Popen([sys.executable, str(script)])
    log = tmp_path / LOGS / "long-plain-stage.log"
    while not (log.is_file() and "speaks" in log.read_text()):
        assert main.poll() is None
        time.sleep(0.1)
    main.kill()
    main.wait()
    time.sleep(6)
    assert not (tmp_path / "long").exists()


def test_a_cell_is_not_called_as_a_folder_of_the_comparison(tmp_path):
    config = matrix(tmp_path)
    with pytest.raises(ValueError, match="logs is a folder of the comparison itself"):
        type(config)(run_dir=config.run_dir, stages=config.stages, cells=[type(config.cells[0])("logs")])
    with pytest.raises(ValueError, match="parallel_cells=0: give at least 1"):
        matrix(tmp_path, parallel_cells=0)
