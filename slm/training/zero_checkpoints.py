"""Checkpoints of DeepSpeed's ZeRO: each process writes its part of the optimizer, and as many can read them again.

Another number of processes reads them in DeepSpeed's universal form: a folder for each parameter, with its weights and
its two moments whole, of which each process takes its part. The form is made within the checkpoint when a training goes
on in another number of processes, and taken away when that training has written a checkpoint of its own.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import time
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainingArguments

from slm.training.checkpoints import is_whole, mark_whole
from slm.training.config import TrainingError

log = logging.getLogger(__name__)

LATEST = "latest"  # DeepSpeed's file with the name of the folder that its parts lie in
PARTS = "*_optim_states.pt"  # one of each process
UNIVERSAL, LATEST_UNIVERSAL = "universal", "latest_universal"  # the converted folder, and the file that names it
MOMENTS = {"exp_avg", "exp_avg_sq"}  # the optimizer's state that DeepSpeed converts: Adam's


def parts_of(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint's optimizer, one of each process; none where DeepSpeed did not write it in parts."""
    latest = checkpoint / LATEST
    if not latest.is_file():
        return []
    return sorted((checkpoint / latest.read_text(encoding="utf-8").strip()).glob(PARTS))


def written_by_others(checkpoint: Path, processes: int) -> bool:
    """Whether a checkpoint's optimizer lies in the parts of another number of processes."""
    return len(parts_of(checkpoint)) not in (0, processes)


def convert(checkpoint: Path) -> None:
    """Writes a checkpoint's universal form into it, unless it is there and whole.

    Args:
        checkpoint: A `checkpoint-N` folder that DeepSpeed wrote in parts.

    Raises:
        TrainingError: There is no room for it, or DeepSpeed cannot convert what this optimizer keeps; the message says
            what else can be done.
    """
    target, parts = checkpoint / UNIVERSAL, parts_of(checkpoint)
    try:
        if not is_whole(target):
            shutil.rmtree(target, ignore_errors=True)  # of a conversion that was cut off
            _check_moments(checkpoint, parts)
            _check_room(checkpoint, parts)
            _convert_anew(parts, target)
        (checkpoint / LATEST_UNIVERSAL).write_text(UNIVERSAL, encoding="utf-8")
    except TrainingError:
        raise
    except Exception as error:  # DeepSpeed's are of any kind, those of torch's files on a full disk too
        shutil.rmtree(target, ignore_errors=True)
        raise TrainingError(
            f"{checkpoint}: DeepSpeed could not convert it for another number of processes ({type(error).__name__}: "
            f"{error}; {_gigabytes(shutil.disk_usage(checkpoint).free)} free on its disk). Nothing of it is lost: "
            f"{_way_out(parts)}"
        ) from error


def _convert_anew(parts: list[Path], target: Path) -> None:
    started = time.perf_counter()
    _run_deepspeed(parts[0].parent, target)
    mark_whole(target)
    size = _size(path for path in target.rglob("*") if path.is_file())
    log.info("converted in %.1f s; %s, until the next checkpoint", time.perf_counter() - started, _gigabytes(size))


def convert_for(checkpoint: Path, arguments: TrainingArguments) -> None:
    """Has the first process `convert` while the others wait; call it in every process.

    Raises:
        TrainingError: In every process, where the first one could not.
    """
    failure = [None]
    if arguments.process_index == 0:
        log.info(
            "%s goes on in another number of processes, %d after %d: the optimizer is put together (%s read)",
            checkpoint,
            arguments.world_size,
            len(parts_of(checkpoint)),
            _gigabytes(_size(parts_of(checkpoint))),
        )
        try:
            convert(checkpoint)
        except TrainingError as error:
            failure = [str(error)]
    if arguments.world_size > 1:
        failure = broadcast_object_list(failure)
    if failure[0] is not None:
        raise TrainingError(failure[0])


