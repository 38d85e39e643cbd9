"""What the processes of one training tell each other: gradients, figures, and the latents that codebooks live from.

Gradients are averaged here, after all backward passes of a step, and not by DistributedDataParallel's hooks: a step
has two networks and one or two forward passes of each micro-batch, and which parameters take part depends on the
configuration. All of it is one all-reduce per network and step, in buckets that overlap each other.

Shapes: B crops of one process, K books, F frames, E codebook dimension.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from tokenizer.model.modeling import LMSPTOutput

BUCKET_BYTES = 32 << 20


def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Replaces each gradient by its mean over processes. A parameter without a gradient anywhere keeps none."""
    if accelerator.num_processes == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    present = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=accelerator.device)
    dist.all_reduce(present, dist.ReduceOp.MAX)
    gradients = []
    for parameter, anywhere in zip(trained, present.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    pending = []
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in pending:
        work.wait()
        flat /= accelerator.num_processes
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Tensors in their order, cut into runs of one dtype and about BUCKET_BYTES."""
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not buckets or size >= BUCKET_BYTES or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel() * tensor.element_size()
    return buckets


@torch.no_grad()
def start_equal(modules: Iterable[nn.Module | None], accelerator: Accelerator) -> None:
    """Gives every process the first one's weights and buffers."""
    if accelerator.num_processes == 1:
        return
    for module in filter(None, modules):
        for tensor in (*module.parameters(), *module.buffers()):
            # NCCL takes tensors of its GPU alone, and a module may keep one elsewhere (AveragedModel its counter)
            sent = tensor.detach().to(accelerator.device)
            dist.broadcast(sent, src=0)
            if sent.device != tensor.device:
                tensor.copy_(sent)


def mean_figures(figures: dict[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
    """Scalars as floats, each the mean over processes. All processes have the same names."""
    if not figures:
        return {}
    values = torch.stack([value.detach().float() for value in figures.values()])
    return dict(zip(figures, accelerator.reduce(values, "mean").tolist(), strict=True))


def gather_codes(parts: list[LMSPTOutput], with_latents: bool, accelerator: Accelerator) -> LMSPTOutput:
    """Codes of all micro-batches of all processes, in the order of the samples: what one process would have seen.

    Args:
        parts: one per micro-batch of this process, with `audio_codes` (B, K, F), -1 past an item's end, and
            `projected_latents`, K of (B, F, E).
        with_latents: gather the projected latents too, which only a revival needs.
        accelerator: of all processes.
    """
    codes = accelerator.gather(torch.cat([part.audio_codes for part in parts]))
    gathered = LMSPTOutput(audio_codes=codes, audio_codes_mask=codes[:, 0] >= 0)
    if with_latents:
        books = zip(*(part.projected_latents for part in parts), strict=True)
        gathered.projected_latents = tuple(accelerator.gather(torch.cat(book)) for book in books)
    return gathered
