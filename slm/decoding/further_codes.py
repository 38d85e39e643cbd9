"""How the codes of further books are chosen while the LLM's ids are: beside each of them, from the same states.

Shapes: B prompts of a batch, padded on the left to P; T positions that came since; n codebooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F
from transformers import LogitsProcessor, PreTrainedModel

from slm.decoding.sampling import gumbel_noise, warpers
from slm.model.further_books import further_books_of, read_beside
from slm.patterns import EMPTY

FURTHER_STREAM = 0x5DEECE66D  # sets the further books' random streams apart from the ids'


class Ends(Protocol):
    """Which rows are over, by -1 in `reasons` of those that are not, and after how many ids."""

    reasons: torch.Tensor
    lengths: torch.Tensor


class FurtherCodes(LogitsProcessor):
    """Chooses the further books' codes of each new position, beside the id that the other processors choose.

    Its codes (B, P + T, n - 1) are those of the prompts and of all that came since, `EMPTY` behind each book's end and,
    where the answer is text, all along.

    Args:
        model: A causal LM with further books.
        prompts: (P, n) each.
        ends: Knows which rows are in their tail; None where the answer is text.
        late: Frames that each further book is later than the one before.
        seeds: One per row; None is greedy.
        guidance: What moves scores on from those without a prompt; None: nothing.
        sampling: Arguments of `slm.decoding.sampling.warpers`, with `seeds`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[np.ndarray],
        ends: Ends | None,
        late: int = 1,
        seeds: Sequence[int] | None = None,
        guidance: LogitsProcessor | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.ends, self.late, self.guidance = model, ends, late, guidance
        length = max(len(prompt) for prompt in prompts)
        codes = torch.full((len(prompts), length, prompts[0].shape[1] - 1), EMPTY)
        for row, prompt in enumerate(prompts):
            codes[row, length - len(prompt) :] = torch.from_numpy(prompt[:, 1:])
        self.codes = codes.to(model.device)
        self.done = torch.zeros(len(prompts), dtype=torch.long, device=model.device)  # positions since the prompt
        self.generators = None
        if seeds is not None:
            # Streams of their own: how many ids are legal must not change what a further book draws.
            self.generators = [torch.Generator().manual_seed(seed ^ FURTHER_STREAM) for seed in seeds]
            self.warpers = warpers(**(sampling or {}))
        self.states: list[torch.Tensor] = []

    @contextmanager
    def read(self) -> Iterator[None]:
        """While open, the model reads the codes beside the ids."""
        with read_beside(self.model, self._read_now) as self.states:
            yield

    def _read_now(self, rows: int, length: int) -> torch.Tensor:
        """The codes of what is embedded: the newest positions, of each row as often as it has beams."""
        codes = self.codes[:, self.codes.shape[1] - length :]
        return codes.repeat_interleave(rows // len(codes), dim=0)

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows alone."""
        self.codes, self.done = self.codes[rows], self.done[rows]
        if self.generators is not None:
            self.generators = [self.generators[row] for row in rows.tolist()]

    def join(self, other: FurtherCodes) -> None:
        """Takes the rows of another of the same model behind its own; `ends` is its own, for all of them."""
        self.codes, self.done = torch.cat([self.codes, other.codes]), torch.cat([self.done, other.done])
        if self.generators is not None:
            self.generators += other.generators

    def move(self, n: int) -> None:
        """Puts n more positions of padding on the left; takes them off below 0."""
        self.codes = F.pad(self.codes, (0, 0, n, 0), value=EMPTY)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = torch.full_like(self.codes[:, 0], EMPTY)
        if self.ends is not None:
            done = self.done
            going, lengths = self.ends.reasons < 0, self.ends.lengths
            for book, own in enumerate(further_books_of(self.model).logits(self.states[0][:, -1])):
                own = own if self.guidance is None else self.guidance(input_ids, own)
                if self.generators is not None:
                    for warper in self.warpers:
                        own = warper(input_ids, own)
                    own = own + gumbel_noise(own, self.generators)
                late = self.late * (book + 1)
                said = (done >= late) & (going | (done < lengths + late))
                new[:, book] = torch.where(said, own.argmax(-1), EMPTY)
        self.codes, self.done = torch.cat([self.codes, new[:, None]], dim=1), self.done + 1
        return scores
