"""The codec training step as published, for comparison: nothing shared, nothing saved. Beside it, each saving alone.

The arithmetic is that of kakaocorp/lmspt and of the Descript Audio Codec's training loop (arXiv 2306.06546): fp32; the
teacher hears crops padded to 30 s; real and generated crops pass the discriminators one after the other in both halves
of the step, with a gradient graph of the real ones too; weight norm is multiplied out at every call; AdamW goes through
the weights one by one. `savings` turns on what `tokenizer/` does instead, piece by piece.

Shapes: B crops, S samples, P period, T positions in time, W frequency bins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.dac.modeling_dac import Snake1d

from tokenizer.model.dac import Snake
from tokenizer.model.modeling import LMSPTModel
from tokenizer.training.discriminator import BandDiscriminator, Discriminator, PeriodDiscriminator
from tokenizer.training.losses import Features, MultiScaleMelLoss, discriminator_loss, generator_losses
from tokenizer.training.objective import Objective, codec_losses, loss_weights, split_real_and_generated

ARITHMETIC = {
    "passes": "one discriminator pass over real and generated crops; the generator is judged by frozen weights, and no "
    "graph is kept of the real crops",
    "layout": "discriminators channels-last, periods as items of one-dimensional convolutions, leaky ReLU in place",
    "folded": "discriminator weights multiplied out and laid out once for both passes of the generator's half",
    "spectra": "spectra, mel and feature-matching losses with fewer passes over memory, forward and backward",
    "snake": "Snake in one function, which computes its slope anew instead of keeping its parts",
    "optimizer": "AdamW fused",
}
OTHERS = {
    "crop": "the teacher hears the crop alone",
    "bf16": "bf16 autocast; quantizer, spectra and losses stay fp32",
    "even": "wide layers of the period discriminators over multiples of 16 steps of time (in bf16 alone)",
}


def period_features(part: PeriodDiscriminator, waveform: Tensor) -> list[Tensor]:
    """A period discriminator over images (B, C, T, P)."""
    if part.padding == "reflect":
        padded = F.pad(waveform, (0, part.period - waveform.shape[-1] % part.period), mode="reflect")
    else:
        padded = F.pad(waveform, (0, -waveform.shape[-1] % part.period))
    hidden, features = padded.unflatten(-1, (-1, part.period)), []
    for layer in part.layers:
        hidden = F.leaky_relu(F.conv2d(hidden, layer.weight, layer.bias, layer.stride, layer.padding), 0.1)
        features.append(hidden)
    verdict = part.verdict
    return [*features, F.conv2d(hidden, verdict.weight, verdict.bias, verdict.stride, verdict.padding)]


def band_features(part: BandDiscriminator, waveform: Tensor) -> list[Tensor]:
    """A band discriminator over torch.stft's spectra (B, 2, T, W)."""
    size = part.fft_size
    with torch.autocast(waveform.device.type, enabled=False):
        samples, options = waveform[:, 0].float(), {"window": part.window, "return_complex": True}
        if part.padding == "reflect":
            side, missing = (size - size // 4) // 2, -samples.shape[-1] % (size // 4)
            samples = F.pad(samples, (side, side + missing), mode="reflect")
            spectrum = torch.stft(samples, size, size // 4, center=False, **options)
        else:
            spectrum = torch.stft(samples, size, size // 4, pad_mode="constant", **options)
    image, features, outputs = torch.view_as_real(spectrum).permute(0, 3, 2, 1), [], []
    for (low, high), stack in zip(part.bands, part.stacks, strict=True):
        hidden = image[..., low:high]
        for layer in stack:
            hidden = F.leaky_relu(F.conv2d(hidden, layer.weight, layer.bias, layer.stride, layer.padding), 0.1)
            features.append(hidden)
        outputs.append(hidden)
    verdict = part.verdict
    return [*features, F.conv2d(torch.cat(outputs, dim=-1), verdict.weight, verdict.bias, padding=verdict.padding)]


def discriminate(discriminator: Discriminator, waveform: Tensor, savings: Collection[str] = ()) -> Features:
    """Feature maps of every part, of waveforms (B, 1, S)."""
    if "layout" in savings:
        as_it_is = mock.patch("tokenizer.model.cpu_kernels.TIME_MULTIPLE", 1)
        with contextlib.nullcontext() if "even" in savings else as_it_is:
            return discriminator(waveform)
    centred = waveform - waveform.mean(dim=-1, keepdim=True)
    scaled = 0.8 * centred / (centred.abs().amax(dim=-1, keepdim=True) + 1e-9)
    return [
        (period_features if isinstance(part, PeriodDiscriminator) else band_features)(part, scaled)
        for part in discriminator.parts
    ]


def mel_loss(mel: MultiScaleMelLoss, output: Tensor, target: Tensor) -> Tensor:
    """The multi-scale mel loss by torch.stft, from waveforms (B, 1, S)."""
    total = output.new_zeros((), dtype=torch.float32)
    pad_mode = {"zeros": "constant", "reflect": "reflect"}[mel.padding]
    for size in mel.windows:
        filters, window = getattr(mel, f"filters_{size}"), getattr(mel, f"window_{size}")
        levels = []
        for waveform in (output, target):
            spectrum = torch.stft(
                waveform[:, 0].float(), size, size // 4, window=window, pad_mode=pad_mode, return_complex=True
            )
            levels.append(filters @ (torch.view_as_real(spectrum).square().sum(-1) + 1e-9).sqrt())
        total = total + F.l1_loss(*levels)
        total = total + F.l1_loss(*(2 * level.clamp(min=1e-5).log10() for level in levels))
    return total


def matching_losses(real: Features, fake: Features) -> tuple[Tensor, Tensor]:
    """The adversarial term and the feature matching, by torch's own L1."""
    adversarial = sum((1 - made[-1].float()).square().mean() for made in fake)
    pairs = [(a, b) for r, f in zip(real, fake, strict=True) for a, b in zip(r[:-1], f[:-1], strict=True)]
    return adversarial, sum(F.l1_loss(made.float(), wanted.detach().float()) for wanted, made in pairs)


def generator_terms(
    objective: Objective,
    model: LMSPTModel,
    discriminator: Discriminator,
    batch: dict[str, Tensor],
    output: object,
    savings: Collection[str] = (),
) -> dict[str, Tensor]:
    """Every loss of the generator, unweighted, as `tokenizer.training.objective.codec_losses` names them."""
    target, made = batch["input_values"], output.audio_values
    # commitment, codebook and distillation: one way of computing each
    losses = codec_losses(_without_mel(objective, "spectra" in savings), output, target, model.config, None)
    if "spectra" not in savings:
        with torch.autocast(target.device.type, enabled=False):
            losses["mel"] = mel_loss(objective.mel, made, target)
    compare = generator_losses if "spectra" in savings else matching_losses
    if "passes" not in savings:
        real, fake = (discriminate(discriminator, waveform, savings) for waveform in (target, made))
    else:
        discriminator.requires_grad_(False)
        with discriminator.frozen() if "folded" in savings else contextlib.nullcontext():
            with torch.no_grad():
                real = discriminate(discriminator, target, savings)
            fake = discriminate(discriminator, made, savings)
        discriminator.requires_grad_(True)
    losses["adversarial"], losses["feature_matching"] = compare(real, fake)
    return losses


def discriminator_term(
    discriminator: Discriminator, real: Tensor, fake: Tensor, savings: Collection[str] = ()
) -> Tensor:
    """The discriminators' loss on waveforms (B, 1, S)."""
    if "passes" in savings:
        return discriminator_loss(
            *split_real_and_generated(discriminate(discriminator, torch.cat([real, fake]), savings))
        )
    return discriminator_loss(*(discriminate(discriminator, waveform, savings) for waveform in (real, fake)))


def step(
    objective: Objective,
    model: LMSPTModel,
    discriminator: Discriminator,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    batch: dict[str, Tensor],
    savings: Collection[str] = (),
    gradient_clip: float = 1.0,
) -> dict[str, float]:
    """One step: the discriminators, then the generator. Returns every loss.

    Args:
        objective: as of `tokenizer.training.step.train_step`; its teacher's window and the weight of the distillation
            are set by the caller, and so are `savings` "crop" and "optimizer".
        model: the generator, in training mode.
        discriminator: all of them.
        optimizers: the generator's and the discriminators'.
        batch: `input_values` (B, 1, S) and what else the model's forward pass takes.
        savings: keys of ARITHMETIC and OTHERS; "layout" without "even" leaves odd numbers of steps odd.
        gradient_clip: largest gradient norm, each optimizer.
    """
    snakes(model, "snake" in savings)
    precision = torch.autocast("cpu", torch.bfloat16, enabled="bf16" in savings)
    with precision:
        output = model(**batch)
        judged = discriminator_term(discriminator, batch["input_values"], output.audio_values.detach(), savings)
    _move(optimizers[1], judged, discriminator, gradient_clip)
    weights = loss_weights(objective)
    with precision:
        losses = generator_terms(objective, model, discriminator, batch, output, savings)
    total = sum(weights[name] * value for name, value in losses.items() if name in weights)
    _move(optimizers[0], total, model, gradient_clip)
    losses |= {"discriminator": judged, "total": total}
    return {name: float(value.detach()) for name, value in losses.items()}


def snakes(model: LMSPTModel, fused: bool) -> None:
    """Computes Snake by one function, or by the parts that transformers' Snake1d is made of."""
    for module in model.modules():
        if isinstance(module, Snake1d):
            module.__class__ = Snake if fused else Snake1d


def _move(optimizer: torch.optim.Optimizer, loss: Tensor, module: nn.Module, gradient_clip: float) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), gradient_clip)
    optimizer.step()


class _NoMel(nn.Module):
    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return output.new_zeros(())


def _without_mel(objective: Objective, keep: bool) -> Objective:
    """The same objective, but for its mel loss."""
    if keep:
        return objective
    return Objective(objective.weights, _NoMel(), objective.teacher, objective.distillation_weight)
