"""The frozen start of a training, asked for its log-probabilities: in memory only while it is asked.

With adapters the start is the model without them. A model that is trained in full needs its start's weights a second
time: they are loaded when they are asked for and let go after, or kept where they are asked for at each step.

Shapes: R rows of length L, N answer tokens of a batch, A of one answer, V ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from slm.tasks.sequences import IGNORE, Example
from slm.training.answer_loss import AnswerLoss, label_log_probabilities
from slm.training.batches import Batch
from slm.training.trainer import bare_model


def answer_log_probabilities(
    model: nn.Module, batch: Batch, loss: AnswerLoss | None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer token of a packed batch, and whose it is.

    Args:
        model: A causal LM, as it is called.
        batch: What `pack` made, numbered.
        loss: Of the model; None where it must make its logits whole.
        temperature: Logits are divided by it.

    Returns:
        (N,) fp32 log-probabilities and (N,) numbers of the batch's sequences, row after row.
    """
    ids, positions, labels = batch["input_ids"], batch["position_ids"], batch["labels"]
    answered = labels[:, 1:] != IGNORE
    sequences = batch["sequences"][:, 1:][answered]
    if loss is not None:
        return loss.log_probabilities(model, ids, positions, labels, IGNORE, temperature), sequences
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1][answered]
    return label_log_probabilities(logits, labels[:, 1:][answered], temperature), sequences


@torch.no_grad()
def answer_logits(model: nn.Module, example: Example, device: str) -> Tensor:
    """(A, V) fp32 logits behind which the tokens of an answer came; the sequence is not packed."""
    ids = torch.from_numpy(example.input_ids)[None].to(device)
    answered = torch.from_numpy(example.labels[1:] != IGNORE).to(device)
    return model(input_ids=ids, use_cache=False).logits[0, :-1][answered].float()


@dataclass(frozen=True)
class Scorer:
    """A model that gives log-probabilities and learns nothing.

    Args:
        model: A causal LM or a PeftModel around one.
        device: Where it is.
        precision: "fp32", "bf16" or "fp16": what autocast computes in.
        switched: Entered around each call.
    """

    model: nn.Module
    device: str
    precision: str
    switched: Callable[[], AbstractContextManager[object]] = nullcontext

    @contextmanager
    def _called(self) -> Iterator[None]:
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        autocast = torch.autocast(torch.device(self.device).type, half) if half else nullcontext()
        with torch.no_grad(), autocast, self.switched():
            yield

    @cached_property
    def _loss(self) -> AnswerLoss | None:
        return AnswerLoss.of(bare_model(self.model), self.model)

    def log_probabilities(self, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """As `answer_log_probabilities`."""
        with self._called():
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            return answer_log_probabilities(self.model, batch, self._loss, temperature)

    def logits(self, example: Example) -> Tensor:
        """As `answer_logits`."""
        with self._called():
            return answer_logits(self.model, example, self.device)


class Reference:
    """The start that a training is held against.

    Args:
        load: Loads the start's weights, where the model that trains has no adapters.
        device: Where it is asked.
        precision: As in :class:`Scorer`.
        keep: Whether loaded weights stay in memory.
    """

    def __init__(self, load: Callable[[], nn.Module], device: str, precision: str, keep: bool = False) -> None:
        self.load, self.device, self.precision, self.keep = load, device, precision, keep
        self._kept: nn.Module | None = None

    @contextmanager
    def scorer(self, policy: nn.Module) -> Iterator[Scorer]:
        """The start of a model that trains, as long as the context lasts."""
        if hasattr(policy, "disable_adapter"):
            yield Scorer(policy, self.device, self.precision, policy.disable_adapter)
            return
        model = self.load().to(self.device).eval() if self._kept is None else self._kept
        if self.keep:
            self._kept = model
        yield Scorer(model, self.device, self.precision)
