"""A fine-tuning under DeepSpeed goes on in another number of processes, its optimizer's state put together."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import exit_codes, slm, start
from safetensors.torch import load_file
from slm_tiny import save_llm, write_corpus

from slm.training import zero_checkpoints
from slm.training.checkpoints import mark_whole
from slm.training.config import TrainingError
from slm.training.zero_checkpoints import convert, remove_universal, written_by_others

# DeepSpeed builds a communication operation on its first run.
NO_DEEPSPEED = importlib.util.find_spec("deepspeed") is None or not (
    shutil.which("g++") and (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
)
LOSSES = ("loss", "eval_asr_loss", "eval_tts_loss")
# Rates, decay and micro-batches in which a wrong group, moment or step would show.
SETTINGS = ["steps=6", "tokens_per_step=420", "pack_length=64", "warmup_steps=2", "learning_rate=3e-3"]
SETTINGS += ["embedding_learning_rate=6e-3", "weight_decay=0.5", "save_steps=2", "keep_checkpoints=4"]
SETTINGS += ["eval_steps=2", "log_steps=1", "keep=best"]


def finetune(folder: Path, stage: int, processes: int) -> str:
    """Trains, or goes on, in so many processes; returns what they said."""
    own = [f"training.{item}" for item in [*SETTINGS, f"gradient_accumulation={6 // processes}"]]
    own += [f"run_dir={folder}", f"model={folder.parent / 'llm'}", f"corpus={folder.parent / 'codes'}"]
    own += ["device=cpu", "precision=fp32", f"training.deepspeed=deepspeed-zero{stage}"]
    log = folder.parent / f"{folder.name}.log"
    codes = exit_codes(start(slm, "finetune", "--debug", *own, log=log, world=processes, alone=True))
    said = log.read_text()
    assert codes == [0] * processes, said[-6000:]
    return said


def forget_after(folder: Path, step: int) -> None:
    """Leaves a complete run as if it had been killed after a step's checkpoint."""
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.rsplit("-", 1)[1]) > step:
            shutil.rmtree(checkpoint)
    (folder / "complete.json").unlink()
    shutil.rmtree(folder / "model")


def call_best(folder: Path, step: int) -> None:
    """Lets a run that goes on at a step take that checkpoint for the best of all, whose weights are kept."""
    checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) == checkpoint
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"best_metric": 0.0}))
    mark_whole(checkpoint)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(folder: Path) -> dict[tuple[int, str], float]:
    """By step and name."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], key): row[key] for row in rows for key in row if key in LOSSES}


@pytest.mark.skipif(NO_DEEPSPEED, reason="needs deepspeed (pip install '.[deepspeed]'), g++ and Python's headers")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_goes_on_in_another_number_of_processes(tmp_path, stage: int) -> None:
    """Two processes; cut off after step 2 and gone on by one; that one cut off after step 4 and gone on by two.

    Each goes through the steps of the unbroken run. The best checkpoint is the one that two wrote, and is read by one.
    """
    save_llm(tmp_path / "llm")
    write_corpus(tmp_path / "codes", 13)
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    finetune(run, stage, 2)
    unbroken, last = losses(run), weights(run / "model")
    assert len(unbroken) == 12  # six steps, three evaluations of two tasks
    call_best(run, 2)
    best = weights(checkpoints / "checkpoint-2")
    for step, processes in ((2, 1), (4, 2)):
        forget_after(run, step)
        (checkpoints / f"checkpoint-{step}" / "universal" / "zero").mkdir(parents=True)  # a conversion cut off
        said = finetune(run, stage, processes)
        assert f"{processes} after {3 - processes}" in " ".join(said.split()) and "converted in" in said
        broken = losses(run)
        assert set(broken) == set(unbroken)
        for at, loss in unbroken.items():
            assert broken[at] == pytest.approx(loss, abs=1e-4), at
        for folder, wanted in ((checkpoints / "checkpoint-6", last), (run / "model", best)):
            found = weights(folder)
            for name, weight in wanted.items():
                torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=1e-4)
        assert not list(checkpoints.glob("*/*universal*"))  # room is given back at the next checkpoint


def checkpoint_of(folder: Path, state: dict) -> Path:
    """What ZeRO-2 leaves in two processes, as far as it is looked at before DeepSpeed converts it."""
    (folder / "global_step2").mkdir(parents=True)
    (folder / "latest").write_text("global_step2")
    for rank in range(2):
        part = {"optimizer_state_dict": {"base_optimizer_state": {"state": {0: state}}}}
        torch.save(part, folder / "global_step2" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


ADAM = {"step": torch.ones(()), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}


def test_only_parts_of_another_number_are_converted(tmp_path) -> None:
    assert not written_by_others(tmp_path, 3)  # plain DDP's
    checkpoint = checkpoint_of(tmp_path / "checkpoint-2", ADAM)
    assert written_by_others(checkpoint, 1) and written_by_others(checkpoint, 3)
    assert not written_by_others(checkpoint, 2)


def test_a_conversion_is_whole_or_made_anew(tmp_path, monkeypatch) -> None:
    checkpoint = checkpoint_of(tmp_path / "checkpoint-2", ADAM)
    made = []

    def deepspeed(folder: Path, target: Path) -> None:
        (target / "zero").mkdir(parents=True)
        (target / "zero" / "fp32.pt").write_bytes(b"whole")
        made.append(folder.name)

    monkeypatch.setattr(zero_checkpoints, "_run_deepspeed", deepspeed)
    convert(checkpoint)
    convert(checkpoint)
    assert made == ["global_step2"]  # the second took what was there
    (checkpoint / "universal" / "zero" / "fp32.pt").write_bytes(b"torn")
    convert(checkpoint)
    assert len(made) == 2 and (checkpoint / "universal" / "zero" / "fp32.pt").read_bytes() == b"whole"
    remove_universal(checkpoint)
    assert sorted(path.name for path in checkpoint.iterdir()) == ["global_step2", "latest"]


def test_what_cannot_be_converted_is_refused_with_a_way_out(tmp_path, monkeypatch) -> None:
    """Another optimizer than Adam, a disk without room, and one that fills up: nothing half made stays behind."""
    momentum = checkpoint_of(tmp_path / "checkpoint-1", {"momentum_buffer": torch.zeros(4)})
    with pytest.raises(TrainingError, match=r"other than Adam's .*start 2 processes .*model=RUN_DIR/model"):
        convert(momentum)
    checkpoint = checkpoint_of(tmp_path / "checkpoint-2", ADAM)

    def fill_up(folder: Path, target: Path) -> None:
        (target / "zero").mkdir(parents=True)
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(zero_checkpoints, "_run_deepspeed", fill_up)
    with pytest.raises(TrainingError, match=r"checkpoint-2: .*failed writing file data/0; .* GB free on its disk"):
        convert(checkpoint)
    assert not (checkpoint / "universal").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(TrainingError, match=r"takes .* GB on its disk, where 1e-07 GB are free: free some"):
        convert(checkpoint)
    assert not (checkpoint / "universal").exists()
