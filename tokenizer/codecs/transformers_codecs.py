"""transformers' Mimi, DAC, EnCodec and X-Codec behind the codec protocol.

Shapes: G items of one length, K books, k <= K of them, F code frames; see `Codec`.
"""

from __future__ import annotations

from torch import Tensor, nn

from tokenizer.codecs.base import Codec
from tokenizer.codecs.registry import register_codec
from tokenizer.protocol import CodecConfig


class MimiCodec(Codec):
    """Mimi (Moshi, arXiv 2410.00037): book 0 distilled from WavLM by pooled features, the rest a residual quantizer."""

    decode_paths = ("reconstruction", "semantic_reconstruction")

    def __init__(self, model: nn.Module, num_codebooks: int | None = None) -> None:
        own = model.config
        sizes = [own.codebook_size] * own.num_quantizers
        super().__init__(model, CodecConfig("mimi", own.sampling_rate, own.frame_size, sizes), num_codebooks)

    def encode_frames(self, samples: Tensor) -> Tensor:
        return self.model.encode(samples, num_quantizers=self.config.num_codebooks).audio_codes

    def decode_frames(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes).audio_values


class DacCodec(Codec):
    """DAC (arXiv 2306.06546): a residual quantizer of acoustic books. transformers rounds its frame rate up."""

    def __init__(self, model: nn.Module, num_codebooks: int | None = None) -> None:
        own = model.config
        sizes = [own.codebook_size] * own.n_codebooks
        super().__init__(model, CodecConfig("dac", own.sampling_rate, own.hop_length, sizes), num_codebooks)

    def encode_frames(self, samples: Tensor) -> Tensor:
        return self.model.encode(samples, n_quantizers=self.config.num_codebooks).audio_codes

    def decode_frames(self, codes: Tensor) -> Tensor:
        return self.model.decode(audio_codes=codes).audio_values


class EncodecCodec(Codec):
    """EnCodec (arXiv 2210.13438), mono and unscaled: the scales of the 48 kHz model are not in its codes."""

    def __init__(self, model: nn.Module, num_codebooks: int | None = None) -> None:
        own = model.config
        if own.audio_channels != 1 or own.normalize or own.chunk_length_s is not None:
            raise ValueError("this EnCodec is stereo, normalised or chunked; take a mono one, facebook/encodec_24khz")
        sizes = [own.codebook_size] * own.num_quantizers
        super().__init__(model, CodecConfig("encodec", own.sampling_rate, own.hop_length, sizes), num_codebooks)

    def encode_frames(self, samples: Tensor) -> Tensor:
        return self.model.encode(samples, bandwidth=self.model.config.target_bandwidths[-1]).audio_codes[0]

    def decode_frames(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes[None], [None]).audio_values


class XCodec(Codec):
    """X-Codec (arXiv 2408.17175): HuBERT's features join the latents before the residual quantizer, so that book 0
    holds words too. transformers calls its rate `sample_rate`."""

    decode_paths = ("reconstruction", "semantic_reconstruction")

    def __init__(self, model: nn.Module, num_codebooks: int | None = None) -> None:
        own = model.config
        sizes = [own.codebook_size] * own.num_quantizers
        super().__init__(model, CodecConfig("xcodec", own.sample_rate, own.hop_length, sizes), num_codebooks)

    def encode_frames(self, samples: Tensor) -> Tensor:
        return self.model.encode(samples).audio_codes

    def decode_frames(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes).audio_values


register_codec("mimi", MimiCodec)
register_codec("dac", DacCodec)
register_codec("encodec", EncodecCodec)
register_codec("xcodec", XCodec)
