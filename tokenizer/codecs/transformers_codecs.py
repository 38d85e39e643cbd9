"""transformers' Mimi, DAC, EnCodec, X-Codec and X-Codec 2 behind the codec protocol.

Shapes: G items of one length, K books, k <= K of them, F code frames; see `Codec`.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import SeamlessM4TFeatureExtractor

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


class XCodec2(Codec):
    """X-Codec 2 (arXiv 2502.04128): one book of finite scalars, of acoustic latents that Wav2Vec2-BERT's features join.

    The features are those of Wav2Vec2-BERT's own extractor on audio with half a hop of zeros at both ends, as in the
    authors' code; transformers' extractor for this model computes the same by torchaudio. The authors append a whole
    frame of zeros to audio that fills its last frame, and its code; here F = ceil(S / hop), as everywhere.
    """

    def __init__(self, model: nn.Module, num_codebooks: int | None = None) -> None:
        own = model.config
        self._features = SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, sampling_rate=16_000, stride=2)
        if (own.sampling_rate, own.hop_length) != (16_000, 320):
            raise ValueError(
                f"this X-Codec 2 has {own.hop_length} samples of {own.sampling_rate} Hz to a frame; its semantic "
                "encoder's frames have 320 of 16000 Hz, and both must be the same"
            )
        config = CodecConfig("xcodec2", own.sampling_rate, own.hop_length, [math.prod(own.quantization_levels)])
        super().__init__(model, config, num_codebooks)

    def encode_frames(self, samples: Tensor) -> Tensor:
        half = self.config.hop_length // 2
        padded = [pad(one, (half, half)).cpu().numpy() for one in samples[:, 0]]
        features = self._features(padded, sampling_rate=16_000, return_tensors="pt")["input_features"].to(samples)
        return self.model.encode(samples, features).audio_codes

    def decode_frames(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes).audio_values


register_codec("mimi", MimiCodec)
register_codec("dac", DacCodec)
register_codec("encodec", EncodecCodec)
register_codec("xcodec", XCodec)
register_codec("xcodec2", XCodec2)
