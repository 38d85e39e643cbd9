"""The decoder: quantized latents -> waveform, through an inverse STFT.

Shapes: B items, F code frames, D latent channels, C width, T spectral frames, S samples.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from tokenizer.model.configuration import LMSPTConfig
from tokenizer.model.layers import (
    AttentionLayer,
    CheckpointedModule,
    ConvNeXtBlock,
    FrameConv,
    StreamCache,
    Upsample,
    apply_mask,
    stretch_mask,
)
from tokenizer.model.spectral import ISTFTHead


class Decoder(CheckpointedModule):
    """Vocos-like decoder: local attention at the frame rate, upsampling rungs of ConvNeXt blocks, iSTFT head.

    The same class, much smaller, is the auxiliary decoder of semantic speech-resynthesis distillation
    (arXiv 2506.16738: a 1-layer Vocos, because a large one takes the burden off the semantic codes).
    """

    def __init__(self, config: LMSPTConfig, part: str) -> None:
        super().__init__()
        width = getattr(config, f"{part}_width")
        depths = getattr(config, f"{part}_depths")
        layers = getattr(config, f"{part}_layers")
        strides = config.auxiliary_strides if part == "auxiliary_decoder" else config.decoder_strides
        self.strides = strides[1:]
        causal = config.causal
        self.stem = FrameConv(config.latent_dim, width, kernel=3, causal=causal)
        self.stem_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            AttentionLayer(width, config.head_dim, config.attention_window, config.expansion, causal)
            for _ in range(layers)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                ConvNeXtBlock(width, config.kernel_size, config.expansion, 1 / sum(depths), causal)
                for _ in range(depth)
            )
            for depth in depths
        )
        self.up_norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.strides)
        self.ups = nn.ModuleList(Upsample(width, width, stride) for stride in self.strides)
        self.norm = nn.LayerNorm(width)
        self.head = ISTFTHead(width, config.n_fft, strides[0])

    @property
    def lookahead(self) -> int:
        """Samples that a stream holds back until the next frame."""
        return self.head.lookahead

    def forward(self, quantized: Tensor, mask: Tensor | None, cache: StreamCache | None = None) -> Tensor:
        """Decodes.

        Args:
            quantized: (B, F, D).
            mask: (B, F) bool, or None where every frame is valid.
            cache: of a stream whose next frames these are (causal decoders only).

        Returns:
            Samples (B, F * hop) in fp32, zero past the mask; with a cache those that are final, `lookahead` late.
        """
        x = apply_mask(self.stem_norm(self.stem(apply_mask(quantized, mask), cache)), mask)
        for layer in self.layers:
            x = self.run(layer, x, mask, cache)
        stage_mask = mask
        for index in reversed(range(len(self.blocks))):
            for block in self.blocks[index]:
                x = self.run(block, x, stage_mask, cache)
            if index:
                stage_mask = stretch_mask(stage_mask, self.strides[index - 1])
                x = apply_mask(self.ups[index - 1](self.up_norms[index - 1](x)), stage_mask)
        return self.head(apply_mask(self.norm(x), stage_mask), stage_mask, cache)


def decoder_receptive_field(config: LMSPTConfig, part: str) -> int:
    """Frames on each side beyond which a change of a code cannot reach a frame's samples (an upper bound).

    `part` is `decoder` or `auxiliary_decoder`. Sums, in samples at that decoder's rate: the stem, the attention
    windows, the convolutions at each resolution, the inverse STFT's windows (upsampling leaks nothing). A causal
    decoder reaches twice as far back through its convolutions; ahead, only through the inverse STFT.
    """
    strides = config.auxiliary_strides if part == "auxiliary_decoder" else config.decoder_strides
    sides = 2 if config.causal else 1
    hop = math.prod(strides)
    reach = hop * (sides + getattr(config, f"{part}_layers") * config.attention_window) + config.n_fft
    step = 1
    for stride, depth in zip(strides, getattr(config, f"{part}_depths"), strict=True):
        step *= stride
        reach += sides * depth * (config.kernel_size // 2) * step
    return -(-reach // hop)
