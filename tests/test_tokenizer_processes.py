"""`slm train-tokenizer` in two processes on CPU: the losses, revivals and weights of one process, and back again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from processes import exit_codes, slm, start
from safetensors.torch import load_file
from test_codec_training import metrics
from test_training_scale import losses_equal, moving, weights_equal

from recipes.commands import train_tokenizer
from recipes.config import dump_config

ROOT = Path(__file__).resolve().parents[1]
# gloo takes CUDA's place where a GPU is seen: two processes would share it
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def start_two(settings, tmp_path) -> list[BaseProcess]:
    file = tmp_path / f"{Path(settings.run_dir).name}.yaml"
    file.write_text(dump_config(settings))
    return start(slm, "train-tokenizer", "--debug", "--config", str(file), log=tmp_path / "two.log", world=2)


def finish(processes: list[BaseProcess], tmp_path) -> None:
    assert exit_codes(processes) == [0, 0], (tmp_path / "two.log").read_text()[-4000:]


def test_two_processes_have_the_losses_of_one(make_corpus, tmp_path, tiny_teacher):
    manifest = make_corpus()
    changes = {"augmentation": {"noise_probability": 0.5}}
    processes = start_two(moving(manifest, tmp_path / "two", tiny_teacher, **changes), tmp_path)
    train_tokenizer.run(moving(manifest, tmp_path / "one", tiny_teacher, **changes))
    finish(processes, tmp_path)
    losses_equal(tmp_path / "one", tmp_path / "two")
    weights_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "pooled"])
def test_parameters_that_take_no_part_do_not_hold_up_the_processes(make_corpus, tmp_path, tiny_teacher, kind):
    """Slow: three processes each. Without distillation nothing moves the auxiliary decoder; no process waits for it."""
    manifest = make_corpus()
    changes = {"distillation": {"kind": kind}, "training": {"accumulation": 2, "weight_decay": 0.0}}
    processes = start_two(moving(manifest, tmp_path / "two", tiny_teacher, **changes), tmp_path)
    train_tokenizer.run(moving(manifest, tmp_path / "one", tiny_teacher, **changes))
    finish(processes, tmp_path)
    losses_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_step_that_is_not_finite_in_one_process_is_left_out_by_both(make_corpus, tmp_path, tiny_teacher):
    """Slow: its own script in two processes. Only the second one's first batch is spoilt."""
    settings = moving(make_corpus(), tmp_path / "two", tiny_teacher)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(settings))
    script = tmp_path / "spoil.py"
    script.write_text(f"""
import os
from recipes import train_tokenizer
from recipes.config import load_config
from tokenizer import training
real = training.train_step
def spoilt(state, batches, *rest):
    if state.step == 2 and os.environ["RANK"] == "1":
        batches[0]["input_values"] *= float("inf")
    return real(state, batches, *rest)
training.train_step = spoilt
train_tokenizer.run(load_config(train_tokenizer.Config, {str(file)!r}))
""")
    torchrun(script)
    rows = metrics(tmp_path / "two")
    assert [row.get("gradient_norm") is not None for row in rows] == [True, True, False, True]
    weights = load_file(tmp_path / "two/model/model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(make_corpus, tmp_path, tiny_teacher):
    """Slow: torchrun twice. Two steps in one process and two in two, and the other way round, end as one run does."""
    manifest = make_corpus()
    training = {"save_steps": 2, "keep_checkpoints": 9, "ema_decay": 0.9}
    whole = tmp_path / "whole"
    train_tokenizer.run(moving(manifest, whole, tiny_teacher, training=training))

    def cut(name: str, source: Path):
        """A folder that stopped after the second step of `source`."""
        left_out = shutil.ignore_patterns("checkpoint-*4", "complete.json", "model")
        shutil.copytree(source, tmp_path / name, ignore=left_out)
        settings = moving(manifest, tmp_path / name, tiny_teacher, training=training)
        (tmp_path / name / "config.yaml").write_text(dump_config(settings))
        return settings

    one_then_two = cut("one-then-two", whole)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(one_then_two))
    torchrun("-m", "recipes.cli", "train-tokenizer", "--debug", "--config", str(file))
    file.write_text(dump_config(moving(manifest, tmp_path / "two", tiny_teacher, training=training)))
    torchrun("-m", "recipes.cli", "train-tokenizer", "--debug", "--config", str(file))
    train_tokenizer.run(cut("two-then-one", tmp_path / "two"))
    for name in ("one-then-two", "two", "two-then-one"):
        losses_equal(whole, tmp_path / name)
        weights_equal(whole, tmp_path / name)
        state = torch.load(tmp_path / name / "checkpoints/checkpoint-0000004/optimizers.pt", weights_only=True)
        assert state["step"] == 4 and "discriminator" in state


def torchrun(*command: str | Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([*launcher, *map(str, command)], cwd=ROOT, env=environment, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers
            raise
    assert process.returncode == 0, output[-4000:]
