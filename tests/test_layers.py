"""Tokenizer layers: front end against a direct computation, local attention against a dense one, iSTFT inversion."""

import math

import pytest
import torch
import torch.nn.functional as F

from tokenizer.model.cpu_kernels import depthwise
from tokenizer.model.layers import AttentionLayer, ConvNeXtBlock, FrameConv, LocalAttention, Upsample
from tokenizer.model.spectral import ISTFTHead, LogMel, hann_window, mel_filters


def front_end(mean=0.0, std=1.0):
    return LogMel(16_000, 640, 160, 80, mean, std)


def test_log_mel_finds_the_band_of_a_tone_and_is_affine():
    tone = 0.5 * torch.sin(2 * math.pi * 1000 * torch.arange(16_000) / 16_000)[None]
    mel = front_end()(tone)
    assert mel.shape == (1, 100, 80)
    # Slaney's scale: 1000 Hz is mel 15 of 45.245 at 8000 Hz, so filter 15 / 45.245 * 81 - 1 = 25.9
    assert mel[0, 50].argmax() in (25, 26)
    torch.testing.assert_close(front_end(-4.0, 3.0)(tone), (mel + 4) / 3)


def test_log_mel_has_no_statistic_of_the_utterance():
    torch.manual_seed(0)
    quiet, loud = torch.randn(1, 8_000) * 0.01, torch.randn(1, 8_000)
    alone, joined = front_end()(quiet), front_end()(torch.cat([quiet, loud], dim=1))
    torch.testing.assert_close(joined[:, :48], alone[:, :48])


def test_log_mel_stays_fp32_under_autocast():
    samples = torch.randn(1, 3_200)
    with torch.autocast("cpu", torch.bfloat16):
        under = front_end()(samples)
    assert under.dtype == torch.float32
    assert torch.equal(under, front_end()(samples))


