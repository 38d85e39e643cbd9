"""Several processes and devices: each tensor is where it is used, and nobody gives up waiting too soon.

A collective sees its own device's tensors alone, no kernel sees those of two.

The accelerator here is the `meta` device, whose kernels refuse tensors of another device as a GPU's do, and whose
collectives are stand-ins that check what they are given as NCCL does. A figure that is read off it is made up; to read
anything else, such as a mask, raises.
"""

from __future__ import annotations

import ast
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_codec_training import config
from torch import Tensor, nn

from recipes.commands import train_teacher, train_tokenizer
from recipes.config import from_values
from recipes.runs.restart import start_over
from recipes.runs.run_folder import RunFolder
from recipes.tokenizer_training.data import make_crops
from recipes.tokenizer_training.networks import new_state
from recipes.tokenizer_training.objective import make_objective
from slm.acoustic.training import AcousticTraining, train_acoustic
from slm.text_aligned.aggregator import WordQuantizer
from slm.text_aligned.configuration import TextAlignedConfig
from slm.training.alignment.trainer import SPOKEN, AlignmentTrainer
from slm.training.config import TrainingConfig
from slm.training.train import train
from slm.training.trainer import SpeechTrainer
from tokenizer.codecs.supervised import SemanticQuantizer, SemanticQuantizerConfig
from tokenizer.teacher.recogniser_training import RecogniserTrainingConfig
from tokenizer.training import parallel
from tokenizer.training.checkpoints import load_latest_state
from tokenizer.training.health import HealthMonitor
from tokenizer.training.loop import on_device
from tokenizer.training.objective import loss_weights
from tokenizer.training.parallel import start_equal
from tokenizer.training.state import CodecTrainingConfig, TrainState, averaged
from tokenizer.training.step import train_step

ROOT = Path(__file__).resolve().parents[1]
META = torch.device("meta")
ISLANDS = ("tokenizer", "slm", "eval", "recipes")
# What reaches other processes, and where the tensors of each come to a test below; the rest carry none.
TENSORS = {
    ("tokenizer/training/parallel.py", "average_gradients", "all_reduce"),
    ("tokenizer/training/parallel.py", "start_equal", "broadcast"),
    ("tokenizer/training/parallel.py", "mean_figures", "reduce"),
    ("tokenizer/training/parallel.py", "gather_codes", "gather"),
    ("tokenizer/training/health.py", "step", "gather"),
    ("tokenizer/codecs/supervised.py", "maintain", "broadcast"),
    ("slm/training/trainer.py", "get_batch_samples", "reduce"),
    ("slm/training/trainer.py", "_over_processes", "reduce"),
    ("slm/training/alignment/trainer.py", "get_batch_samples", "reduce"),
    ("slm/text_aligned/aggregator.py", "_warm_up", "broadcast"),
}
OBJECTS = {  # pickled, and sent from wherever the backend wants the bytes
    ("tokenizer/training/checkpoints.py", "load_latest_state", "broadcast_object_list"),
    ("recipes/runs/processes.py", "_gather", "all_gather_object"),
    ("slm/training/trainer.py", "evaluate", "broadcast_object_list"),
    ("slm/training/zero_checkpoints.py", "convert_for", "broadcast_object_list"),
}
COLLECTIVES = (
    "all_reduce all_gather all_gather_into_tensor all_to_all broadcast gather gather_for_metrics reduce reduce_scatter "
    "scatter send recv broadcast_object_list all_gather_object gather_object scatter_object_list pad_across_processes"
).split()


