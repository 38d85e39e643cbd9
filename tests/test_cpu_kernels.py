"""Every hand-written operation against the plain torch beside it: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tokenizer.model import cpu_kernels
from tokenizer.model.cpu_kernels import LOUDEST


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


# name -> arguments; the first one takes a gradient, and others whose place is named
CASES: dict[str, Callable[[], tuple]] = {
    "overlap_add": lambda: (normal(2, 7, 64), torch.hann_window(64), 16),
    "polar_spectrum": lambda: (normal(2, 5, 18) * 3,),
    "spectra": lambda: (normal(2, 500), torch.hann_window(64)),
    "spectral_magnitudes": lambda: (normal(2, 500), torch.hann_window(64)),
    "snake": lambda: (normal(2, 6, 50), torch.linspace(0.1, 3, 6).view(1, 6, 1).requires_grad_()),
    "mean_absolute_difference": lambda: (normal(2, 6, 1, 50), normal(2, 6, 1, 51)[..., 1:]),
}


def test_every_plain_function_is_compared():
    plain = {name.removeprefix("plain_") for name in vars(cpu_kernels) if name.startswith("plain_")}
    assert plain == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_plain_torch(name):
    found = []
    for function in (getattr(cpu_kernels, name), getattr(cpu_kernels, f"plain_{name}")):
        arguments = CASES[name]()
        arguments[0].requires_grad_()
        learned = [value for value in arguments if isinstance(value, Tensor) and value.requires_grad]
        values = function(*arguments)
        out = torch.view_as_real(values) if values.is_complex() else values
        weights = torch.linspace(0.5, 1.5, out.numel()).view(out.shape)
        found.append([values.detach(), *torch.autograd.grad((out * weights).sum(), learned)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_a_magnitude_at_its_bound_takes_no_gradient():
    values = torch.tensor([[10.0, 0.3]], requires_grad=True)
    spectrum = cpu_kernels.polar_spectrum(values)
    assert float(spectrum.detach().abs()) == pytest.approx(LOUDEST)
    (gradient,) = torch.autograd.grad(spectrum.real.sum(), values)
    assert gradient[0, 0] == 0 and gradient[0, 1] != 0


@pytest.mark.parametrize(("frames", "wanted"), [(500, "eager"), (501, "sdpa")])
def test_short_inputs_attend_without_the_fused_kernel_on_a_cpu(frames, wanted):
    assert cpu_kernels.attention_implementation(torch.device("cpu"), frames, "sdpa") == wanted
    assert cpu_kernels.attention_implementation(torch.device("cuda"), frames, "sdpa") == "sdpa"
