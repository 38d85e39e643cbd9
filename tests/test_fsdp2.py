"""FSDP2 on two CPU processes (gloo): the single process's losses, adapters, other numbers of processes, bad steps.

accelerate gives FSDP to GPUs alone; here it is told to give it to CPUs too. All else is what runs on GPUs.
"""

from __future__ import annotations

import json
from pathlib import Path

import accelerate.state
import pytest
import torch
from accelerate.utils import DistributedType
from processes import exit_codes, slm, start
from safetensors.torch import load_file
from slm_tiny import save_llm, write_corpus
from test_distributed import arguments, logged, with_a_bad_step
from torch.distributed.tensor import DTensor

from recipes.commands import finetune
from recipes.config import load_config
from slm.model.modeling import load_llm
from slm.training import answer_loss
from slm.training.trainer import SpeechTrainer

ENGINE = [
    "training.fsdp=full_shard auto_wrap",
    "training.trainer={fsdp_config: {version: 2, reshard_after_forward: true, state_dict_type: FULL_STATE_DICT}}",
]


def sharded(function=slm):
    """A function of a command's words, run with FSDP on CPUs and no more logits at a time than of three tokens."""
    plain = accelerate.state.AcceleratorState.__init__

    def with_fsdp(self, *values, fsdp_plugin=None, **named) -> None:
        plain(self, *values, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = with_fsdp
    loss = SpeechTrainer.compute_loss

    def compute_loss(self, model, *values, **named):
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert self.answer_loss is not None  # no logits of whole micro-batches
        return loss(self, model, *values, **named)

    SpeechTrainer.compute_loss = compute_loss
    answer_loss.CHUNK_ELEMENTS = 1000
    return function


def slm_sharded(*words: str) -> None:
    sharded()(*words)


def slm_sharded_with_a_bad_step(*words: str) -> None:
    sharded(with_a_bad_step)(*words)


def in_processes(tmp_path: Path, name: str, *overrides: str, world: int = 2, target=slm_sharded) -> str:
    """What was said by a training that came to its end."""
    words = ["finetune", "--debug", *arguments(tmp_path, name, *ENGINE, *overrides)]
    started = start(target, *words, log=tmp_path / f"log-{name}", world=world, alone=True)
    said = exit_codes(started), (tmp_path / f"log-{name}").read_text()
    assert said[0] == [0] * world, said[1][-4000:]
    return said[1]


def the_same(tmp_path: Path, name: str, other: str) -> None:
    """Two runs' losses and weights."""
    one, two = (logged(tmp_path / run) for run in (name, other))
    assert one.keys() == two.keys() and len(one) >= 10
    for at, loss in one.items():
        assert two[at] == pytest.approx(loss, abs=1e-4), at
    models = (load_llm(str(tmp_path / run / "model"))[0] for run in (name, other))
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("llama", ["training.embedding_learning_rate=1e-2", "training.gradient_checkpointing=true"]),
        ("qwen2", ["lora.rank=4"]),  # one table for embedding and head, with new rows beside it
        pytest.param("llama", ["lora.rank=4"], marks=pytest.mark.slow),
    ],
    ids=["untied, full", "tied, adapters", "untied, adapters"],
)
def test_two_processes_give_the_single_losses(tmp_path, kind: str, extra: list[str]) -> None:
    save_llm(tmp_path / "llm", kind)
    in_processes(tmp_path, "double", *extra)
    finetune.run(load_config(finetune.Config, None, arguments(tmp_path, "single", *extra)))
    the_same(tmp_path, "single", "double")


def test_a_run_goes_on_in_another_number_of_processes(tmp_path) -> None:
    """Two processes with three micro-batches each, then one with six, then two; thirteen utterances."""
    write_corpus(tmp_path / "odd", 13)
    settings = ["tokens_per_step=420", "schedule=constant", "warmup_steps=2", "learning_rate=3e-3"]
    common = [f"corpus={tmp_path / 'odd'}", *(f"training.{item}" for item in settings)]
    for steps, world in ((2, 2), (4, 1), (6, 2)):
        extent = [f"training.steps={steps}", f"training.gradient_accumulation={6 // world}"]
        arguments(tmp_path, "spread")  # makes the model
        in_processes(tmp_path, "spread", *common, *extent, world=world)
    extent = ["training.steps=6", "training.gradient_accumulation=6"]
    finetune.run(load_config(finetune.Config, None, arguments(tmp_path, "single", *common, *extent)))
    the_same(tmp_path, "single", "spread")


def test_a_bad_step_moves_no_part_of_a_weight(tmp_path) -> None:
    """All processes see it, though each holds a part of the gradient."""
    extra = ["training.save_steps=1", "training.log_steps=100", "training.keep_checkpoints=4"]
    said = in_processes(tmp_path, "bad", *extra, target=slm_sharded_with_a_bad_step)
    assert "step 3: its gradient is not finite, and the step is left out" in " ".join(said.split())
    saved = [load_file(tmp_path / "bad" / "checkpoints" / f"checkpoint-{n}" / "model.safetensors") for n in (2, 3, 4)]
    moved = [any(not torch.equal(a[key], b[key]) for key in a) for a, b in zip(saved, saved[1:], strict=False)]
    assert moved == [False, True] and all(torch.isfinite(v).all() for v in saved[-1].values())
    assert json.loads((tmp_path / "bad" / "complete.json").read_text())["summary"]["steps"] == 4
