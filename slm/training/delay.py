"""The objective of `delay` and `parallel`: the answers' loss of book 0 and text, and that of the books beside it.

Shapes: R rows of length L, n codebooks; `further`, `further_labels` (R, L, n - 1), `further_weights` (R, L).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from slm.model.further_books import further_books_of, read_beside
from slm.patterns import LATE
from slm.tasks.sequences import IGNORE
from slm.training.answer_loss import chunked_loss
from slm.training.batches import Batch
from slm.training.config import TrainingConfig, TrainingError
from slm.training.trainer import Objective, SpeechTrainer, bare_model
from slm.vocabulary import SpeechVocabulary

MOST_BOOKS_TOLD = 15  # beside book 0
_ENGINES = (
    "further books (delay, parallel) are not sharded; leave the engine out (torchrun alone trains on "
    "several processes), or take pattern=flatten"
)


class DelayTrainer(SpeechTrainer):
    """A `SpeechTrainer` whose model reads further codes and learns to say them.

    The loss of an answer is that of its ids plus, for each further book, `further_weight` / (n - 1) times that of its
    codes, both over the number of ids: so what book 0, which holds the words, has of the loss does not fall with n.
    MusicGen, all of whose books are acoustic, weighs them alike.

    Args:
        further_weight: Of all further books together, where book 0's is 1.
    """

    def __init__(self, *args: Any, further_weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise TrainingError(f"pattern: {_ENGINES}")
        self.further_weight = further_weight

    def _weighted_sum(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Any]:
        bare = bare_model(self.model)
        books, self._beside = further_books_of(bare), None
        if "further" not in inputs:  # text alone
            total, outputs = super()._weighted_sum(model, inputs)
            # Processes wait for a gradient of every parameter.
            return total + 0 * sum(p.sum() for p in books.parameters()), outputs
        with read_beside(bare, lambda rows, length: inputs["further"]) as states:
            total, outputs = super()._weighted_sum(model, inputs)
        if not states:
            raise TrainingError(
                f"pattern: {type(bare).__name__} does not run its head as a module, so its books find no states; "
                "take pattern=flatten"
            )
        before, labels, weights = states[0][:, :-1], inputs["further_labels"][:, 1:], inputs["further_weights"][:, 1:]
        losses, counts = [], []
        for book, head in enumerate(books.heads):
            said = labels[..., book] != IGNORE
            losses.append(chunked_loss(before[said], head, labels[..., book][said], weights[said]))
            counts.append(weights[said].sum())
        if not model.training:
            own = inputs["loss_weights"][:, 1:].sum()
            found = torch.stack([torch.stack([total.detach(), *losses]), torch.stack([own, *counts])])
            self._beside = found.double().cpu()
        return total + sum(losses) * (self.further_weight / len(losses)), outputs

    def _further_figures(self, beside: Tensor) -> dict[str, float]:
        """The mean loss of a code of each book; book 0's counts the end of an answer in.

        Of more than `MOST_BOOKS_TOLD` books beside, such as a dMel's channels, one mean: nobody reads 80 figures.
        """
        if not beside[1, 1]:  # a task that answers in text
            return {}
        means = (beside[0] / beside[1]).tolist()
        if len(means) > 1 + MOST_BOOKS_TOLD:
            return {"book_0_loss": means[0], "further_books_loss": float(beside[0, 1:].sum() / beside[1, 1:].sum())}
        return {f"book_{book}_loss": mean for book, mean in enumerate(means)}


def check_delay(pattern: str, config: TrainingConfig) -> None:
    """Refuses what training with `delay` or `parallel` has not been shown to do.

    Raises:
        TrainingError: An engine that shards.
    """
    if pattern not in LATE:
        return
    for key in ("deepspeed", "fsdp"):
        if getattr(config, key):
            raise TrainingError(f"training.{key}: not with pattern={pattern}: {_ENGINES}")


def delay_objective(vocabulary: SpeechVocabulary, further_weight: float) -> Objective | None:
    """What `slm.training.train.train` minimises with further books; None where a vocabulary has none."""
    if not vocabulary.further_sizes:
        return None
    return Objective(functools.partial(DelayTrainer, further_weight=further_weight))
