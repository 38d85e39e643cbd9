"""The checks of LMSPTConfig: one sentence for each key that cannot work, each starting with the key."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizer.model.configuration import LMSPTConfig

CHOICES = {
    "encoder_architecture": ("mel", "dac"),
    "decoder_architecture": ("vocos", "dac"),
    "auxiliary_decoder_architecture": ("vocos", "dac"),
    "auxiliary_decoder": ("decoupled", "shared"),
    "semantic_subtraction": ("attached", "detached", "none"),
    "semantic_quantizer": ("vq", "fsq"),
    "initialization": ("truncated", "torch"),
}
FLAGS = ("trained", "shared_encoder", "causal", "exact_lengths", "weight_norm")
POSITIVE = (
    "sampling_rate", "auxiliary_sampling_rate", "n_fft", "n_mels", "latent_dim", "codebook_dim",
    "semantic_codebook_dim", "attention_window", "head_dim", "kernel_size", "expansion",
)  # fmt: skip


def is_int(value: Any) -> bool:
    """Whether the value is an integer, and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


class _Checks:
    """Collects one sentence per key of a configuration that cannot work."""

    def __init__(self, config: LMSPTConfig) -> None:
        self.config, self.found = config, []

    def check(self, key: str, good: bool, must: str) -> bool:
        if not good:
            self.found.append(f"{key} must be {must}, not {getattr(self.config, key)!r}")
        return good

    def integer(self, key: str, lowest: int) -> bool:
        value = getattr(self.config, key)
        return self.check(key, is_int(value) and value >= lowest, f"an integer of at least {lowest}")

    def integers(self, key: str, lowest: int, length: int | None = None) -> bool:
        value = getattr(self.config, key)
        good = isinstance(value, list) and bool(value) and all(is_int(v) and v >= lowest for v in value)
        if not self.check(key, good, f"a non-empty list of integers of at least {lowest}"):
            return False
        return length is None or self.check(key, len(value) == length, f"a list of {length} integers, one per stride")

    def number(self, key: str, above: float | None = None) -> None:
        value = getattr(self.config, key)
        good = isinstance(value, (int, float)) and (above is None or value > above)
        self.check(key, good, "a number" if above is None else f"a number above {above:g}")


def problems(config: LMSPTConfig) -> list[str]:
    """Returns one sentence for each key that cannot work, each starting with the key."""
    checks = _Checks(config)
    sound = {key: checks.integer(key, 1) for key in POSITIVE}
    for key, allowed in CHOICES.items():
        value = getattr(config, key)
        sound[key] = checks.check(key, isinstance(value, str) and value in allowed, f"one of {', '.join(allowed)}")
    for key in FLAGS:
        checks.check(key, isinstance(getattr(config, key), bool), "true or false")
    if sound["head_dim"]:
        checks.check("head_dim", config.head_dim % 2 == 0, "even (rotary positions turn pairs of channels)")
    if sound["kernel_size"]:
        checks.check("kernel_size", config.kernel_size % 2 == 1, "odd")
    checks.number("mel_std", above=0.0)
    checks.number("initializer_range", above=0.0)
    checks.number("mel_mean")
    _check_books(checks, sound)
    _check_strides(checks, sound)
    _check_parts(checks, sound)
    if sound["encoder_architecture"] and config.encoder_architecture != "dac":
        checks.check("exact_lengths", config.exact_lengths is not False, "true with a mel encoder, which needs padding")
    return checks.found


def _check_books(checks: _Checks, sound: dict[str, bool]) -> None:
    config = checks.config
    sizes_sound = checks.integers("codebook_sizes", 2)
    if sizes_sound:
        checks.check("codebook_sizes", len(config.codebook_sizes) >= 2, "at least one semantic and one acoustic book")
    if not sound["semantic_quantizer"]:
        return
    if config.semantic_quantizer == "vq":
        checks.check("fsq_levels", config.fsq_levels is None, "left out unless semantic_quantizer is fsq")
    elif checks.integers("fsq_levels", 2) and sizes_sound:
        entries = math.prod(config.fsq_levels)
        good = config.codebook_sizes[0] == entries
        checks.check("codebook_sizes", good, f"led by the product of fsq_levels, {entries}")


