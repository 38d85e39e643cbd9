"""Speed, formants, room, noise and level of one waveform, drawn from a generator that the caller seeds.

Speed moves pitch, formants and tempo together; formants alone are the size of the vocal tract, so that with both one
voice counts for several.

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

    formants: float = field(
        default=0.0,
        metadata={"help": "formants moved by a factor in 1 +- this, pitch and tempo left (0.15: other voices)"},
    )
    reverb_probability: float = field(default=0.0, metadata={"help": "share of waveforms that are put into a room"})
    reverb_t60_s: tuple[float, float] = field(
        default=(0.1, 0.6), metadata={"help": "range of those rooms' reverberation time (to -60 dB), seconds"}
    )
    reverb_drr_db: tuple[float, float] = field(
        default=(0.0, 20.0), metadata={"help": "range of the direct sound's level over the reverberation's, dB"}
    )

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.speed < 0.5:
            problems.append(f"speed={self.speed}: must lie in [0, 0.5)")
        if not 0 <= self.formants < 0.5:
            problems.append(f"formants={self.formants}: must lie in [0, 0.5)")
        if self.level_db < 0:
            problems.append(f"level_db={self.level_db}: must not be negative")
        for key in ("noise_probability", "reverb_probability"):
            if not 0 <= getattr(self, key) <= 1:
                problems.append(f"{key}={getattr(self, key)}: must lie in [0, 1]")
        for key in ("noise_snr_db", "reverb_t60_s", "reverb_drr_db"):
            low, high = getattr(self, key)
            if low > high:
                problems.append(f"{key}={getattr(self, key)}: must rise")
        if self.reverb_t60_s[0] <= 0:
            problems.append(f"reverb_t60_s={self.reverb_t60_s}: must be positive")
        if problems:
            raise ValueError("augmentation: " + "; ".join(problems))


def draw_speed(config: AugmentationConfig, rng: np.random.Generator) -> float:
    """A speed: by what factor a changed copy is shorter."""
    return 1.0 + config.speed * rng.uniform(-1, 1)


def augment(
    samples: np.ndarray,
    config: AugmentationConfig,
    rng: np.random.Generator,
    sampling_rate: int,
    speed: float | None = None,
) -> np.ndarray:
    """Returns a changed copy of `samples` (S,); its length changes with the speed, which is drawn unless it is given.

    The draws are always made, in the same order, so that one setting does not move another's randomness. Those of
    formants and room come from a generator of their own: trainings that were begun before there were any go on as they
    were.
    """
    speed = draw_speed(config, rng) if speed is None else speed
    gain_db = config.level_db * rng.uniform(-1, 1)
    with_noise = rng.uniform() < config.noise_probability
    snr_db = rng.uniform(*config.noise_snr_db)
    tilt = rng.uniform(0, 1)
    room_rng = rng.spawn(1)[0]
    formants = 1.0 + config.formants * room_rng.uniform(-1, 1)
    with_reverb = room_rng.uniform() < config.reverb_probability
    t60_s, drr_db = room_rng.uniform(*config.reverb_t60_s), room_rng.uniform(*config.reverb_drr_db)
    if abs(speed - 1.0) > 1e-3:
        samples = soxr.resample(samples, speed, 1.0, quality="MQ").astype(np.float32)
    if abs(formants - 1.0) > 1e-3:
        samples = move_formants(samples, formants, sampling_rate)
    if with_reverb:
        samples = reverberate(samples, t60_s, drr_db, sampling_rate, room_rng)
    if with_noise:
        samples = samples + _noise(len(samples), tilt, rng) * _rms(samples) * 10 ** (-snr_db / 20)
    samples = samples * 10 ** (gain_db / 20)
    peak = np.abs(samples).max(initial=0.0)
    return (samples / peak if peak > 1.0 else samples).astype(np.float32)


def move_formants(samples: np.ndarray, factor: float, sampling_rate: int) -> np.ndarray:
    """Multiplies the frequencies of the formants of `samples` (S,) by a factor; pitch and tempo stay.

    The spectral envelope (the cepstrum up to 2 ms, below the period of any voice but a child's) is stretched along
    frequency in windows of 32 ms; the harmonics under it stay where they are.
    """
    window = 2 * round(0.016 * sampling_rate)
    hop = window // 4
    shape = np.sqrt(0.5 - 0.5 * np.cos(2 * np.pi * (np.arange(window) + 0.5) / window))
    padded = np.pad(samples, (window, window + -len(samples) % hop))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop] * shape
    spectrum = np.fft.rfft(frames)
    cepstrum = np.fft.irfft(np.log(np.abs(spectrum) + 1e-5))
    kept = round(0.002 * sampling_rate)
    cepstrum[:, kept : window - kept + 1] = 0.0
    envelope = np.fft.rfft(cepstrum).real
    bins = np.arange(envelope.shape[1])
    source = np.minimum(bins / factor, bins[-1])
    low = source.astype(int).clip(max=len(bins) - 2)
    moved = envelope[:, low] + (envelope[:, low + 1] - envelope[:, low]) * (source - low)
    changed = np.fft.irfft(spectrum * np.exp(np.clip(moved - envelope, -6.0, 6.0))) * shape
    result, norm = np.zeros(len(padded)), np.zeros(len(padded))
    for index, frame in enumerate(changed):
        result[index * hop : index * hop + window] += frame
        norm[index * hop : index * hop + window] += shape**2
    return (result / np.maximum(norm, 1e-3))[window : window + len(samples)].astype(np.float32)


def reverberate(
    samples: np.ndarray, t60_s: float, drr_db: float, sampling_rate: int, rng: np.random.Generator
) -> np.ndarray:
    """`samples` (S,) in a room: the direct sound, then noise that decays by 60 dB in `t60_s`; as long as they were.

    Args:
        samples: of the recording.
        t60_s: reverberation time, seconds.
        drr_db: energy of the direct sound over that of the reverberation, dB.
        sampling_rate: in Hz.
        rng: draws the room.
    """
    time_s = np.arange(1, max(2, round(t60_s * sampling_rate))) / sampling_rate
    tail = rng.standard_normal(len(time_s)) * 10 ** (-3 * time_s / t60_s)
    tail *= 10 ** (-drr_db / 20) / np.sqrt(np.square(tail).sum())
    length = 1 << (len(samples) + len(tail)).bit_length()
    spectrum = np.fft.rfft(samples, length) * np.fft.rfft(np.concatenate([[1.0], tail]), length)
    return np.fft.irfft(spectrum, length)[: len(samples)].astype(np.float32)


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
