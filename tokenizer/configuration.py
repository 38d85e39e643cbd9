"""LMSPTConfig: every size of the tokenizer, checked once, and the named presets."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig


class LMSPTConfig(PreTrainedConfig):
    """Sizes of an LM-SPT speech tokenizer (arXiv 2506.16738) in its CPU-sized `nano` form.

    Two encoders read a log-mel; the semantic latents go through one codebook, the acoustic ones through a residual
    quantizer; a main decoder reads the sum, a small auxiliary decoder the semantic codes alone.

    Args:
        sampling_rate: Hz of the input and of the main decoder's output.
        strides: downsampling factors; the first is the mel hop in samples, their product the samples per code.
        n_fft: window of the mel front end and of both iSTFT heads, in samples (per head at that decoder's rate).
        n_mels: mel bands of the front end.
        mel_mean, mel_std: fixed affine normalisation of the natural-log mel (never a statistic of the utterance).
        latent_dim: channels D of the latents.
        codebook_sizes: entries per book, book 0 (semantic) first. Published: 16384 and 7 x 4096.
        codebook_dim: dimension of the factorized look-up (published: 8).
        semantic_subtraction: quantize `acoustic latents - quantized semantic` (published: true), not the latents.
        semantic_encoder_*, acoustic_encoder_*, decoder_*, auxiliary_decoder_*: `width` in channels; `depths`, the
            ConvNeXt blocks at each resolution in the order of the strides (after the mel hop, after the second stride,
            ...); `layers`, the local-attention layers at the frame rate.
        auxiliary_sampling_rate: Hz of the auxiliary decoder's output (published: 16000).
        auxiliary_strides: the auxiliary decoder's factors; None means `strides`.
        attention_window: frames that attention sees on each side.
        head_dim: channels of one attention head.
        kernel_size: taps of the depthwise convolutions (odd).
        expansion: width of the feed-forward layers relative to the block.
        initializer_range: standard deviation of the initial weights.
        trained: False for random weights; the training recipe sets it, and it is saved.

    Raises:
        ValueError: naming every key whose value cannot work.
    """

    model_type = "lmspt"

    sampling_rate: int = 16_000
    strides: list[int] | None = None
    n_fft: int = 640
    n_mels: int = 80
    mel_mean: float = -6.5
    mel_std: float = 2.3
    latent_dim: int = 256
    codebook_sizes: list[int] | None = None
    codebook_dim: int = 8
    semantic_subtraction: bool = True
    semantic_encoder_width: int = 256
    semantic_encoder_depths: list[int] | None = None
    semantic_encoder_layers: int = 2
    acoustic_encoder_width: int = 192
    acoustic_encoder_depths: list[int] | None = None
    acoustic_encoder_layers: int = 1
    decoder_width: int = 256
    decoder_depths: list[int] | None = None
    decoder_layers: int = 2
    auxiliary_sampling_rate: int = 16_000
    auxiliary_strides: list[int] | None = None
    auxiliary_decoder_width: int = 128
    auxiliary_decoder_depths: list[int] | None = None
    auxiliary_decoder_layers: int = 1
    attention_window: int = 16
    head_dim: int = 64
    kernel_size: int = 7
    expansion: int = 3
    initializer_range: float = 0.02
    trained: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.strides = [160, 4, 2] if self.strides is None else _as_list(self.strides)
        self.auxiliary_strides = _as_list(self.strides if self.auxiliary_strides is None else self.auxiliary_strides)
        self.codebook_sizes = [1024] * 8 if self.codebook_sizes is None else _as_list(self.codebook_sizes)
        rungs = len(self.strides) if isinstance(self.strides, list) else 1
        for part in ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder"):
            depths = getattr(self, f"{part}_depths")
            setattr(self, f"{part}_depths", [1] * rungs if depths is None else _as_list(depths))
        problems = _problems(self)
        if problems:
            raise ValueError("LMSPTConfig: " + "; ".join(problems))
        super().__post_init__(**kwargs)

    @property
    def hop_length(self) -> int:
        """Samples per code frame."""
        return math.prod(self.strides)

    @property
    def frame_rate(self) -> float:
        """Code frames per second, exact."""
        return self.sampling_rate / self.hop_length

    @property
    def auxiliary_hop_length(self) -> int:
        """Samples per code frame in the auxiliary decoder's output."""
        return math.prod(self.auxiliary_strides)

    @property
    def num_codebooks(self) -> int:
        """K: one semantic book and K-1 acoustic ones."""
        return len(self.codebook_sizes)


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _problems(config: LMSPTConfig) -> list[str]:
    """Returns one sentence for each key that cannot work, each starting with the key."""
    found: list[str] = []

    def check(key: str, good: bool, must: str) -> bool:
        if not good:
            found.append(f"{key} must be {must}, not {getattr(config, key)!r}")
        return good

    def integer(key: str, lowest: int) -> bool:
        value = getattr(config, key)
        return check(key, _is_int(value) and value >= lowest, f"an integer of at least {lowest}")

    def integers(key: str, lowest: int, length: int | None = None) -> bool:
        value = getattr(config, key)
        good = isinstance(value, list) and bool(value) and all(_is_int(v) and v >= lowest for v in value)
        if not check(key, good, f"a non-empty list of integers of at least {lowest}"):
            return False
        return length is None or check(key, len(value) == length, f"a list of {length} integers, one per stride")

    positive = ("sampling_rate", "auxiliary_sampling_rate", "n_fft", "n_mels", "latent_dim", "codebook_dim")
    sound = {key: integer(key, 1) for key in (*positive, "attention_window", "head_dim", "kernel_size", "expansion")}
    if sound["head_dim"]:
        check("head_dim", config.head_dim % 2 == 0, "even (rotary positions turn pairs of channels)")
    if sound["kernel_size"]:
        check("kernel_size", config.kernel_size % 2 == 1, "odd")
    for key, low in (("mel_std", 0.0), ("initializer_range", 0.0)):
        value = getattr(config, key)
        check(key, isinstance(value, (int, float)) and value > low, "a number above 0")
    check("mel_mean", isinstance(config.mel_mean, (int, float)), "a number")
    for key in ("semantic_subtraction", "trained"):
        check(key, isinstance(getattr(config, key), bool), "true or false")
    if integers("codebook_sizes", 2):
        check("codebook_sizes", len(config.codebook_sizes) >= 2, "at least one semantic and one acoustic book")

    strides_sound = {"strides": integers("strides", 1), "auxiliary_strides": integers("auxiliary_strides", 1)}
    for key, good in strides_sound.items():
        if good and sound["n_fft"]:
            hop = getattr(config, key)[0]
            check(key, config.n_fft % hop == 0 and config.n_fft >= 2 * hop and (config.n_fft - hop) % 2 == 0,
                  f"led by a hop that divides n_fft={config.n_fft} at least twice and leaves an even rest")  # fmt: skip
    if all(strides_sound.values()) and sound["sampling_rate"] and sound["auxiliary_sampling_rate"]:
        main, auxiliary = math.prod(config.strides), math.prod(config.auxiliary_strides)
        good = main * config.auxiliary_sampling_rate == auxiliary * config.sampling_rate
        check("auxiliary_strides", good, "of the same frame rate as strides (sampling rate / product)")

    for part in ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder"):
        strides_key = "auxiliary_strides" if part == "auxiliary_decoder" else "strides"
        if strides_sound[strides_key]:
            integers(f"{part}_depths", 0, len(getattr(config, strides_key)))
        integer(f"{part}_layers", 0)
        if integer(f"{part}_width", 1) and sound["head_dim"]:
            good = getattr(config, f"{part}_width") % config.head_dim == 0
            check(f"{part}_width", good, f"a multiple of head_dim={config.head_dim}")
    return found


PRESETS: dict[str, dict[str, Any]] = {
    "nano-25hz": {
        "strides": [160, 4],
        "semantic_encoder_depths": [0, 3],
        "acoustic_encoder_depths": [0, 2],
        "decoder_depths": [3, 1],
        "auxiliary_decoder_depths": [2, 1],
        "attention_window": 32,
    },
    "nano-12.5hz": {
        "strides": [160, 4, 2],
        "semantic_encoder_depths": [0, 2, 0],
        "acoustic_encoder_depths": [0, 2, 0],
        "decoder_depths": [3, 1, 0],
        "auxiliary_decoder_depths": [2, 1, 0],
        "attention_window": 16,
    },
    "nano-6.25hz": {
        "strides": [160, 4, 4],
        "semantic_encoder_depths": [0, 2, 0],
        "acoustic_encoder_depths": [0, 2, 0],
        "decoder_depths": [3, 1, 0],
        "auxiliary_decoder_depths": [2, 1, 0],
        "attention_window": 8,
    },
}


def preset_config(name: str, **overrides: Any) -> LMSPTConfig:
    """Returns a preset's configuration, with single fields replaced by `overrides`.

    Raises:
        ValueError: the name is no preset, or an override cannot work.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; presets: {', '.join(sorted(PRESETS))}")
    return LMSPTConfig(**{**PRESETS[name], **overrides})
