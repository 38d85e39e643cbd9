"""The decoder: quantized latents -> waveform, through an inverse STFT.

Shapes: B items, F code frames, D latent channels, C width, T spectral frames, S samples.
"""

from __future__ import annotations

from torch import Tensor, nn

from .configuration import LMSPTConfig
from .layers import AttentionLayer, ConvNeXtBlock, FrameConv, ISTFTHead, Upsample, apply_mask, stretch_mask


class Decoder(nn.Module):
    """Vocos-like decoder: local attention at the frame rate, upsampling rungs of ConvNeXt blocks, iSTFT head.

    The same class, much smaller, is the auxiliary decoder of semantic speech-resynthesis distillation
    (arXiv 2506.16738: a 1-layer Vocos, because a large one takes the burden off the semantic codes).
    """

    def __init__(self, config: LMSPTConfig, part: str) -> None:
        super().__init__()
        width = getattr(config, f"{part}_width")
        depths = getattr(config, f"{part}_depths")
        layers = getattr(config, f"{part}_layers")
        strides = config.auxiliary_strides if part == "auxiliary_decoder" else config.strides
        self.strides = strides[1:]
        self.stem = FrameConv(config.latent_dim, width, kernel=3)
        self.stem_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            AttentionLayer(width, config.head_dim, config.attention_window, config.expansion) for _ in range(layers)
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                ConvNeXtBlock(width, config.kernel_size, config.expansion, 1 / sum(depths)) for _ in range(depth)
            )
            for depth in depths
        )
        self.up_norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.strides)
        self.ups = nn.ModuleList(Upsample(width, width, stride) for stride in self.strides)
        self.norm = nn.LayerNorm(width)
        self.head = ISTFTHead(width, config.n_fft, strides[0])

    def forward(self, quantized: Tensor, mask: Tensor | None) -> Tensor:
        """Decodes.

        Args:
            quantized: (B, F, D).
            mask: (B, F) bool, or None where every frame is valid.

        Returns:
            Samples (B, F * hop) in fp32, zero past the mask.
        """
        x = apply_mask(self.stem_norm(self.stem(apply_mask(quantized, mask))), mask)
        for layer in self.layers:
            x = layer(x, mask)
        rung = mask
        for index in reversed(range(len(self.blocks))):
            for block in self.blocks[index]:
                x = block(x, rung)
            if index:
                rung = stretch_mask(rung, self.strides[index - 1])
                x = apply_mask(self.ups[index - 1](self.up_norms[index - 1](x)), rung)
        return self.head(apply_mask(self.norm(x), rung), rung)
