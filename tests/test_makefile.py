"""`make setup`: once, and again where another torch is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


def make(*words: str) -> subprocess.CompletedProcess:
    """What make says, without the settings of the make that may have started the tests."""
    mine = {key: value for key, value in os.environ.items() if key not in ("TORCH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *words], cwd=ROOT, env=mine, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("asked", ["", "torch==2.12.0"])
def test_another_torch_makes_set_up_run_again(tmp_path: Path, asked: str) -> None:
    (tmp_path / ".torch-asked").write_text(f"{asked}\n")
    (tmp_path / ".setup-done").touch()
    venv = f"VENV={tmp_path}"
    assert make("-q", "setup", venv).returncode == 0
    assert make("-q", "setup", venv, f"TORCH={asked}").returncode == 0
    assert make("-q", "setup", venv, "TORCH=torch==2.11.0").returncode == 1
    commands = make("-n", "setup", venv, "TORCH=torch==2.11.0").stdout
    assert '-qq --disable-pip-version-check install "torch==2.11.0"' in commands
    # Set up again for another reason, the torch that was asked for stays.
    (tmp_path / ".setup-done").unlink()
    assert f'"{asked or "torch==2.13.0"}"' in make("-n", "setup", venv).stdout


def test_a_set_up_that_failed_keeps_the_torch_that_was_asked_for(tmp_path: Path) -> None:
    """A pip that installs torch and then fails, as without a network."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *-e*) exit 1;; esac\n')
    python.chmod(0o755)
    venv = f"VENV={tmp_path}"
    assert make("setup", venv, "TORCH=torch==2.12.0").returncode == 2
    assert '"torch==2.12.0"' in make("-n", "setup", venv).stdout
    assert 'install "torch==2.13.0"' in make("-n", "setup", venv, "TORCH=").stdout


@pytest.mark.parametrize("builds", [True, False])
def test_set_up_tries_pesq_and_says_where_it_does_not_build(tmp_path: Path, builds: bool) -> None:
    """It is source only. Without a C compiler the set-up is complete all the same."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *pesq*) echo no compiler >&2; exit {0 if builds else 1};; esac\n')
    python.chmod(0o755)
    done = make("setup", f"VENV={tmp_path}")
    assert done.returncode == 0 and (tmp_path / ".setup-done").is_file()
    assert ("Without PESQ" in done.stdout and ".[pesq]" in done.stdout) is not builds
    assert "no compiler" in (tmp_path / "pesq.log").read_text() and "no compiler" not in done.stdout + done.stderr
