"""dMel: log-mel channels cut into 16 levels each, with no training (arXiv 2407.15835).

Shapes: G items of one length, S samples, M mel channels = books, F code frames, T = F * r mel frames, N STFT bins.

As in the paper, each of 80 log-mel channels is a book of 2^4 levels between fixed bounds. The paper takes the bounds
from its data and a trained vocoder; here they are constants, and Griffin-Lim makes the waveform, so that nothing needs
training. A code frame is the mean of r log-mel frames about 10 ms apart: one STFT serves every frame rate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tokenizer.codecs.base import Codec
from tokenizer.model.spectral import LogMel, hann_window, mel_filters
from tokenizer.protocol import CodecConfig

SAMPLING_RATE = 16_000
N_FFT = 1024
N_MELS = 80
LEVELS = 16
# natural log of mel magnitudes: speech recordings keep 95 % of their values within these bounds
LOWEST, HIGHEST = -9.0, 1.0
GRIFFIN_LIM_STEPS = 32
MOMENTUM = 0.99  # "fast Griffin-Lim" (Perraudin et al., 2013)
HOPS = {
    "dmel-6.25hz": 2560,
    "dmel-12.5hz": 1280,
    "dmel-25hz": 640,
    "dmel-40hz": 400,
    "dmel-50hz": 320,
    "dmel-100hz": 160,
}


class DMel(Codec):
    """dMel by name: `dmel-25hz` has 80 books of 16 levels, 25 x 80 x 4 = 8000 bit/s.

    With fewer than 80 books to decode, the channels above are silent. Book 0 is the lowest channel, so no single book
    holds words: an SLM has to model all of them.

    Args:
        name: one of `HOPS`.
        num_codebooks: keep only the lowest channels; None keeps all 80.
    """

    inverse: Tensor

    def __init__(self, name: str, num_codebooks: int | None = None) -> None:
        hop = HOPS[name]
        self_config = CodecConfig("dmel", SAMPLING_RATE, hop, [LEVELS] * N_MELS)
        self.frames_per_code = hop // 160
        self.mel_hop = hop // self.frames_per_code
        mel = LogMel(SAMPLING_RATE, N_FFT, self.mel_hop, N_MELS, mean=LOWEST, std=HIGHEST - LOWEST)
        super().__init__(mel, self_config, num_codebooks)
        filters = mel_filters(N_FFT, N_MELS, SAMPLING_RATE, torch.device("cpu"))  # (N, M)
        self.register_buffer("inverse", torch.linalg.pinv(filters), persistent=False)  # (M, N)

    def identity(self) -> dict[str, Any]:
        return {"n_fft": N_FFT, "mel_hop": self.mel_hop, "bounds": [LOWEST, HIGHEST], "levels": LEVELS}

    def encode_frames(self, samples: Tensor) -> Tensor:
        """Codes (G, M, F) of samples (G, 1, F * hop)."""
        levels = self.model(samples[:, 0]).unflatten(1, (-1, self.frames_per_code)).mean(dim=2)  # 0 to 1 within bounds
        return (levels * (LEVELS - 1)).round().clamp(0, LEVELS - 1).long().transpose(1, 2)

    def decode_frames(self, codes: Tensor) -> Tensor:
        """Samples (G, F * hop): levels drawn out linearly to mel frames, filters inverted, phases by Griffin-Lim."""
        levels = torch.zeros(len(codes), N_MELS, codes.shape[-1], device=codes.device)
        levels[:, : codes.shape[1]] = codes.float()
        levels = interpolate(levels, scale_factor=self.frames_per_code, mode="linear") / (LEVELS - 1)
        # what lies at the lowest level was at most that: it counts as silence
        mel = (levels * (HIGHEST - LOWEST) + LOWEST).exp().masked_fill(levels <= 0, 0.0)
        magnitude = (self.inverse.T @ mel).clamp(min=0.0)
        return griffin_lim(magnitude, N_FFT, self.mel_hop).clamp(-1.0, 1.0)


def griffin_lim(magnitude: Tensor, n_fft: int, hop: int, steps: int = GRIFFIN_LIM_STEPS) -> Tensor:
    """Waveforms (G, T * hop) whose STFT has about this magnitude (G, N, T).

    Frame t is centred at (t + 1/2) * hop, as `LogMel` frames. First phases are drawn from a fixed seed: the same
    magnitude always gives the same waveform, alone or beside others.
    """
    n_frames, device = magnitude.shape[-1], magnitude.device
    # one frame more at each end: the inverse STFT begins and ends at a frame's centre
    magnitude = nn.functional.pad(magnitude, (1, 1), mode="replicate")
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(magnitude.shape[1:], generator=generator).to(device) * (2 * torch.pi)
    phase = torch.polar(torch.ones_like(angles), angles).expand(magnitude.shape)
    window, before = hann_window(n_fft, device), torch.zeros_like(phase)
    for _ in range(steps):
        samples = torch.istft(magnitude * phase, n_fft, hop, window=window)
        found = torch.stft(samples, n_fft, hop, window=window, pad_mode="constant", return_complex=True)
        ahead = found - before * (MOMENTUM / (1 + MOMENTUM))
        phase, before = ahead / ahead.abs().clamp(min=1e-12), found
    samples = torch.istft(magnitude * phase, n_fft, hop, window=window)
    return samples[:, hop // 2 : hop // 2 + n_frames * hop]
