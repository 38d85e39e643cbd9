"""`slm finetune` on CPU: two processes give the single losses and a folder that loads; torchrun in the slow tests."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from processes import exit_codes, slm, start
from safetensors.torch import load_file
from slm_tiny import save_llm, write_corpus
from transformers import AutoModelForCausalLM

from recipes.commands import finetune
from recipes.config import load_config
from slm.model.modeling import load_llm
from slm.training.trainer import SpeechTrainer

ROOT = Path(__file__).resolve().parents[1]


def arguments(tmp_path: Path, name: str, *overrides: str) -> list[str]:
    """What `slm finetune` is told; model (unless it is there) and corpus are made when first asked for."""
    if not (tmp_path / "codes").exists():
        if not (tmp_path / "llm").exists():
            save_llm(tmp_path / "llm")
        write_corpus(tmp_path / "codes")
    settings = ["steps=4", "tokens_per_step=260", "pack_length=64", "eval_steps=2", "save_steps=2", "log_steps=1"]
    own = [f"run_dir={tmp_path / name}", f"model={tmp_path / 'llm'}", f"corpus={tmp_path / 'codes'}"]
    return [*own, "device=cpu", "precision=fp32", *(f"training.{item}" for item in settings), *overrides]


def figures(run: Path) -> list[float]:
    """The losses of a finished run whose model loads."""
    AutoModelForCausalLM.from_pretrained(run / "model")
    assert (run / "complete.json").exists()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [row[key] for row in rows for key in ("loss", "eval_asr_loss", "eval_tts_loss") if key in row]
    assert len(found) == 8  # four steps, two evaluations of two tasks
    return found


def logged(run: Path) -> dict[tuple[int, str], float]:
    """Every loss in a run's metrics, by step and name; of a step that was trained again the newer."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], key): row[key] for row in rows for key in row if key.endswith("loss") and key != "train_loss"}


def run_finetune(tmp_path: Path, name: str, processes: int, *overrides: str) -> list[float]:
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launcher, "recipes.cli", "finetune", "--debug", *arguments(tmp_path, name, *overrides)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers
            raise
    assert process.returncode == 0, output[-4000:]
    return figures(tmp_path / name)


def single_process(tmp_path: Path, *overrides: str) -> list[float]:
    """The same run in this process, which is quicker than to start one."""
    finetune.run(load_config(finetune.Config, None, arguments(tmp_path, "single", *overrides)))
    return figures(tmp_path / "single")


BESIDE = {
    "answers": [],
    "delay": ["n_codebooks=2", "pattern=delay"],
    "multi-token": ["training.multi_token.tokens=3"],
}


def in_two_processes(tmp_path: Path, name: str, *overrides: str) -> None:
    processes = start(slm, "finetune", "--debug", *arguments(tmp_path, name, *overrides), log=tmp_path / "log", world=2)
    assert exit_codes(processes) == [0, 0], (tmp_path / "log").read_text()[-4000:]


def beside(run: Path) -> list[float]:
    """The losses of further books or tokens at each evaluation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = sorted({key for row in rows for key in row if "_book_" in key or "_token_" in key})
    return [row[name] for row in rows for name in names if name in row]


def same_model(tmp_path: Path, name: str, other: str) -> bool:
    """Whether two runs ended in the same weights, those beside the LLM's too, up to rounding."""
    files = {file.name for file in (tmp_path / name / "model").glob("*.safetensors")}
    assert files == {file.name for file in (tmp_path / other / "model").glob("*.safetensors")}
    for file in files:
        one, two = (load_file(tmp_path / run / "model" / file) for run in (name, other))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, atol=1e-4, rtol=1e-3)
    return True


@pytest.mark.parametrize("extra", BESIDE.values(), ids=BESIDE)
def test_two_processes_give_the_single_losses(tmp_path, extra: list[str]) -> None:
    """With micro-batches of plain text, which has neither further books nor tokens: processes wait for them too."""
    (tmp_path / "texts").write_text("".join(f"bin blue at {n}\n" for n in range(100)))
    extra = [*extra, f"replay.path={tmp_path / 'texts'}", "replay.weight=3", "training.tokens_per_step=160"]
    in_two_processes(tmp_path, "double", *extra)
    assert figures(tmp_path / "double") == pytest.approx(single_process(tmp_path, *extra), abs=1e-4)
    assert beside(tmp_path / "double") == pytest.approx(beside(tmp_path / "single"), abs=1e-4)
    assert same_model(tmp_path, "single", "double")


SPREAD = {
    "adapters": ["lora.rank=4", "lora.dropout=0.2"],
    "delay": ["pattern=delay", "n_codebooks=2"],
}


