"""Checkpoints of the codec training: written to a temporary name and renamed, torn ones set aside.

`checkpoint-N/` holds model.safetensors, discriminator.safetensors where there is one, and optimizers.pt, loaded with
`weights_only=True`.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from tokenizer.training import TrainState

logger = logging.getLogger(__name__)


def save_state(state: TrainState, folder: Path, keep: int, accelerator: Accelerator) -> None:
    """Writes `folder/checkpoint-N` and drops all but the newest `keep`. A crash leaves the one before whole."""
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    final = folder / f"checkpoint-{state.step:07d}"
    draft = folder / f".{final.name}.writing"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        save_file(_tensors(accelerator.unwrap_model(state.model)), draft / "model.safetensors")
        optimizers = {"step": state.step, "generator": state.optimizer.state_dict()}
        if state.discriminator is not None:
            save_file(_tensors(accelerator.unwrap_model(state.discriminator)), draft / "discriminator.safetensors")
            optimizers["discriminator"] = state.discriminator_optimizer.state_dict()
        torch.save(optimizers, draft / "optimizers.pt")
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise OSError(
            error.errno, f"checkpoint {final} could not be written ({error.strerror}): make room and start the same "
            "command again; it goes on from the checkpoint before", str(folder)
        ) from None  # fmt: skip
    if final.exists():  # the same step, torn before and trained again
        shutil.rmtree(final)
    draft.rename(final)
    for old in sorted(folder.glob("checkpoint-*"))[:-keep]:
        shutil.rmtree(old)


def load_latest_state(state: TrainState, folder: Path, accelerator: Accelerator) -> bool:
    """Fills `state` from the newest whole checkpoint; False where there is none.

    A torn checkpoint is renamed to `torn-...` and the one before it taken.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), reverse=True):
        try:  # all files are read before anything is applied: a torn one must not leave half a state behind
            model = load_file(checkpoint / "model.safetensors")
            judges = load_file(checkpoint / "discriminator.safetensors") if state.discriminator is not None else {}
            optimizers = torch.load(checkpoint / "optimizers.pt", weights_only=True, map_location="cpu")
        except Exception as error:  # a torn file raises whatever its last bytes happen to mean
            reason = (str(error) or type(error).__name__).splitlines()[0]
            aside, number = checkpoint.with_name(f"torn-{checkpoint.name}"), 1
            while aside.exists():
                aside, number = checkpoint.with_name(f"torn-{checkpoint.name}-{number}"), number + 1
            logger.warning("%s cannot be read (%s): set aside, the one before is used", checkpoint, reason)
            checkpoint.rename(aside)
            continue
        accelerator.unwrap_model(state.model).load_state_dict(model)
        state.optimizer.load_state_dict(optimizers["generator"])
        if state.discriminator is not None:
            accelerator.unwrap_model(state.discriminator).load_state_dict(judges)
            state.discriminator_optimizer.load_state_dict(optimizers["discriminator"])
        state.step = optimizers["step"]
        return True
    return False


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
