"""Speed, level and noise augmentation of one waveform, drawn from a generator that the caller seeds.

Shapes: S samples of one mono waveform, float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import soxr


@dataclass
class AugmentationConfig:
    """How far a training waveform may be changed. All zeros: not at all."""

    speed: float = field(default=0.1, metadata={"help": "speed and pitch change by a factor in 1 +- this"})
    level_db: float = field(default=6.0, metadata={"help": "gain drawn from +- this many dB"})
    noise_probability: float = field(default=0.3, metadata={"help": "share of waveforms that get noise added"})
    noise_snr_db: tuple[float, float] = field(
        default=(10.0, 40.0), metadata={"help": "range of the signal-to-noise ratio of that noise, dB"}
    )

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.speed < 0.5:
            problems.append(f"speed={self.speed}: must lie in [0, 0.5)")
        if self.level_db < 0:
            problems.append(f"level_db={self.level_db}: must not be negative")
        if not 0 <= self.noise_probability <= 1:
            problems.append(f"noise_probability={self.noise_probability}: must lie in [0, 1]")
        if self.noise_snr_db[0] > self.noise_snr_db[1]:
            problems.append(f"noise_snr_db={self.noise_snr_db}: must rise")
        if problems:
            raise ValueError("augmentation: " + "; ".join(problems))


def draw_speed(config: AugmentationConfig, rng: np.random.Generator) -> float:
    """A speed: by what factor a changed copy is shorter."""
    return 1.0 + config.speed * rng.uniform(-1, 1)


def augment(
    samples: np.ndarray, config: AugmentationConfig, rng: np.random.Generator, speed: float | None = None
) -> np.ndarray:
    """Returns a changed copy of `samples` (S,); its length changes with the speed, which is drawn unless it is given.

    The draws are always made, in the same order, so that one setting does not move another's randomness.
    """
    speed = draw_speed(config, rng) if speed is None else speed
    gain_db = config.level_db * rng.uniform(-1, 1)
    with_noise = rng.uniform() < config.noise_probability
    snr_db = rng.uniform(*config.noise_snr_db)
    tilt = rng.uniform(0, 1)
    if abs(speed - 1.0) > 1e-3:
        samples = soxr.resample(samples, speed, 1.0, quality="MQ").astype(np.float32)
    if with_noise:
        samples = samples + _noise(len(samples), tilt, rng) * _rms(samples) * 10 ** (-snr_db / 20)
    samples = samples * 10 ** (gain_db / 20)
    peak = np.abs(samples).max(initial=0.0)
    return (samples / peak if peak > 1.0 else samples).astype(np.float32)


def _noise(length: int, tilt: float, rng: np.random.Generator) -> np.ndarray:
    """Unit-RMS noise between white (tilt 0) and pink-brown (tilt 1)."""
    padded = 1 << (length - 1).bit_length()  # an FFT of prime length is twenty times slower
    spectrum = np.fft.rfft(rng.standard_normal(padded))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** tilt
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum, n=padded)[:length]
    return noise / max(_rms(noise), 1e-12)


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
