"""Joint CTC / attention decoding: a CTC head has its say in the beam search of an attention decoder.

Shapes: B items, R hypotheses (items x beams), L tokens so far, T encoder frames, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

__all__ = ["CTCPrefixScores"]

_NEVER = -1e10  # log of a probability of zero; minus infinity would give NaN in differences


class CTCPrefixScores(LogitsProcessor):
    """Adds the CTC head's view of each next token to the attention decoder's, inside transformers' ``generate``.

    A hypothesis h scores (1 - w) log p_attention(h) + w log p_ctc(h, ...), where p_ctc is the probability that the CTC
    output begins with h or, for a hypothesis that ended, that it is h (Watanabe, Hori, Kim, Hershey and Hayashi, 2017,
    "Hybrid CTC/attention architecture for end-to-end speech recognition", algorithm 2). An attention decoder alone may
    repeat itself or stop early; CTC runs through the audio once, in order.

    The recurrences over frames are linear in the probabilities, so each is one ``logcumsumexp``.

    Args:
        log_probs: of the CTC head (B, T, V), one for each item of the batch; V is the decoder's vocabulary.
        blank: the head's blank.
        eos: the token that ends a hypothesis.
        weight: w above, between 0 (attention alone) and 1.
    """

    def __init__(self, log_probs: Tensor, blank: int, eos: int, weight: float) -> None:
        # Sums over hundreds of frames and differences of them: single precision would lose the small ones.
        self.log_probs, self.blank, self.eos, self.weight = log_probs.double(), blank, eos, weight
        self._ids: Tensor | None = None  # (R, L) at the step before
        self._before: tuple[Tensor, Tensor]  # log p that the text ended before frame t: in any way, in a blank (R, T)
        self._following: Tensor  # log p_ctc of each hypothesis with each token after it (R, V)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Joint log scores (R, V) of the tokens that may follow ``input_ids`` (R, L); ``scores`` are the decoder's."""
        log_p = self.log_probs.repeat_interleave(len(input_ids) // len(self.log_probs), 0)  # (R, T, V)
        if self._ids is None:  # nothing said yet: blanks so far
            blanks = log_p[:, :, self.blank].cumsum(1)
            never = torch.full_like(blanks, _NEVER)
            so_far = blanks.new_zeros(len(input_ids), 1)
            self._look_ahead(log_p, never, blanks, None)
        else:
            parents, last = self._parents(input_ids), input_ids[:, -1:]
            so_far = self._following[parents].gather(1, last)
            self._look_ahead(log_p, *self._extend(log_p, parents, last), last)
        self._ids = input_ids.clone()
        gain = (self._following - so_far).clamp(_NEVER, 0.0)
        return (1 - self.weight) * scores + self.weight * gain.to(scores.dtype)

    def _parents(self, input_ids: Tensor) -> Tensor:
        """Rows (R,) of the step before from which these hypotheses went on: beams change places between steps."""
        beams = len(input_ids) // len(self.log_probs)
        before, now = (ids.unflatten(0, (-1, beams)) for ids in (self._ids, input_ids[:, :-1]))  # (B, beams, L - 1)
        place = (now[:, :, None] == before[:, None]).all(-1).int().argmax(-1)  # (B, beams)
        return (place + beams * torch.arange(len(place), device=place.device)[:, None]).flatten()

    def _extend(self, log_p: Tensor, parents: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """log p of the parents' texts with the token ``last`` (R, 1) added, up to t, ending in it or in a blank."""
        repeats = self._ids[parents, -1:] == last  # a token that repeats the one before needs a blank between
        reached = torch.where(repeats, self._before[1][parents], self._before[0][parents])  # (R, T)
        token = log_p.gather(2, last[:, None].expand(-1, log_p.shape[1], 1))[:, :, 0].cumsum(1)
        ends_in_token = token + torch.logcumsumexp(reached - _later(token, 0.0), 1)
        blank = log_p[:, :, self.blank].cumsum(1)
        ends_in_blank = blank + torch.logcumsumexp(_later(ends_in_token, _NEVER) - _later(blank, 0.0), 1)
        return ends_in_token, ends_in_blank

    def _look_ahead(self, log_p: Tensor, ends_in_token: Tensor, ends_in_blank: Tensor, last: Tensor | None) -> None:
        """Score every next token, and keep what the next step goes on from."""
        whole = torch.logaddexp(ends_in_token, ends_in_blank)
        start = 0.0 if last is None else _NEVER  # before the first frame nothing has been said, for certain
        self._before = _later(whole, start), _later(ends_in_blank, start)
        following = torch.logsumexp(self._before[0][:, :, None] + log_p, 1)  # (R, V)
        if last is not None:
            again = log_p.gather(2, last[:, None].expand(-1, log_p.shape[1], 1))[:, :, 0]
            following.scatter_(1, last, torch.logsumexp(self._before[1] + again, 1, keepdim=True))
        following[:, self.blank] = _NEVER
        following[:, self.eos] = whole[:, -1]
        self._following = following


def _later(values: Tensor, first: float) -> Tensor:
    """(R, T) values one frame later, ``first`` at the beginning."""
    return torch.cat([values.new_full((len(values), 1), first), values[:, :-1]], 1)
