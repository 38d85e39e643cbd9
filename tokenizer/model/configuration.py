"""LMSPTConfig: every size of the tokenizer, checked once, and the named presets."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from tokenizer.model.presets import PRESETS

PARTS = ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder")


class LMSPTConfig(PreTrainedConfig):
    """Sizes and switches of an LM-SPT speech tokenizer (arXiv 2506.16738).

    Two encoders read a waveform; the semantic latents go through one codebook, the acoustic ones through a residual
    quantizer; a main decoder reads the sum, a small auxiliary decoder the semantic codes alone. The defaults are our
    CPU-sized `nano` form (log-mel encoders, Vocos decoders); the published model is DAC throughout.

    Args:
        sampling_rate: Hz of the input and of the main decoder's output.
        strides: the encoders' downsampling factors; with a mel encoder the first is the mel hop in samples. Their
            product is the samples per code.
        encoder_architecture: `mel` (log-mel, ConvNeXt, local attention) or `dac` (convolutions on the waveform).
        decoder_architecture, auxiliary_decoder_architecture: `vocos` (inverse STFT) or `dac` (transposed convolutions).
        shared_encoder: one encoder gives both latents, instead of two (published `use_shared_encoder`).
        auxiliary_decoder: `decoupled` (a module of its own, as published) or `shared` (the main decoder makes the
            resynthesis too; an ablation of the paper, section 4).
        n_fft: window of the mel front end and of the inverse STFT heads, in samples (per head at that decoder's rate).
        n_mels: mel bands of the front end.
        mel_mean, mel_std: fixed affine normalisation of the natural-log mel (never a statistic of the utterance).
        latent_dim: channels D of the latents.
        codebook_sizes: entries per book, book 0 (semantic) first. Published: 16384 and 7 x 4096.
        codebook_dim: dimension of the factorized look-up (published: 8).
        semantic_codebook_dim: the same for book 0; None means `codebook_dim`.
        semantic_subtraction: what the acoustic books quantize. `attached`: acoustic latents minus quantized semantic
            ones, as published; `detached`: the same without a gradient through the subtrahend; `none`: the latents
            themselves. Checkpoints of old say true or false: `attached` or `none`.
        semantic_quantizer: `vq` (published) or `fsq`, finite scalar quantization of book 0.
        fsq_levels: levels per dimension with `fsq`; their product is book 0's size.
        semantic_encoder_*, acoustic_encoder_*, decoder_*, auxiliary_decoder_*: `width` in channels (a DAC encoder
            doubles it at each stride, a DAC decoder halves it); `depths`, the ConvNeXt blocks at each resolution in the
            order of the strides (empty for DAC, which has three residual units per stride); `layers`, the
            local-attention layers at the frame rate (in a DAC part, of width `latent_dim`).
        decoder_strides: the main decoder's factors in the order of `strides`, the first nearest the waveform; None
            means `strides`.
        auxiliary_sampling_rate: Hz of the auxiliary decoder's output (published: 16000).
        auxiliary_strides: the auxiliary decoder's factors; None means `decoder_strides`.
        attention_window: frames that attention sees on each side.
        head_dim: channels of one attention head.
        kernel_size: taps of the depthwise convolutions (odd).
        expansion: width of the feed-forward layers relative to the block.
        causal: convolutions, attention and STFT framing read nothing of the future.
        exact_lengths: F = ceil(S / hop) and decodes of F * hop samples, the protocol's rule. False keeps the published
            lengths: no padding of the input, and decodes that odd strides leave a few samples short.
        weight_norm: DAC parts and the projections of a DAC family's books carry weight norm (as published); False once
            `fold_weight_norm` has folded it.
        initialization: how random weights are drawn. `truncated`: truncated normal of `initializer_range`, biases 0,
            and books whose projections are orthonormal; `torch`: PyTorch's default of each layer, as published.
        initializer_range: standard deviation of the initial weights (`truncated`).
        trained: False for random weights; the training recipe sets it, and it is saved.

    Raises:
        ValueError: naming every key whose value cannot work.
    """

    model_type = "lmspt"

    sampling_rate: int = 16_000
    strides: list[int] | None = None
    encoder_architecture: str = "mel"
    decoder_architecture: str = "vocos"
    auxiliary_decoder_architecture: str = "vocos"
    shared_encoder: bool = False
    auxiliary_decoder: str = "decoupled"
    n_fft: int = 640
    n_mels: int = 80
    mel_mean: float = -6.5
    mel_std: float = 2.3
    latent_dim: int = 256
    codebook_sizes: list[int] | None = None
    codebook_dim: int = 8
    semantic_codebook_dim: int | None = None
    semantic_subtraction: str | bool = "attached"
    semantic_quantizer: str = "vq"
    fsq_levels: list[int] | None = None
    semantic_encoder_width: int = 256
    semantic_encoder_depths: list[int] | None = None
    semantic_encoder_layers: int = 2
    acoustic_encoder_width: int = 192
    acoustic_encoder_depths: list[int] | None = None
    acoustic_encoder_layers: int = 1
    decoder_width: int = 256
    decoder_strides: list[int] | None = None
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
    causal: bool = False
    exact_lengths: bool = True
    weight_norm: bool = True
    initialization: str = "truncated"
    initializer_range: float = 0.02
    trained: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.strides = [160, 4, 2] if self.strides is None else _as_list(self.strides)
        self.decoder_strides = _as_list(self.strides if self.decoder_strides is None else self.decoder_strides)
        self.auxiliary_strides = _as_list(
            self.decoder_strides if self.auxiliary_strides is None else self.auxiliary_strides
        )
        self.codebook_sizes = [1024] * 8 if self.codebook_sizes is None else _as_list(self.codebook_sizes)
        self.fsq_levels = _as_list(self.fsq_levels)
        if self.semantic_codebook_dim is None:
            self.semantic_codebook_dim = self.codebook_dim
        if isinstance(self.semantic_subtraction, bool):
            self.semantic_subtraction = "attached" if self.semantic_subtraction else "none"
        for part in PARTS:
            depths = getattr(self, f"{part}_depths")
            setattr(self, f"{part}_depths", self._usual_depths(part) if depths is None else _as_list(depths))
        found = _problems(self)
        if found:
            raise ValueError("LMSPTConfig: " + "; ".join(found))
        super().__post_init__(**kwargs)

    def _usual_depths(self, part: str) -> list[int]:
        kind = "encoder" if part.endswith("_encoder") else part
        if getattr(self, f"{kind}_architecture") == "dac":
            return []
        strides = getattr(self, {"encoder": "strides", "decoder": "decoder_strides"}.get(kind, "auxiliary_strides"))
        return [1] * (len(strides) if isinstance(strides, list) else 1)

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

    @property
    def codebook_dims(self) -> list[int]:
        """Dimension of each book's factorized look-up, K of them."""
        return [self.semantic_codebook_dim] + [self.codebook_dim] * (self.num_codebooks - 1)

    def identity(self, sound: bool = True) -> dict[str, Any]:
        """What of the configuration decides the codes and, with `sound`, what is made of them: for fingerprints.

        Keys that came later are left out at their defaults, so that a checkpoint's fingerprint stays what it was.
        """
        fields = set(LMSPTConfig.__annotations__) - {"model_type", "trained", "initialization", "initializer_range"}
        values = {key: getattr(self, key) for key in fields}
        later = _LATER | {"decoder_strides": self.strides, "semantic_codebook_dim": self.codebook_dim}
        values = {key: value for key, value in values.items() if key not in later or value != later[key]}
        if self.semantic_subtraction in ("attached", "none"):
            values["semantic_subtraction"] = self.semantic_subtraction == "attached"
        if not sound:
            values = {key: value for key, value in values.items() if not key.startswith(("decoder_", "auxiliary_"))}
        return values


# Fields that the first checkpoints did not have, with the value that means what those did.
_LATER: dict[str, Any] = {
    "encoder_architecture": "mel",
    "decoder_architecture": "vocos",
    "auxiliary_decoder_architecture": "vocos",
    "shared_encoder": False,
    "auxiliary_decoder": "decoupled",
    "semantic_quantizer": "vq",
    "fsq_levels": None,
    "causal": False,
    "exact_lengths": True,
    "weight_norm": True,
}


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def preset_config(name: str, **overrides: Any) -> LMSPTConfig:
    """Returns a preset's configuration, with single fields replaced by `overrides`.

    Raises:
        ValueError: the name is no preset, or an override cannot work.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; presets: {', '.join(sorted(PRESETS))}")
    return LMSPTConfig(**{**PRESETS[name], **overrides})


_CHOICES = {
    "encoder_architecture": ("mel", "dac"),
    "decoder_architecture": ("vocos", "dac"),
    "auxiliary_decoder_architecture": ("vocos", "dac"),
    "auxiliary_decoder": ("decoupled", "shared"),
    "semantic_subtraction": ("attached", "detached", "none"),
    "semantic_quantizer": ("vq", "fsq"),
    "initialization": ("truncated", "torch"),
}
_FLAGS = ("trained", "shared_encoder", "causal", "exact_lengths", "weight_norm")
_POSITIVE = (
    "sampling_rate", "auxiliary_sampling_rate", "n_fft", "n_mels", "latent_dim", "codebook_dim",
    "semantic_codebook_dim", "attention_window", "head_dim", "kernel_size", "expansion",
)  # fmt: skip


def _is_int(value: Any) -> bool:
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
        return self.check(key, _is_int(value) and value >= lowest, f"an integer of at least {lowest}")

    def integers(self, key: str, lowest: int, length: int | None = None) -> bool:
        value = getattr(self.config, key)
        good = isinstance(value, list) and bool(value) and all(_is_int(v) and v >= lowest for v in value)
        if not self.check(key, good, f"a non-empty list of integers of at least {lowest}"):
            return False
        return length is None or self.check(key, len(value) == length, f"a list of {length} integers, one per stride")

    def number(self, key: str, above: float | None = None) -> None:
        value = getattr(self.config, key)
        good = isinstance(value, (int, float)) and (above is None or value > above)
        self.check(key, good, "a number" if above is None else f"a number above {above:g}")


def _problems(config: LMSPTConfig) -> list[str]:
    """Returns one sentence for each key that cannot work, each starting with the key."""
    checks = _Checks(config)
    sound = {key: checks.integer(key, 1) for key in _POSITIVE}
    for key, allowed in _CHOICES.items():
        value = getattr(config, key)
        sound[key] = checks.check(key, isinstance(value, str) and value in allowed, f"one of {', '.join(allowed)}")
    for key in _FLAGS:
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
            continue  # the message about strides says it already
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
