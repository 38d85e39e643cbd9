"""Two processes in one run folder: the second is refused, until the first one ends, however it ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from recipes.config import ConfigError
from recipes.runs import run_lock
from recipes.runs.pipeline import Stage, StageError, Step, run_steps
from recipes.runs.run_folder import RunFolder

ROOT = Path(__file__).parents[1]


@dataclass
class Config:
    run_dir: str = ""
    steps: int = 1


@pytest.fixture
def other(tmp_path):
    """Another process that has begun a run in ``tmp_path/run`` and is at work in it until its input ends."""
    script = f"""
        import sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from test_run_lock import Config, RunFolder
        config = Config({str(tmp_path / "run")!r})
        RunFolder(config.run_dir).start(config)
        print("begun", flush=True)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_folder_that_another_process_works_in_is_refused_until_that_is_killed(other, tmp_path):
    config, folder = Config(str(tmp_path / "run")), RunFolder(tmp_path / "run")
    before = folder.path("run.json").read_text()
    with pytest.raises(ConfigError, match=r"another process is at work in .*run \(begun 20\d\d-.*\): wait until"):
        folder.start(config)
    with pytest.raises(ConfigError, match="another process is at work in"):
        folder.set_aside()
    assert folder.path("run.json").read_text() == before
    other.kill()
    other.wait()
    folder.start(config)
    assert folder.set_aside() == tmp_path / "run.old-1"


def test_a_run_that_only_began_may_still_change_its_configuration(tmp_path):
    """The lock's file is nothing that a run has made."""
    RunFolder(tmp_path / "run").start(Config(str(tmp_path / "run")))
    assert not RunFolder(tmp_path / "run").has_results()


def test_a_complete_run_and_a_failed_stage_let_others_in(tmp_path):
    held = run_lock._held
    folder = RunFolder(tmp_path / "whole").start(Config(str(tmp_path / "whole")))
    assert (tmp_path / "whole").resolve() in held
    folder.start(Config(str(tmp_path / "whole")))  # the same process again
    folder.mark_complete()
    assert (tmp_path / "whole").resolve() not in held

    class Recipe:
        @staticmethod
        def run(config):
            RunFolder(config.run_dir).start(config)
            raise ValueError("no data")

    with pytest.raises(StageError):
        run_steps([Step(Stage("fails"), Recipe, Config(str(tmp_path / "failed")))])
    assert (tmp_path / "failed").resolve() not in held


def test_where_files_cannot_be_locked_the_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    def no_locks(self):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(run_lock.FileLock, "acquire", no_locks)
    monkeypatch.setattr(run_lock.log, "propagate", True)
    RunFolder(tmp_path).start(Config(str(tmp_path)))
    assert "cannot be locked (no flock here): start no second command in it" in caplog.text
