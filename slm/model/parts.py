"""Parts of ours inside an LLM of transformers: a submodule of it, and a file of its own in its folder.

As a submodule, optimizers, checkpoints and adapters know of a part; by its own file, the folder without it is a plain
one of transformers.

Shapes: R rows of length L, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def attach(model: nn.Module, name: str, part: nn.Module) -> None:
    """Makes a part a submodule of a causal LM, held as its weights are."""
    weight = model.get_input_embeddings().weight
    model.add_module(name, part.to(device=weight.device, dtype=weight.dtype))


def part_of(model: nn.Module, name: str) -> nn.Module | None:
    """A part of a causal LM, the one that is trained where PEFT keeps two; None where it has none."""
    module = getattr(model, name, None)
    trained = getattr(module, "modules_to_save", None)
    return module if trained is None else trained[module.active_adapters[0]]


@contextmanager
def saved_apart(model: nn.Module, folder: str | Path, name: str, file: str) -> Iterator[None]:
    """While a model's folder is written, a part is not in it; it goes to a file of its own, if there is one."""
    module = model._modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            model.add_module(name, module)
    if module is not None:
        save_file(part_of(model, name).state_dict(), Path(folder) / file, metadata={"format": "pt"})


@contextmanager
def head_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """While open, tells the states (R, L, D) in front of a causal LM's head, of its newest forward pass.

    By a hook, so that the model's own forward pass stays as it is.

    Yields:
        A list of them alone; empty where the model does not run its head as a module.
    """
    states: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        states[:] = inputs[:1]

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield states
    finally:
        handle.remove()
