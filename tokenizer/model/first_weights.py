"""The random weights of an untrained tokenizer: truncated normal ones, or as torch draws its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import initialization as init

from tokenizer.model import dac
from tokenizer.model.configuration import LMSPTConfig
from tokenizer.model.fsq import FiniteScalarQuantizer
from tokenizer.model.layers import ConvNeXtBlock
from tokenizer.model.quantizer import VectorQuantizer
from tokenizer.model.spectral import ISTFTHead


def draw_weights(module: nn.Module, config: LMSPTConfig) -> None:
    """Fills a module's own weights as training begins with them, in place; modules without any are left alone.

    Args:
        module: Any of the tokenizer's, its parts not included.
        config: Says which initialisation and what standard deviation.
    """
    std = config.initializer_range
    if config.initialization == "torch" and _torch_default(module):
        return
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        _fill_weight(module, lambda weight: init.trunc_normal_(weight, std=std))
        init.zeros_(module.bias)
    elif isinstance(module, nn.ConvTranspose1d):
        _fill_weight(module, lambda weight: init.kaiming_uniform_(weight, a=5**0.5))
        init.zeros_(module.bias)
    elif isinstance(module, dac.Snake1d):
        init.ones_(module.alpha)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, ConvNeXtBlock):
        init.trunc_normal_(module.down.weight, std=std * module.scale)
    if config.initialization == "torch" and isinstance(module, (VectorQuantizer, FiniteScalarQuantizer)):
        init.ones_(module.usage)
    elif isinstance(module, (VectorQuantizer, FiniteScalarQuantizer)):
        # transposed orthonormal projections: each book starts by taking a subspace out of the residual, and
        # projections of normed latents spread like the entries
        _fill_weight(module.project_in, init.orthogonal_)
        _fill_weight(module.project_out, lambda weight: init.copy_(weight, module.project_in.weight.T))
        if isinstance(module, VectorQuantizer):
            init.normal_(module.codebook.weight)
        init.ones_(module.usage)
    elif isinstance(module, ISTFTHead):
        # random phases make the first output noise-like: equal ones would add up to a click per frame
        magnitude = torch.full_like(module.linear.bias, -2.0).chunk(2)[0]
        phase = (torch.rand_like(magnitude) * 2 - 1) * torch.pi
        init.copy_(module.linear.bias, torch.cat([magnitude, phase]))


def _torch_default(module: nn.Module) -> bool:
    """Initialises a layer as torch's own constructor does; False for what is none of torch's layers with weights."""
    if isinstance(module, nn.Embedding):
        init.normal_(module.weight)
        return True
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d)):
        return False
    _fill_weight(module, lambda weight: init.kaiming_uniform_(weight, a=5**0.5))
    bound = module.weight[0].numel() ** -0.5  # torch counts so for transposed convolutions too
    init.uniform_(module.bias, -bound, bound)
    return True


def _fill_weight(module: nn.Module, fill: Callable[[Tensor], object]) -> None:
    """Initialises a weight, under weight norm its direction and then its norm."""
    if not parametrize.is_parametrized(module, "weight"):
        fill(module.weight)
        return
    norm, direction = module.parametrizations.weight.original0, module.parametrizations.weight.original1
    fill(direction)
    init.copy_(norm, torch.norm_except_dim(direction, 2, 0))
