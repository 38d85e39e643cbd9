"""Streaming with causal tokenizers: samples in, codes out as soon as they are final, and the other way round.

Shapes: B streams side by side, s samples of one push, K books (k of them given), f code frames of one push.

Each causal layer keeps the last positions that later outputs still read (`StreamCache`): its convolution's taps, W
keys and values of attention, the inverse STFT's overlap. A push costs what its own frames cost, whatever came before,
and the stream equals the same call on the whole (codes, and waveforms to 1e-4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.model.layers import StreamCache
from tokenizer.model.modeling import LMSPTModel
from tokenizer.precision import exact_fp32


def algorithmic_latency_s(tokenizer: LMSPTModel, resynthesis: bool = False) -> float:
    """Seconds from a sample to its reconstruction, computing time not counted, at most.

    The encoder waits for a whole frame; the decoder holds back the part of a frame that the inverse STFT's next window
    still adds to.
    """
    return (
        StreamingEncoder(tokenizer).algorithmic_latency_s
        + StreamingDecoder(tokenizer, resynthesis).algorithmic_latency_s
    )


def _check_streams(tokenizer: LMSPTModel) -> None:
    config = tokenizer.config
    if not getattr(config, "causal", False):
        raise ValueError(
            "this tokenizer reads the future (causal: false) and cannot stream: train one from a causal preset, such "
            "as nano-12.5hz-causal, or cut long audio with encode_long and decode_long"
        )
    if not config.exact_lengths:
        raise ValueError("exact_lengths: false keeps lengths that a stream cannot know; set it to true for streaming")


class StreamingEncoder:
    """Turns a stream of samples into codes: `push` blocks of any size, `flush` at the end.

    Args:
        tokenizer: a causal LM-SPT tokenizer in eval mode.

    Raises:
        ValueError: the tokenizer is not causal, or keeps the published lengths (`exact_lengths` false).
    """

    def __init__(self, tokenizer: LMSPTModel) -> None:
        _check_streams(tokenizer)
        self.tokenizer = tokenizer
        self.reset()

    @property
    def algorithmic_latency_s(self) -> float:
        """Seconds that a sample waits for its code at most: one frame."""
        return 1 / self.tokenizer.config.frame_rate

    def reset(self) -> None:
        """Forgets the stream, for another one."""
        self._cache = StreamCache()
        self._pending: Tensor | None = None

    @torch.inference_mode()
    @exact_fp32()
    def push(self, samples: Tensor) -> Tensor:
        """Takes the next samples (B, 1, s), s of any size; returns codes (B, K, f) of the frames that they complete.

        Raises:
            ValueError: a wrong shape, or another number of streams than before.
        """
        if samples.ndim != 3 or samples.shape[1] != 1 or not len(samples):
            raise ValueError(f"samples must be of shape (B, 1, s), not {tuple(samples.shape)}")
        if self._pending is not None:
            if len(samples) != len(self._pending):
                raise ValueError(f"{len(samples)} streams pushed, {len(self._pending)} before: flush or reset first")
            samples = torch.cat([self._pending, samples], dim=-1)
        config = self.tokenizer.config
        n_samples = samples.shape[-1] // config.hop_length * config.hop_length
        self._pending = samples[..., n_samples:]
        if not n_samples:
            return torch.empty(len(samples), config.num_codebooks, 0, dtype=torch.int64, device=samples.device)
        semantic, acoustic = self.tokenizer._latents(samples[:, 0, :n_samples], None, self._cache)
        return self.tokenizer.quantizer(semantic, acoustic, None).codes

    def flush(self) -> Tensor:
        """Ends the stream: the last samples, filled with silence to a whole frame, give the last codes (B, K, 0 or 1).

        Raises:
            ValueError: nothing was pushed.
        """
        if self._pending is None:
            raise ValueError("nothing was pushed, so there is no stream to end")
        missing = -self._pending.shape[-1] % self.tokenizer.config.hop_length
        codes = self.push(self._pending.new_zeros(len(self._pending), 1, missing))
        self.reset()
        return codes


class StreamingDecoder:
    """Turns a stream of codes into samples: `push` frames, `flush` at the end.

    Args:
        tokenizer: a causal LM-SPT tokenizer in eval mode.
        resynthesis: play book 0 with the auxiliary decoder, as `resynthesize` does, in place of the main one.

    Raises:
        ValueError: the tokenizer is not causal, or keeps the published lengths (`exact_lengths` false).
    """

    def __init__(self, tokenizer: LMSPTModel, resynthesis: bool = False) -> None:
        _check_streams(tokenizer)
        self.tokenizer, self.resynthesis = tokenizer, resynthesis
        self.decoder = tokenizer.resynthesizer if resynthesis else tokenizer.decoder
        self.reset()

    @property
    def sampling_rate(self) -> int:
        """Hz of the samples that come out."""
        config = self.tokenizer.config
        return config.auxiliary_sampling_rate if self.resynthesis else config.sampling_rate

    @property
    def algorithmic_latency_s(self) -> float:
        """Seconds of a frame's end that wait for the next frame (inverse STFT; 0 for a DAC decoder)."""
        return self.decoder.lookahead / self.sampling_rate

    def reset(self) -> None:
        """Forgets the stream, for another one."""
        self._cache = StreamCache()
        self._batch: int | None = None
        self._ahead = self.decoder.lookahead  # samples in front of the stream's first, still to be dropped

    @torch.inference_mode()
    @exact_fp32()
    def push(self, audio_codes: Tensor) -> Tensor:
        """Takes the next codes (B, k, f), none of them -1; returns the samples (B, 1, s) that are final now.

        No codes (f = 0), as the encoder gives for less than a frame, give no samples.

        Raises:
            ValueError: codes that `decode` would refuse, -1 among them, or another number of streams than before.
        """
        empty = audio_codes.ndim == 3 and len(audio_codes) > 0 and audio_codes.shape[-1] == 0
        if not empty and self.tokenizer._check_codes(audio_codes) is not None:
            raise ValueError("a stream's codes hold no -1: stop pushing where a stream ends")
        if self._batch not in (None, len(audio_codes)):
            raise ValueError(f"{len(audio_codes)} streams pushed, {self._batch} before: flush or reset first")
        self._batch = len(audio_codes)
        if empty:
            return torch.zeros(self._batch, 1, 0, device=audio_codes.device)
        codes = audio_codes[:, :1] if self.resynthesis else audio_codes
        quantized = self.tokenizer.quantizer.look_up(codes, None)
        return self._wanted(self.decoder(quantized, None, self._cache))

    @torch.inference_mode()
    def flush(self) -> Tensor:
        """Ends the stream: the samples (B, 1, s) that no further frame will change.

        Raises:
            ValueError: nothing was pushed.
        """
        if self._batch is None:
            raise ValueError("nothing was pushed, so there is no stream to end")
        if not self.decoder.lookahead or not self._cache:  # nothing held back, or no frame came
            rest = torch.zeros(self._batch, 1, 0, device=self.tokenizer.device)
        else:
            rest = self._wanted(self.decoder.head.rest(self._cache))
        self.reset()
        return rest

    def _wanted(self, samples: Tensor) -> Tensor:
        drop = min(self._ahead, samples.shape[-1])
        self._ahead -= drop
        return samples[:, None, drop:]