def collectives_of(file: Path) -> set[tuple[str, str, str]]:
    """(file, function, collective) of each call on `dist`, `torch.distributed` or an accelerator, and of imported ones.

    Methods of tensors have the same names (`scores.gather`): their receivers are no process groups.
    """
    found = set()
    for function in ast.walk(ast.parse(file.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute):
                receiver, name = ast.unparse(call.func.value), call.func.attr
                known = receiver.split(".")[-1] in ("dist", "distributed", "accelerator")
            else:
                name = getattr(call.func, "id", "")
                known = "object" in name
            if known and name in COLLECTIVES:
                found.add((str(file.relative_to(ROOT)), function.name, name))
    return found


def test_every_collective_is_one_that_is_tested_here():
    files = [file for island in ISLANDS for file in (ROOT / island).rglob("*.py")]
    assert set().union(*map(collectives_of, files)) == TENSORS | OBJECTS


class TwoProcesses:
    """As much of an Accelerator as the training asks for, on the meta device, beside a process that does the same."""

    device, num_processes, process_index, is_main_process, scaler = META, 2, 0, True, None

    def __init__(self) -> None:
        self.calls: list[str] = []

    def check(self, name: str, tensor: Tensor) -> None:
        assert tensor.device == META, f"No backend type associated with device type {tensor.device.type} ({name})"
        self.calls.append(name)

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def unscale_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def gather(self, tensor: Tensor) -> Tensor:
        self.check("gather", tensor)
        return torch.cat([tensor, tensor])

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        self.check("reduce", tensor)
        return tensor


@pytest.fixture
def two(monkeypatch):
    """Collectives that take tensors of the meta device alone; reading a number off it gives one."""
    accelerator = TwoProcesses()

    def all_reduce(tensor, op=dist.ReduceOp.SUM, async_op=False):
        accelerator.check("all_reduce", tensor)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: accelerator.check("broadcast", tensor))
    read = {name: getattr(Tensor, name) for name in ("tolist", "__float__")}
    monkeypatch.setattr(Tensor, "tolist", lambda t: [1] * t.numel() if t.is_meta else read["tolist"](t))
    monkeypatch.setattr(Tensor, "__float__", lambda t: 1.0 if t.is_meta else read["__float__"](t))
    autocast, enabled = torch.autocast, torch.is_autocast_enabled  # neither knows the meta device
    monkeypatch.setattr(
        torch, "autocast", lambda kind, *a, **k: nullcontext() if kind == "meta" else autocast(kind, *a, **k)
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))
    return accelerator


def test_what_starts_equal_goes_through_the_accelerators_device(two, monkeypatch):
    """AveragedModel keeps its counter on the CPU: the first step of two GPUs raised."""
    module = nn.BatchNorm1d(3)
    mean = averaged(module, 0.9)
    for moved in (module, mean.module):
        moved.to(META)
    assert mean.n_averaged.device.type == "cpu"
    monkeypatch.setattr(Tensor, "copy_", lambda tensor, source: tensor)  # nothing can be read off the meta device
    start_equal((module, None, mean), two)
    assert two.calls == ["broadcast"] * (5 + 6)


def test_the_first_processs_tensors_arrive_wherever_they_are_kept(monkeypatch):
    class Counted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2, dtype=torch.float64)
            self.register_buffer("count", torch.tensor(3))

    module = Counted()
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: tensor.fill_(7))
    start_equal((module,), SimpleNamespace(num_processes=2, device=torch.device("cpu")))
    assert all((tensor == 7).all() for tensor in module.state_dict().values())


