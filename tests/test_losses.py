"""Losses and discriminators: identities, gradients, the published form of each term."""

from __future__ import annotations

import pytest
import torch

from tokenizer.training.discriminator import Discriminator, DiscriminatorConfig
from tokenizer.training.losses import MultiScaleMelLoss, discriminator_loss, generator_losses

SMALL = DiscriminatorConfig(periods=[2, 3], fft_sizes=[256], period_channels=2, band_channels=2)


def noise(seed: int = 0, batch: int = 2, samples: int = 4000) -> torch.Tensor:
    return 0.1 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


def test_mel_of_equal_waveforms_is_zero_and_of_others_reaches_the_input():
    mel = MultiScaleMelLoss(16000)
    assert mel(noise(), noise()) == 0
    made = noise(1).requires_grad_()
    mel(made, noise()).backward()
    assert torch.isfinite(made.grad).all() and made.grad.abs().sum() > 0


def test_mel_is_finite_at_silence():
    silence = torch.zeros(1, 1, 4000, requires_grad=True)
    mel, wanted = MultiScaleMelLoss(16000), noise(batch=1)
    loss = mel(silence, wanted)
    loss.backward()
    assert torch.isfinite(silence.grad).all()
    assert mel(0.01 * wanted, wanted) < loss < 100  # worse than all that is not silent, by a finite sum


def test_ten_times_the_level_costs_two_decades_of_log_power_per_window():
    """The logarithmic term is on power: a factor 10 in amplitude is 2.0 in log10 per window."""
    mel = MultiScaleMelLoss(16000, windows=(512,), n_mels=(20,))
    quiet, loud = noise(), 10 * noise()
    magnitudes = (mel._features(loud[:, 0], 512)[0] - mel._features(quiet[:, 0], 512)[0]).abs().mean()
    assert torch.isclose(mel(loud, quiet) - magnitudes, torch.tensor(2.0), atol=1e-2)


def test_least_squares_targets():
    real, fake = [[torch.zeros(1), torch.ones(2)]], [[torch.ones(1), torch.zeros(2)]]
    assert discriminator_loss(real, fake) == 0
    adversarial, matching = generator_losses(real, fake)
    assert adversarial == 1 and matching == 1
    assert generator_losses(real, real)[1] == 0


def test_discriminator_hears_neither_level_nor_offset():
    discriminator = Discriminator(SMALL)
    one, other = discriminator(noise()), discriminator(0.3 * noise() + 0.05)
    for part, changed in zip(one, other, strict=True):
        assert torch.allclose(part[-1], changed[-1], atol=1e-4)


def test_every_discriminator_weight_gets_a_gradient():
    discriminator = Discriminator(SMALL)
    discriminator_loss(discriminator(noise()), discriminator(noise(1))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in discriminator.parameters())


def test_no_parts_is_refused():
    with pytest.raises(ValueError, match="enabled=false"):
        Discriminator(DiscriminatorConfig(periods=[], fft_sizes=[]))
