"""oneDNN's compiled kernels stay: the capacity that is set is the one it reads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from recipes.runs.process_settings import CAPACITY, KERNELS, keep_compiled_kernels

TWICE = """
import torch
from recipes.runs import process_settings
process_settings.KERNELS = {kept}
process_settings.keep_compiled_kernels()
x = torch.randn(4, 16, 4000)
for _ in range(2):
    for kernel in (3, 5, 7):
        torch.nn.functional.conv1d(x, torch.ones(16, 16, kernel))
"""


def compiled(kept: int) -> int:
    """Convolutions that oneDNN compiled for three shapes, twice in the same order, keeping so many kernels."""
    environment = {k: v for k, v in os.environ.items() if k != CAPACITY} | {"ONEDNN_VERBOSE": "profile"}
    done = subprocess.run(
        [sys.executable, "-c", TWICE.format(kept=kept)], capture_output=True, text=True, env=environment, check=True
    )
    return sum("create:cache_miss" in line and ",convolution," in line for line in done.stdout.splitlines())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in this build of torch")
def test_kernels_are_compiled_once_where_there_is_room_for_them():
    once, again = compiled(100), compiled(1)
    if not again:
        pytest.skip("these convolutions are not oneDNN's here")
    assert (once, again) == (3, 6)


def test_a_capacity_of_the_environment_stays(monkeypatch):
    monkeypatch.delenv(CAPACITY, raising=False)
    keep_compiled_kernels()
    assert os.environ[CAPACITY] == str(KERNELS)
    monkeypatch.setenv(CAPACITY, "7")
    keep_compiled_kernels()
    assert os.environ[CAPACITY] == "7"
