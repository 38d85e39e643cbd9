"""The latent space of the acoustic stage, and the paths from noise to it: flow, diffusion, regression."""

from __future__ import annotations

import pytest
import torch

from slm.acoustic.configuration import AcousticError
from slm.acoustic.diffusion import Diffusion
from slm.acoustic.flow import Flow
from slm.acoustic.latent_space import fit_latent_space
from slm.acoustic.paths import follow
from slm.acoustic.regression import Regression


def test_the_space_holds_the_sum_and_takes_each_code_s_mean_off():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 6, (3, 400), generator=generator)
    codes[1] = (codes[0] + torch.randint(0, 2, (400,), generator=generator)) % 6  # book 0 tells some of it
    entries = [torch.randn(6, 2, generator=generator) @ torch.randn(2, 8, generator=generator) for _ in range(2)]
    found = fit_latent_space(6, entries, [codes[:, :250].numpy(), codes[:, 250:].numpy()], 1.0)
    points = found.points(codes[None])[0]
    truth = entries[0][codes[1]] + entries[1][codes[2]]
    assert torch.allclose(found.latents(points, codes[0]), truth, atol=1e-4)
    assert points.shape[1] == 4  # two books of two dimensions in eight channels
    assert torch.allclose(points.square().mean(dim=0), torch.ones(4), atol=1e-4)
    for code in range(6):
        n, there = int((codes[0] == code).sum()), codes[0] == code
        expected = (truth[there].sum(dim=0) + 5 * truth.mean(dim=0)) / (n + 5)
        assert torch.allclose(found.means[code], expected, atol=1e-4)
    fewer = fit_latent_space(6, entries, [codes.numpy()], 0.7)
    assert 1 <= len(fewer.directions) < 4
    rest = truth - fewer.latents(fewer.points(codes[None])[0], codes[0])
    assert rest.square().sum() <= 0.3 * (truth - found.means[codes[0]]).square().sum()
    with pytest.raises(AcousticError, match="nothing to predict"):
        fit_latent_space(6, entries, [codes[:1].expand(3, -1).numpy()[:, :1]], 1.0)


def test_euler_steps_are_exact_on_straight_paths_and_known_on_a_linear_field():
    noise, clean = (torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    for steps in (1, 3, 10):
        assert torch.allclose(follow(Flow(), lambda x, t: clean - noise, noise, steps), clean, atol=1e-5)
        shrunk = follow(Flow(), lambda x, t: -x, noise, steps)  # dx/dt = -x, whose Euler steps are known
        assert torch.allclose(shrunk, noise * (1 - 1 / steps) ** steps, atol=1e-6)
    assert torch.equal(Flow().mixture(clean, noise, 0.0), noise) and torch.equal(
        Flow().mixture(clean, noise, 1.0), clean
    )


def test_ddim_steps_find_latents_that_are_known_and_keep_the_variance():
    noise, clean = (torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    path = Diffusion()
    for steps in (1, 3, 10):
        found = follow(path, lambda x, t: path.target(clean, noise, t), noise, steps)
        assert torch.allclose(found, clean, atol=1e-5)
    for time in (0.0, 0.3, 0.9):
        mixture = path.mixture(clean, noise, torch.tensor(time))
        assert mixture.var() == pytest.approx(1.0, abs=0.1)
        assert torch.allclose(mixture, path.mixture(clean, noise, time), atol=1e-6)
    asked = []
    follow(Regression(), lambda x, t: asked.append((x, t)) or clean, noise, 10)
    assert len(asked) == 1 and not asked[0][0].any()  # one step, and of the noise nothing is read


def test_the_guess_without_a_model_is_the_regression_of_the_target_on_the_mixture():
    noise, clean = (torch.randn(20000, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    for path in (Flow(), Diffusion()):
        for time in (0.1, 0.5, 0.8):
            mixture, target = path.mixture(clean, noise, time), path.target(clean, noise, time)
            fitted = float((mixture * target).mean() / mixture.square().mean())
            assert path.share(time) == pytest.approx(fitted, abs=0.03)
