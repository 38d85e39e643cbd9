"""Codes that come bit by bit, to sound: a frame is played when all frames that its samples depend on are there.

For tokenizers whose decoder reads the future but not all of it; a causal one waits for less (`streaming.py`).

Shapes: B items, k books, f frames of a block, s samples of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenizer.long_form.chunking import can_chunk


class LookaheadDecoder:
    """Turns a stream of codes into samples: `push` frames, `flush` at the end. Together they are `decode` of the whole.

    Each push decodes its frames with the receptive field on both sides again: push some tenths of a second at a time.

    Args:
        tokenizer: one that states its receptive fields.

    Raises:
        ValueError: it does not, so that any frame may depend on the last.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not can_chunk(tokenizer):
            raise ValueError("this tokenizer states no receptive field: decode its codes when all are there")
        self.tokenizer, self.reach = tokenizer, tokenizer.decoder_receptive_field_frames
        self.reset()

    @property
    def latency_s(self) -> float:
        """Seconds of codes that a frame waits for."""
        return self.reach / self.tokenizer.config.frame_rate

    def reset(self) -> None:
        """Forgets the stream, for another one."""
        self._held: Tensor | None = None  # the frames that are not played, and those before that they depend on
        self._n_played = 0  # of the held

    def push(self, audio_codes: Tensor) -> Tensor:
        """Takes the next codes (B, k, f), none of them -1; returns the samples (B, 1, s) that are certain."""
        held = audio_codes if self._held is None else torch.cat([self._held, audio_codes], dim=-1)
        self._held = held
        return self._play(held.shape[-1] - self.reach)

    def flush(self) -> Tensor:
        """Ends the stream: the samples (B, 1, s) that are left.

        Raises:
            ValueError: nothing was pushed.
        """
        if self._held is None:
            raise ValueError("nothing was pushed, so there is no stream to end")
        samples = self._play(self._held.shape[-1])
        self.reset()
        return samples

    @torch.inference_mode()
    def _play(self, until: int) -> Tensor:
        """The samples of the held frames up to `until` that were not played yet."""
        held, first, hop = self._held, self._n_played, self.tokenizer.config.hop_length
        if until <= first:
            return torch.zeros(len(held), 1, 0, device=held.device)
        samples = self.tokenizer.decode(held).audio_values[..., first * hop :]
        if until < held.shape[-1]:
            samples = samples[..., : (until - first) * hop]
        start = max(0, until - self.reach)
        self._held, self._n_played = held[..., start:], until - start
        return samples