@pytest.mark.parametrize("kind", ["resynthesis", "pooled"])
def test_a_training_step_is_on_one_device_and_so_is_all_that_it_sends(make_corpus, tmp_path, tiny_teacher, two, kind):
    changes = {"distillation": {"kind": kind, "probe": kind == "pooled"}, "training": {"ema_decay": 0.9}}
    settings = config(make_corpus(), tmp_path / "run", tiny_teacher, **changes)
    cpu = SimpleNamespace(device=torch.device("cpu"), scaler=None, prepare=lambda optimizer: optimizer)
    state, objective = new_state(settings, cpu), make_objective(settings, cpu)
    for module in (state.model, state.discriminator, state.ema.module, state.projection, objective.teacher):
        if module is not None:
            module.to(META)
    objective.mel.to(META)
    trained = [*state.model.parameters(), *(state.projection.parameters() if state.projection else ())]
    state.optimizer = torch.optim.AdamW([p for p in trained if p.requires_grad])
    state.discriminator_optimizer = torch.optim.AdamW(state.discriminator.parameters())
    crops = make_crops(settings)
    items = [crops[i] for i in range(2)]
    batch = on_device({name: torch.stack([item[name] for item in items]) for name in items[0]}, META)
    state.step = 1  # adversarial, and without revival, whose candidates a device cannot count without values
    state.model.train()
    figures = train_step(state, [batch], objective, settings.training, two)
    assert {"loss/total", "loss/adversarial", "gradient_norm"} <= figures.keys()
    assert {"gather", "reduce", "all_reduce"} == set(two.calls)
    assert two.calls.count("all_reduce") >= 4, "a presence and a bucket for each network"

    parallel.gather_codes([state.model(**batch)], True, two)  # the latents too, as a revival does
    arguments = (loss_weights(objective), 0, crops, two, tmp_path)
    monitor, before = HealthMonitor(state, settings.training, *arguments), len(two.calls)
    monitor.step({"loss/total": math.nan}, False, [batch])
    assert two.calls[before:] == ["gather"]


def test_a_recognisers_book_is_sent_from_where_it_lies(two, monkeypatch):
    quantizer = SemanticQuantizer(16, SemanticQuantizerConfig(layer=1, codebook_size=8, codebook_dim=4)).to(META)
    quantizer.batches = torch.zeros((), dtype=torch.int64)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    mask = torch.ones(2, 3, dtype=torch.bool, device=META)
    quantizer.maintain(quantizer.quantize(torch.zeros(2, 6, 16, device=META), mask), mask)
    assert set(two.calls) == {"broadcast"} and len(two.calls) == 6


def test_a_fine_tunings_sums_are_reduced_on_the_accelerators_device(two):
    """The tokens of a step and the losses of an evaluation are counted on the CPU."""
    trainer = SpeechTrainer.__new__(SpeechTrainer)
    trainer.args, trainer.accelerator, trainer._beside = SimpleNamespace(world_size=2, device=META), two, None
    batch = {"loss_weights": torch.ones(1, 4)}
    trainer.get_batch_samples(iter([batch, batch]), 2, META)
    assert two.calls == ["reduce"]

    def back(tensor: Tensor, reduction: str) -> Tensor:
        two.check("reduce", tensor)
        return torch.ones(2)

    two.reduce = back
    trainer.is_deepspeed_enabled = trainer.is_fsdp_enabled = False
    trainer.model, trainer.evaluation, trainer.task_weights = nn.Identity(), {"asr": [batch]}, {"asr": 1.0}
    trainer.compute_loss_context_manager, trainer._prepare_inputs = torch.no_grad, lambda inputs: inputs
    trainer._weighted_sum = lambda model, inputs: (torch.tensor(2.0), None)
    trainer.state = trainer.control = trainer.measure = None
    trainer.log = lambda metrics: None
    trainer.callback_handler = SimpleNamespace(on_evaluate=lambda *_: None)
    assert trainer.evaluate() == {"eval_asr_loss": 1.0, "eval_loss": 1.0}
    assert two.calls == ["reduce", "reduce"]


def test_the_frames_of_an_alignment_are_reduced_there_too(two):
    trainer = AlignmentTrainer.__new__(AlignmentTrainer)
    trainer.args, trainer.accelerator = SimpleNamespace(world_size=2, device=META), two
    batch = {"loss_weights": torch.ones(1, 4), SPOKEN: torch.ones(2, 6, dtype=torch.int64)}
    trainer.get_batch_samples(iter([batch, {"loss_weights": torch.ones(1, 4)}]), 2, META)
    assert two.calls == ["reduce", "reduce"]


