"""The encoder: log-mel frames -> latents at the frame rate.

Shapes: B items, T mel frames, M mel bands, C width, F code frames, D latent channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from tokenizer.model.configuration import LMSPTConfig
from tokenizer.model.layers import (
    AttentionLayer,
    CheckpointedModule,
    ConvNeXtBlock,
    FrameConv,
    StreamCache,
    apply_mask,
    stretch_mask,
)


class Encoder(CheckpointedModule):
    """Stem, ConvNeXt blocks and strided convolutions down to the frame rate, local attention, norm.

    LM-SPT has two of them on the same waveform (arXiv 2506.16738): one for each of `semantic` and `acoustic`.
    """

    def __init__(self, config: LMSPTConfig, part: str) -> None:
        super().__init__()
        width = getattr(config, f"{part}_encoder_width")
        depths = getattr(config, f"{part}_encoder_depths")
        layers = getattr(config, f"{part}_encoder_layers")
        self.strides = config.strides[1:]
        causal = config.causal
        self.stem = FrameConv(config.n_mels, width, kernel=3, causal=causal)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                ConvNeXtBlock(width, config.kernel_size, config.expansion, 1 / sum(depths), causal)
                for _ in range(depth)
            )
            for depth in depths
        )
        self.down_norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.strides)
        self.downs = nn.ModuleList(FrameConv(width, width, 2 * stride, stride, causal) for stride in self.strides)
        self.layers = nn.ModuleList(
            AttentionLayer(width, config.head_dim, config.attention_window, config.expansion, causal)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, config.latent_dim)
        self.out_norm = nn.LayerNorm(config.latent_dim)

    def forward(self, mel: Tensor, mask: Tensor | None, cache: StreamCache | None = None) -> Tensor:
        """Encodes.

        Args:
            mel: (B, T, M), T a multiple of the product of the strides after the mel hop.
            mask: (B, F) bool at the frame rate, or None where every frame is valid.
            cache: of a stream whose next frames these are (causal encoders only).

        Returns:
            Latents (B, F, D), zero past the mask.
        """
        ratio = 1
        for stride in self.strides:
            ratio *= stride
        stage_mask = stretch_mask(mask, ratio)
        x = apply_mask(nn.functional.gelu(self.stem(apply_mask(mel, stage_mask), cache)), stage_mask)
        for index, blocks in enumerate(self.blocks):
            if index:
                stage_mask = stretch_mask(mask, ratio := ratio // self.strides[index - 1])
                x = apply_mask(self.down_norms[index - 1](x), stretch_mask(stage_mask, self.strides[index - 1]))
                x = apply_mask(self.downs[index - 1](x, cache), stage_mask)
            for block in blocks:
                x = self.run(block, x, stage_mask, cache)
        for layer in self.layers:
            x = self.run(layer, x, mask, cache)
        latents = self.out(self.norm(x)).to(self.out.weight.dtype)
        return apply_mask(self.out_norm(latents), mask)


def receptive_field(config: LMSPTConfig, part: str) -> int:
    """Frames on each side beyond which a change of the input cannot reach a latent (an upper bound).

    Sums, in samples: half the mel window, the convolutions' reach at each resolution, the attention windows. A causal
    encoder reaches twice as far back through its convolutions, and not ahead at all.
    """
    sides = 2 if config.causal else 1
    reach, step = config.n_fft, config.strides[0]
    reach += sides * step  # the stem's 3 taps
    for index, depth in enumerate(getattr(config, f"{part}_encoder_depths")):
        if index:
            reach += step * config.strides[index]
            step *= config.strides[index]
        reach += sides * depth * (config.kernel_size // 2) * step
    reach += getattr(config, f"{part}_encoder_layers") * config.attention_window * step
    return -(-reach // config.hop_length)