@pytest.mark.parametrize("kind", SPREAD)
def test_a_run_goes_on_in_another_number_of_processes(tmp_path, kind: str) -> None:
    """Two processes, then one, then two: the losses and weights of one that was never cut off, dropout included.

    Thirteen utterances and six micro-batches a step, whatever the number of processes.
    """
    write_corpus(tmp_path / "odd", 13)
    settings = ["tokens_per_step=420", "schedule=constant", "warmup_steps=2", "learning_rate=3e-3"]
    common = [*SPREAD[kind], f"corpus={tmp_path / 'odd'}", *(f"training.{item}" for item in settings)]
    for steps, processes in ((2, 2), (4, 1), (6, 2)):
        extent = [f"training.steps={steps}", f"training.gradient_accumulation={6 // processes}"]
        own = arguments(tmp_path, "spread", *common, *extent)
        if processes == 1:
            finetune.run(load_config(finetune.Config, None, own))
            continue
        started = start(slm, "finetune", "--debug", *own, log=tmp_path / "log", world=2)
        assert exit_codes(started) == [0, 0], (tmp_path / "log").read_text()[-4000:]
    extent = ["training.steps=6", "training.gradient_accumulation=6"]
    finetune.run(load_config(finetune.Config, None, arguments(tmp_path, "single", *common, *extent)))
    spread, single = (logged(tmp_path / name) for name in ("spread", "single"))
    assert set(spread) == set(single) and len(single) >= 12
    for at, loss in single.items():
        assert spread[at] == pytest.approx(loss, abs=1e-4), at
    one, two = (load_llm(str(tmp_path / name / "model"))[0] for name in ("single", "spread"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


# DeepSpeed builds a communication operation on its first run.
NO_DEEPSPEED = importlib.util.find_spec("deepspeed") is None or not (
    shutil.which("g++") and (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
)


@pytest.mark.skipif(NO_DEEPSPEED, reason="needs deepspeed (pip install '.[deepspeed]'), g++ and Python's headers")
@pytest.mark.parametrize(
    ("stage", "lora"),
    [
        (2, False),
        pytest.param(2, True, marks=pytest.mark.slow),
        (3, False),
        pytest.param(3, True, marks=pytest.mark.slow),
    ],
)
def test_deepspeed_gives_the_single_losses(tmp_path, stage: int, lora: bool) -> None:
    """Twelve utterances and accumulation 3 on two processes: an odd number of sequences for some micro-batches.

    ZeRO-3 on a model whose head is a table of its own, which is grown and held in parts beside the embedding.
    """
    save_llm(tmp_path / "llm", "llama" if stage == 3 else "qwen2")
    extra = ["lora.rank=4"] if lora else []
    single = single_process(tmp_path, *extra)
    engine = [f"training.deepspeed=deepspeed-zero{stage}", "training.gradient_accumulation=3"]
    assert run_finetune(tmp_path, "zero", 2, *engine, *extra) == pytest.approx(single, abs=1e-4)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("single", "zero"))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def with_a_bad_step(*words: str) -> None:
    """`slm`, whose third step has a loss that is not a number."""
    whole = SpeechTrainer.compute_loss

    def compute_loss(self, model, *arguments, **options):
        loss = whole(self, model, *arguments, **options)
        return loss * torch.nan if self.state.global_step == 2 and model.training else loss

    SpeechTrainer.compute_loss = compute_loss
    slm(*words)


@pytest.mark.skipif(NO_DEEPSPEED, reason="needs deepspeed (pip install '.[deepspeed]'), g++ and Python's headers")
def test_a_bad_step_under_deepspeed_reaches_no_checkpoint(tmp_path) -> None:
    """Each step is saved and none logged: what a log alone would tell comes too late."""
    own = ["training.deepspeed=deepspeed-zero2", "training.save_steps=1", "training.log_steps=100"]
    words = arguments(tmp_path, "zero", *own)
    exit_codes(start(with_a_bad_step, "finetune", *words, log=tmp_path / "log", world=2))
    saved = sorted((tmp_path / "zero" / "checkpoints").glob("checkpoint-*/model.safetensors"))
    assert saved, (tmp_path / "log").read_text()[-4000:]
    assert all(torch.isfinite(values).all() for path in saved for values in load_file(path).values())
    assert "its gradient is not finite, and the step is left out" in (said := (tmp_path / "log").read_text()) or (
        "the gradient of step 3 is not finite; the training stops" in " ".join(said.split())
    )


@pytest.mark.slow
def test_two_processes_with_lora_give_the_single_losses(tmp_path) -> None:
    single = single_process(tmp_path, "lora.rank=4")
    assert run_finetune(tmp_path, "double", 2, "lora.rank=4") == pytest.approx(single, abs=1e-4)


@pytest.mark.slow
def test_finetune_ends_in_the_same_bytes_after_a_sigkill(tmp_path) -> None:
    """Slow: three processes. The kill comes in mid-step, and then the newest checkpoint is torn too."""
    run_finetune(tmp_path, "whole", 1)
    script = f"""
import os, signal
from recipes.commands import finetune
from recipes.config import load_config
from slm.model.modeling import load_llm
from slm.training.trainer import SpeechTrainer
steps = SpeechTrainer.compute_loss
def compute_loss(self, *args, **kwargs):
    if self.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return steps(self, *args, **kwargs)
SpeechTrainer.compute_loss = compute_loss
finetune.run(load_config(finetune.Config, None, {arguments(tmp_path, "killed")!r}))
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert done.returncode == -9, done.stderr[-2000:]
    newest = tmp_path / "killed" / "checkpoints" / "checkpoint-2"
    torn = newest.with_name("checkpoint-3")
    shutil.copytree(newest, torn)
    (torn / "optimizer.pt").write_bytes(b"torn")
    run_finetune(tmp_path, "killed", 1)
    assert newest.with_name("torn-checkpoint-3").is_dir()
    name = "model/model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
