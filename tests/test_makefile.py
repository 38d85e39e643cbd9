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
    (tmp_path / ".setup-done").write_text(f"{asked}\n")
    venv = f"VENV={tmp_path}"
    assert make("-q", "setup", venv).returncode == 0
    assert make("-q", "setup", venv, f"TORCH={asked}").returncode == 0
    assert make("-q", "setup", venv, "TORCH=torch==2.11.0").returncode == 1
    commands = make("-n", "setup", venv, "TORCH=torch==2.11.0").stdout
    assert 'install --quiet --disable-pip-version-check "torch==2.11.0"' in commands
    # Set up again for another reason, the torch that was asked for stays.
    os.utime(tmp_path / ".setup-done", (0, 0))
    assert f'"{asked or "torch==2.13.0"}"' in make("-n", "setup", venv).stdout
