"""Checkpoints of the codec training: written to a temporary name and renamed, torn ones set aside.

`checkpoint-N/` holds model.safetensors, {discriminator, projection, ema}.safetensors where there are such modules, and
optimizers.pt, loaded with `weights_only=True`: step, both optimizers, fp16's loss scale, where streams' epochs
began, the record of the run's health, and the version of what is drawn for a position (`crops.DATA_VERSION`).
Nothing in it depends on the number of processes.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tokenizer.data.crops import DATA_VERSION
from tokenizer.training.state import TrainState

logger = logging.getLogger(__name__)

# Numbers that speak of the machine. Any other (EINVAL: torch.load seeks to before the start of a file cut short) may be
# the file's own fault.
MACHINE_ERRORS = {
    number
    for name in (
        "EIO EACCES EPERM ENOMEM EMFILE ENFILE EBUSY EAGAIN EINTR ENODEV ENXIO ENOLCK ESTALE ETIMEDOUT EREMOTEIO "
        "ENOTCONN ECONNABORTED ECONNREFUSED ECONNRESET EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH"
    ).split()
    if (number := getattr(errno, name, None)) is not None
}


def save_state(state: TrainState, folder: Path, keep: int, accelerator: Accelerator) -> None:
    """Writes `folder/checkpoint-N` and drops all but the newest `keep`. A crash leaves the one before whole.

    Raises:
        OSError: The machine could not write it (no room, say); nothing half written stays behind.
    """
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    final = folder / f"checkpoint-{state.step:07d}"
    draft = folder / f".{final.name}.writing"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        for name, module in _modules(state).items():
            save_file(_tensors(module), draft / f"{name}.safetensors")
        optimizers = {
            "step": state.step,
            "generator": state.optimizer.state_dict(),
            "health": state.health.state_dict(),
            "data_version": DATA_VERSION,
        }
        if state.discriminator is not None:
            optimizers["discriminator"] = state.discriminator_optimizer.state_dict()
        if accelerator.scaler is not None:
            optimizers["scaler"] = accelerator.scaler.state_dict()
        if state.audio is not None:
            optimizers["audio"] = state.audio.state_dict()
        with (draft / "optimizers.pt").open("wb") as file:
            torch.save(optimizers, file)
    except Exception as error:
        shutil.rmtree(draft, ignore_errors=True)
        if (number := _system_error(error)) is None:
            raise
        raise OSError(
            number, f"checkpoint {final} could not be written ({os.strerror(number)}): make room and start the same "
            "command again; it goes on from the checkpoint before", str(folder)
        ) from None  # fmt: skip
    if final.exists():  # the same step, torn before and trained again
        shutil.rmtree(final)
    draft.rename(final)
    for old in sorted(folder.glob("checkpoint-*"))[:-keep]:
        shutil.rmtree(old)


def _system_error(error: Exception) -> int | None:
    """The system's number behind a failure: safetensors has it in its text, torch.save raises on top of it."""
    for cause in (error, error.__context__):
        if isinstance(cause, OSError):
            return cause.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else None


def load_latest_state(state: TrainState, folder: Path, accelerator: Accelerator) -> bool:
    """Fills `state` from the newest whole checkpoint; False where there are none at all.

    The first process looks for it, the others take the same. A torn checkpoint is renamed to `torn-...` and the one
    before it taken.

    Raises:
        ValueError: if there are checkpoints and none of them is whole; they are left as they are.
        OSError, MemoryError: if one cannot be read for a reason that says nothing about what it holds; names it.
    """
    chosen = [_newest_whole(state, folder)] if accelerator.is_main_process else [None]
    if broadcast_object_list(chosen)[0] is None:
        return False
    modules, optimizers = _read(state, chosen[0])
    for name, module in _modules(state).items():
        module.load_state_dict(modules[name])
    state.optimizer.load_state_dict(optimizers["generator"])
    if state.discriminator is not None:
        state.discriminator_optimizer.load_state_dict(optimizers["discriminator"])
    if accelerator.scaler is not None and "scaler" in optimizers:
        accelerator.scaler.load_state_dict(optimizers["scaler"])
    if state.audio is not None and "audio" in optimizers:
        state.audio.load_state_dict(optimizers["audio"])
    state.health.load_state_dict(optimizers.get("health", {}))  # none in checkpoints older than the key
    state.step = optimizers["step"]
    if optimizers.get("data_version") != DATA_VERSION:
        state.health.forget_best()
        if accelerator.is_main_process:
            logger.warning(
                "%s was written by a version that drew crops and valid recordings otherwise, or did not note how: the "
                "training goes on, but not bit for bit as it would have, and `valid/*` may not compare with before",
                chosen[0],
            )
    return True


def _newest_whole(state: TrainState, folder: Path) -> Path | None:
    torn: dict[Path, str] = {}
    for checkpoint in sorted(folder.glob("checkpoint-*"), reverse=True):
        try:
            _read(state, checkpoint)
        except Exception as error:  # a torn file raises whatever its last bytes happen to mean
            if (other := _elsewhere(error, checkpoint)) is not None:
                raise other from error
            torn[checkpoint] = (str(error) or type(error).__name__).splitlines()[0]
            continue
        _set_aside(torn)
        return checkpoint
    if not torn:
        return None
    # To begin at step 0 would be a new training in the place of the old one, and no one would have asked for it.
    listed = "; ".join(f"{checkpoint.name} ({reason})" for checkpoint, reason in torn.items())
    raise ValueError(
        f"{folder}: none of the checkpoints can be read: {listed}. Put whole ones there (a copy), or start over with "
        "--restart (sets the old folder aside)"
    )


def _elsewhere(error: Exception, checkpoint: Path) -> OSError | MemoryError | None:
    """What to raise where a checkpoint could not be read for want of memory, of permission or of a working disk.

    Such an error says nothing about the file, and holds for every checkpoint in turn. None for all others.
    """
    what = f"checkpoint {checkpoint.name} could not be read"
    way_out = "it may be whole and is left as it is: see to that and start the same command again"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's own is a RuntimeError
        return MemoryError(f"{checkpoint.parent}: {what} (out of memory): {way_out}")
    if (number := _system_error(error)) not in MACHINE_ERRORS:
        return None
    return OSError(number, f"{what} ({os.strerror(number)}): {way_out}", str(checkpoint))


def _set_aside(torn: dict[Path, str]) -> None:
    for checkpoint, reason in torn.items():
        aside, number = checkpoint.with_name(f"torn-{checkpoint.name}"), 1
        while aside.exists():
            aside, number = checkpoint.with_name(f"torn-{checkpoint.name}-{number}"), number + 1
        logger.warning("%s cannot be read (%s): set aside, the one before is used", checkpoint, reason)
        checkpoint.rename(aside)


def _read(state: TrainState, checkpoint: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """All files of a checkpoint, before anything is applied: a torn one must not leave half a state behind."""
    modules = {name: load_file(checkpoint / f"{name}.safetensors") for name in _modules(state)}
    return modules, torch.load(checkpoint / "optimizers.pt", weights_only=True, map_location="cpu")


def _modules(state: TrainState) -> dict[str, torch.nn.Module]:
    found = {
        "model": state.model,
        "discriminator": state.discriminator,
        "projection": state.projection,
        "ema": state.ema,
    }
    return {name: module for name, module in found.items() if module is not None}


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
