"""LMSPTConfig: every size of the tokenizer, checked once, and the named presets."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedConfig

from tokenizer.model.configuration_checks import problems
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
        found = problems(self)
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

    def identity(self) -> dict[str, Any]:
        """What of the configuration decides the codes and the sound: the part that a fingerprint covers.

        Keys that came later are left out at their defaults, so that a checkpoint's fingerprint stays what it was.
        """
        fields = set(LMSPTConfig.__annotations__) - {"model_type", "trained", "initialization", "initializer_range"}
        values = {key: getattr(self, key) for key in fields}
        later = _LATER | {"decoder_strides": self.strides, "semantic_codebook_dim": self.codebook_dim}
        values = {key: value for key, value in values.items() if key not in later or value != later[key]}
        if self.semantic_subtraction in ("attached", "none"):
            values["semantic_subtraction"] = self.semantic_subtraction == "attached"
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