def test_the_books_of_words_are_sent_from_where_they_lie(two, monkeypatch):
    config = TextAlignedConfig(hidden_size=16, word_books=3, word_codebook_size=8, quantizer_warmup_steps=1)
    quantizer = WordQuantizer(config).to(META)
    quantizer.n_steps = torch.zeros((), dtype=torch.int64)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    quantizer._warm_up(torch.zeros(1, 16, 5, device=META))
    assert two.calls == ["broadcast"] * 3


def test_a_checkpoints_name_is_sent_as_an_object(monkeypatch, tmp_path):
    """Not as a tensor of the CPU: what is pickled goes by way of the backend's own device."""
    sent = []
    monkeypatch.setattr(
        "tokenizer.training.checkpoints.broadcast_object_list", lambda values: sent.append(values) or values
    )
    state = TrainState(nn.Linear(1, 1), None)
    assert not load_latest_state(state, tmp_path, SimpleNamespace(is_main_process=True))
    assert sent == [[None]]


def group_waits(file: Path) -> list[tuple[str, str]]:
    """(file and line, keyword) of each call that may start the process group without saying how long it waits."""
    says = {"PartialState": "timeout", "Accelerator": "kwargs_handlers", "TrainingArguments": "ddp_timeout"}
    says |= {"init_process_group": "timeout", "new_group": "timeout"}
    found = []
    for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if name in says and says[name] not in [keyword.arg for keyword in call.keywords]:
            found.append((f"{file.relative_to(ROOT)}:{call.lineno}", says[name]))
    return found


def test_whoever_starts_a_process_group_says_how_long_it_waits():
    """The first process validates and writes alone: ten minutes, the default, ended the others while it did."""
    assert not [call for island in ISLANDS for file in (ROOT / island).rglob("*.py") for call in group_waits(file)]


class Asked(Exception):
    """Carries what a process group was to be started with."""


WAITS = {"process_timeout_s": 5000.0}


def test_a_tokenizers_processes_wait_as_long_as_its_configuration_says(make_corpus, tmp_path, monkeypatch):
    def accelerator(**kwargs):
        raise Asked(kwargs["kwargs_handlers"][0].timeout.total_seconds())

    monkeypatch.setattr(train_tokenizer, "Accelerator", accelerator)
    with pytest.raises(Asked, match="5000"):
        train_tokenizer.run(config(make_corpus(), tmp_path / "run", None, training=WAITS))


def test_a_recognisers_and_an_llms_do_so_too(tmp_path, monkeypatch):
    settings = from_values(train_teacher.Config, {"training": WAITS})
    arguments = train_teacher._training_arguments(settings, RunFolder(tmp_path))
    assert arguments.ddp_timeout_delta.total_seconds() == 5000

    def asked(**kwargs):
        raise Asked(kwargs["ddp_timeout"])

    monkeypatch.setattr("slm.training.small_models.TrainingArguments", asked)
    with pytest.raises(Asked, match="5000"):
        train_acoustic(nn.Identity(), None, [], AcousticTraining(**WAITS), tmp_path)
    settings = TrainingConfig(**WAITS)
    monkeypatch.setattr("slm.training.config.TrainingArguments", asked)
    with pytest.raises(Asked, match="5000"):
        train(nn.Identity(), None, None, settings, tmp_path)


def test_a_run_that_starts_over_waits_as_long_too(monkeypatch, tmp_path):
    """--restart asks for the processes before the training does, and who comes first decides."""
    settings = config(tmp_path, tmp_path / "run", None, training=WAITS)
    asked = []
    monkeypatch.setattr(RunFolder, "set_aside", lambda self, own_files, timeout_s: asked.append(timeout_s))
    start_over(SimpleNamespace(plan=lambda settings: None), settings)
    assert asked == [5000.0]


@pytest.mark.parametrize("kind", [CodecTrainingConfig, RecogniserTrainingConfig, TrainingConfig])
def test_a_wait_that_ends_at_once_is_refused(kind):
    with pytest.raises(ValueError, match="process_timeout_s.*at least 1"):
        kind(process_timeout_s=0)