class UniversalResume(TrainerCallback):
    """Lets DeepSpeed read the universal form when a training begins, and its own parts from then on.

    Args:
        trainer: Of the training that goes on, its engine not made yet.
        checkpoint: Where it goes on, already converted.
    """

    def __init__(self, trainer: Trainer, checkpoint: Path) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint
        settings = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        settings["checkpoint"] = settings.get("checkpoint", {}) | {"load_universal": True}

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """All is loaded by now."""
        engine = self.trainer.model_wrapped
        read_universal(engine, False)
        if engine.zero_optimization_partition_weights():
            _mend_groups(engine.optimizer.optimizer, self.checkpoint)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """A newer checkpoint is whole: the converted one is not needed again."""
        if state.is_world_process_zero:
            remove_universal(self.checkpoint)


def read_universal(engine: Any, whether: bool) -> None:
    """Whether a DeepSpeed engine's next load reads the universal form, as its `checkpoint.load_universal` says."""
    engine._config.load_universal_checkpoint = whether


def remove_universal(checkpoint: Path) -> None:
    """Takes a checkpoint's universal form away, and leaves the checkpoint as DeepSpeed wrote it."""
    (checkpoint / LATEST_UNIVERSAL).unlink(missing_ok=True)
    shutil.rmtree(checkpoint / UNIVERSAL, ignore_errors=True)


def _mend_groups(optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Gives each group of parameters what is its own: ZeRO-3 gives all of them the first one's.

    That is weight decay and rates, and the count of steps: one tensor, which each group's step would raise for all.
    """
    file = checkpoint / UNIVERSAL / "zero" / "optimizer_state.pt"
    saved = _load_lazily(file)["optimizer_state_dict"]["param_groups"]
    for group, own in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in own.items() if key != "params"})
    for values in optimizer.state.values():
        if torch.is_tensor(values["step"]):
            values["step"] = values["step"].clone()


def _run_deepspeed(folder: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    # In this process, one part at a time: it may hold a GPU and threads, beside which forking is not safe. What the
    # converter says goes by print, its progress to stderr.
    options = Namespace(
        input_folder=str(folder),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(options)


def _check_moments(checkpoint: Path, parts: list[Path]) -> None:
    """Raises TrainingError where the optimizer is not one whose state DeepSpeed converts."""
    optimizer = _load_lazily(parts[0])["optimizer_state_dict"]
    kept = (optimizer.get("base_optimizer_state") or optimizer["optimizer_state_dict"])["state"].values()
    offloaded = (parts[0].parent / "offloaded_tensors").exists()
    if not kept or offloaded or any(not set(values) >= MOMENTS for values in kept):
        what = "that an NVMe drive holds" if offloaded else "other than Adam's"
        raise TrainingError(
            f"{checkpoint}: DeepSpeed wrote it in {_processes(parts)}, and cannot convert an optimizer's state "
            f"{what} for another number: {_way_out(parts)}"
        )


def _check_room(checkpoint: Path, parts: list[Path]) -> None:
    """Raises TrainingError where the disk has too little room.

    That is for the parts cut up, then put together, and beside them the weights and (ZeRO-3) the first part once more.
    """
    needed = 2 * _size(parts) + _size(parts[:1]) + _size(parts[0].parent.glob("*_model_states.pt"))
    free = shutil.disk_usage(checkpoint).free
    if free < needed:
        raise TrainingError(
            f"{checkpoint}: to go on in another number of processes it is converted, which takes {_gigabytes(needed)} "
            f"on its disk, where {_gigabytes(free)} are free: free some, and the same command goes on; or "
            f"{_way_out(parts)}"
        )


def _way_out(parts: list[Path]) -> str:
    return (
        f"start {_processes(parts)} as before (torchrun --nproc_per_node {len(parts)} ...). When that run is "
        "complete, its weights alone start another one in any number: model=RUN_DIR/model, in a run_dir of its own"
    )


def _processes(parts: list[Path]) -> str:
    return f"{len(parts)} process{'es' if len(parts) > 1 else ''}"


def _load_lazily(file: Path) -> Any:
    """A file of torch's, its tensors left on disk until they are looked at."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