@pytest.mark.parametrize(
    ("module", "shape"), [(ISTFTHead(8, 64, 16), (1, 3, 8)), (LogMel(16_000, 64, 16, 8, 0.0, 1.0), (1, 96))]
)
def test_constants_made_in_inference_mode_serve_training(module, shape):
    """Windows and filters are kept: first made in inference mode, they give the gradient of constants made outside."""
    x = torch.randn(shape, requires_grad=True)

    def gradient():
        x.grad = None
        module(x, None).square().sum().backward()
        return x.grad.clone()

    for constants in (hann_window, mel_filters):
        constants.cache_clear()
    wanted = gradient()
    for constants in (hann_window, mel_filters):
        constants.cache_clear()
    with torch.inference_mode():
        module(x.detach(), None)
    torch.testing.assert_close(gradient(), wanted)
    assert wanted.abs().sum() > 0


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (4, 2), (8, 4), (10, 5)])
def test_frame_conv_equals_conv1d(kernel, stride):
    torch.manual_seed(0)
    conv, x = FrameConv(6, 5, kernel, stride), torch.randn(2, 20, 6)
    weight = conv.linear.weight.view(5, kernel, 6).transpose(1, 2)
    spare = kernel - stride
    padded = F.pad(x.transpose(1, 2), (spare // 2, spare - spare // 2))
    expected = F.conv1d(padded, weight, conv.linear.bias, stride=stride).transpose(1, 2)
    y = conv(x)
    assert y.shape == (2, 20 // stride, 5)
    torch.testing.assert_close(y, expected)


def test_upsample_does_not_leak():
    torch.manual_seed(0)
    up, x = Upsample(4, 3, 5), torch.randn(1, 6, 4)
    changed = x.clone()
    changed[:, 2] += 1
    moved = (up(x) != up(changed)).any(dim=-1)[0]
    assert moved.nonzero().flatten().tolist() == list(range(10, 15))


def dense_attention(layer, x, mask, window):
    """The same attention over all pairs, with positions counted from the start of the sequence."""
    batch, length, width = x.shape
    q, k, v = (y.view(batch, length, layer.heads, -1).transpose(1, 2) for y in layer.qkv(x).chunk(3, dim=-1))
    half = q.shape[-1] // 2
    angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(half) / half)

    def turn(y):
        z = torch.complex(y[..., :half], y[..., half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([z.real, z.imag], dim=-1)

    near = (torch.arange(length)[:, None] - torch.arange(length)).abs() <= window
    allowed = near & mask[:, None, None, :]
    scores = (turn(q) @ turn(k).transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~allowed, -1e9)
    return layer.out((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, width))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 12, 17])
def test_local_attention_equals_dense_banded_attention(length):
    torch.manual_seed(0)
    layer, x = LocalAttention(16, 8, 4), torch.randn(3, length, 16)
    lengths = torch.tensor([length, max(1, length - 3), 1])
    mask = torch.arange(length) < lengths[:, None]
    got = layer(x, mask)
    torch.testing.assert_close(got[mask], dense_attention(layer, x, mask, 4)[mask], atol=1e-5, rtol=1e-5)
    assert got.isfinite().all()


@pytest.mark.parametrize("make", [lambda: ConvNeXtBlock(8, 7, 2, 1.0), lambda: AttentionLayer(8, 4, 3, 2)])
def test_blocks_ignore_and_keep_zero_what_lies_past_the_mask(make):
    torch.manual_seed(0)
    block, x = make(), torch.randn(1, 9, 8)
    mask = torch.arange(14)[None] < 9
    padded = block(F.pad(x, (0, 0, 0, 5)), mask)
    torch.testing.assert_close(padded[:, :9], block(x, None), atol=1e-6, rtol=1e-5)
    assert (padded[:, 9:] == 0).all()


def test_istft_head_inverts_an_stft():
    torch.manual_seed(0)
    n_fft, hop, n_frames = 64, 16, 12
    signal = torch.randn(1, n_frames * hop)
    window = torch.hann_window(n_fft)
    frames = F.pad(signal, (24, 24)).unfold(-1, n_fft, hop) * window
    spectrum = torch.fft.rfft(frames)
    head = ISTFTHead(n_fft + 2, n_fft, hop)
    head.linear.weight.data.copy_(torch.eye(n_fft + 2))
    head.linear.bias.data.zero_()
    x = torch.cat([spectrum.abs().log(), spectrum.angle()], dim=-1)
    torch.testing.assert_close(head(x, None), signal, atol=1e-4, rtol=1e-4)
    # the envelope counts valid frames only, so a padded item is the item alone
    mask = torch.arange(n_frames + 3)[None] < n_frames
    padded = head(F.pad(x, (0, 0, 0, 3)), mask)
    torch.testing.assert_close(padded[:, : n_frames * hop], signal, atol=1e-4, rtol=1e-4)
    assert (padded[:, n_frames * hop :] == 0).all()


def test_istft_head_has_the_gradients_of_its_formula():
    torch.manual_seed(0)
    n_fft, hop, n_frames = 16, 4, 5
    head = ISTFTHead(n_fft + 2, n_fft, hop)
    head.linear.weight.data.copy_(torch.eye(n_fft + 2))
    x = torch.randn(2, n_frames, n_fft + 2)
    x[0, 2, 3], x[1, 0, 1] = 7.0, 4.7  # louder than the head gives out: no gradient to the first
    mask = torch.tensor([[True] * n_frames, [True] * 3 + [False] * 2])
    weights = torch.randn(2, n_frames * hop)

    def formula(x):
        log_magnitude, phase = (x + head.linear.bias).chunk(2, dim=-1)
        window = torch.hann_window(n_fft)
        spectrum = torch.polar(log_magnitude.exp().clamp(max=100.0), phase)
        frames = (torch.fft.irfft(spectrum, n=n_fft) * window).masked_fill(~mask[..., None], 0.0)
        total, weight = torch.zeros(2, (n_frames + 3) * hop), torch.zeros(2, (n_frames + 3) * hop)
        for t in range(n_frames):
            pad = (t * hop, (n_frames - 1 - t) * hop)
            total = total + F.pad(frames[:, t], pad)
            weight = weight + F.pad(window.square() * mask[:, t, None], pad)
        samples = (total / weight.clamp(min=1e-4))[:, 6:-6]
        return samples.masked_fill(~mask.repeat_interleave(hop, dim=1), 0.0)

    gradients, values = [], []
    for way in (lambda x: head(x, mask), formula):
        leaf = x.clone().requires_grad_()
        values.append(way(leaf))
        (values[-1] * weights).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_depthwise_convolution_in_bf16_has_the_librarys_gradients(causal):
    torch.manual_seed(0)
    block, x = ConvNeXtBlock(16, 7, 2, 1.0, causal), torch.randn(3, 12, 16)
    weights = torch.randn(3, 6 if causal else 12, 16)
    gradients = []
    for low in (True, False):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = depthwise(leaf, block.depthwise)
        assert y.dtype == (torch.bfloat16 if low else torch.float32)
        found = torch.autograd.grad((y * weights).sum(), [leaf, block.depthwise.weight, block.depthwise.bias])
        gradients.append(found)
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == torch.float32 and one.shape == other.shape
        assert (one - other).abs().max() < 0.03 * other.abs().max()
