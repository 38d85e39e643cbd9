"""The wheel holds what the commands read, and its commands run outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tokenizer", "slm", "eval", "recipes")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"a wheel is built with setuptools 77 or later, this is {setuptools.__version__}")
    work = tmp_path_factory.mktemp("wheel")
    # A copy of what git knows, so that no build folder is left in the checkout.
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if name.split("/")[0] in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE") and (ROOT / name).is_file():
            target = work / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    command = [sys.executable, "-c", "from setuptools import build_meta; print(build_meta.build_wheel('..'))"]
    built = subprocess.run(command, cwd=work / "source", capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    return work / built.stdout.strip().splitlines()[-1]


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    listed = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    missing = wanted - set(zipfile.ZipFile(wheel).namelist())
    assert len(wanted) > 200 and not missing, sorted(missing)[:20]


def test_its_command_runs_outside_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    program = (
        "import pathlib, recipes, sys; "
        "assert pathlib.Path(recipes.__file__).is_relative_to(sys.argv.pop(1)); "
        "from recipes.cli import main; main()"
    )
    for arguments, said in ((["--help"], "train-tokenizer"), (["quickstart", "--dry-run"], "25hz")):
        command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", program, str(tmp_path / "site")]
        ran = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0 and said in ran.stdout + ran.stderr, ran.stderr[-2000:]