def _check_strides(checks: _Checks, sound: dict[str, bool]) -> None:
    config = checks.config
    architectures = {
        "strides": config.encoder_architecture,
        "decoder_strides": config.decoder_architecture,
        "auxiliary_strides": config.auxiliary_decoder_architecture,
    }
    users = {key: architecture in ("mel", "vocos") for key, architecture in architectures.items()}
    for key, spectral in users.items():
        lowest = 1 if architectures[key] in ("mel", "vocos") else 2  # a DAC convolution of stride 1 changes the length
        sound[key] = checks.integers(key, lowest)
        if key != "strides" and getattr(config, key) == config.strides and users["strides"]:
            continue  # told once
        if sound[key] and sound["n_fft"] and spectral:
            hop = getattr(config, key)[0]
            good = config.n_fft % hop == 0 and config.n_fft >= 2 * hop and (config.n_fft - hop) % 2 == 0
            checks.check(
                key, good, f"led by a hop that divides n_fft={config.n_fft} at least twice and leaves an even rest"
            )
    if sound["strides"] and sound["decoder_strides"]:
        hop = math.prod(config.strides)
        checks.check("decoder_strides", math.prod(config.decoder_strides) == hop, f"of the product of strides, {hop}")
    if not all(sound[key] for key in ("strides", "auxiliary_strides", "sampling_rate", "auxiliary_sampling_rate")):
        return
    main, auxiliary = math.prod(config.strides), math.prod(config.auxiliary_strides)
    good = main * config.auxiliary_sampling_rate == auxiliary * config.sampling_rate
    good = checks.check("auxiliary_strides", good, "of the same frame rate as strides (sampling rate / product)")
    if good and config.auxiliary_decoder == "shared":
        checks.check(
            "auxiliary_sampling_rate", config.auxiliary_sampling_rate == config.sampling_rate,
            f"the main decoder's {config.sampling_rate} where auxiliary_decoder is shared",
        )  # fmt: skip


def _check_parts(checks: _Checks, sound: dict[str, bool]) -> None:
    config = checks.config
    parts = {
        "semantic_encoder": ("strides", config.encoder_architecture),
        "acoustic_encoder": ("strides", config.encoder_architecture),
        "decoder": ("decoder_strides", config.decoder_architecture),
        "auxiliary_decoder": ("auxiliary_strides", config.auxiliary_decoder_architecture),
    }
    for part, (strides_key, architecture) in parts.items():
        layers_sound = checks.integer(f"{part}_layers", 0)
        width_sound = checks.integer(f"{part}_width", 1)
        if architecture == "dac":
            must = "left out: a DAC block has three residual units per stride"
            checks.check(f"{part}_depths", getattr(config, f"{part}_depths") == [], must)
            if part.endswith("decoder") and width_sound and sound[strides_key]:
                halvings = 2 ** len(getattr(config, strides_key))
                good = getattr(config, f"{part}_width") % halvings == 0
                checks.check(f"{part}_width", good, f"a multiple of {halvings}: it is halved at each stride")
            if layers_sound and getattr(config, f"{part}_layers") and sound["latent_dim"] and sound["head_dim"]:
                good = config.latent_dim % config.head_dim == 0
                checks.check("latent_dim", good, f"a multiple of head_dim={config.head_dim} for {part}_layers")
            continue
        if sound[strides_key]:
            checks.integers(f"{part}_depths", 0, len(getattr(config, strides_key)))
        if width_sound and sound["head_dim"]:
            good = getattr(config, f"{part}_width") % config.head_dim == 0
            checks.check(f"{part}_width", good, f"a multiple of head_dim={config.head_dim}")
