"""The objective of multi-token prediction: the answers' loss, and that of the speech tokens further on.

Shapes: R rows of length L, D width, C output rows of speech; labels and loss weights (R, L); n tokens a position.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from slm.model.multi_token import MultiTokenSettings, multi_token_heads_of
from slm.model.parts import head_states
from slm.training.answer_loss import AfterHead, chunked_loss
from slm.training.batches import Batch
from slm.training.config import TrainingConfig, TrainingError
from slm.training.trainer import Objective, SpeechTrainer, bare_model
from slm.vocabulary import SpeechVocabulary


class MultiTokenTrainer(SpeechTrainer):
    """A `SpeechTrainer` whose model learns to say the speech tokens at distance 2 to n beside the next one.

    The loss of an answer is that of its ids plus, for each further distance, `loss_weight` / (n - 1) times that of the
    speech tokens there, among the output rows of speech alone; all over the number of ids. arXiv 2404.19737 (equation
    2) sums the distances up: `loss_weight` = n - 1. A loss on the valid split is that of the next token alone, so that
    it stands beside a training without further heads; theirs are told as `token_2_loss` and so on.

    Args:
        vocabulary: Which ids are speech.
        loss_weight: Of all further tokens together, where the next one's is 1.
    """

    def __init__(self, *args: Any, vocabulary: SpeechVocabulary, loss_weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vocabulary, self.loss_weight = vocabulary, loss_weight

    def _weighted_sum(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Any]:
        bare = bare_model(self.model)
        with head_states(bare) as states:
            total, outputs = super()._weighted_sum(model, inputs)
        if not states:
            raise TrainingError(
                f"training.multi_token: {type(bare).__name__} does not run its head as a module, so further heads find "
                "no states; leave multi_token out"
            )
        losses, counts = further_losses(bare, self.vocabulary, states[0], inputs["labels"], inputs["loss_weights"])
        if model.training:
            return total + losses.sum() * (self.loss_weight / len(losses)), outputs
        self._beside = torch.stack([losses, counts]).double().cpu()
        return total, outputs

    def _further_figures(self, beside: Tensor) -> dict[str, float]:
        """The mean loss of a speech token at each further distance."""
        if not beside[1, 0]:  # a task that answers in text
            return {}
        means = (beside[0] / beside[1].clamp_min(1e-8)).tolist()
        return {f"token_{distance}_loss": mean for distance, mean in enumerate(means, start=2)}


def further_losses(
    model: nn.Module, vocabulary: SpeechVocabulary, states: Tensor, labels: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Of each distance from 2 on the weighted cross-entropies' sum and the sum of their weights, (n - 1,) each.

    Args:
        model: A causal LM with multi-token heads, no engine or PeftModel around it.
        vocabulary: Which ids are speech.
        states: (R, L, D) in front of its head.
        labels: (R, L).
        weights: (R, L) of the labels.
    """
    heads, head = multi_token_heads_of(model), model.get_output_embeddings()
    rows = vocabulary.speech_rows
    bias = getattr(head, "bias", None)
    shared = SimpleNamespace(weight=_weights(head, rows), bias=None if bias is None else bias[rows])
    after = AfterHead.of(model.config.get_text_config())
    losses, counts = [], []
    for distance, there in further_places(labels, vocabulary, heads.tokens):
        before = heads(distance, states[:, : labels.shape[1] - distance][there])
        targets, own = labels[:, distance:][there] - rows.start, weights[:, distance:][there]
        losses.append(chunked_loss(before, shared, targets, own, after))
        counts.append(own.sum())
    return torch.stack(losses), torch.stack(counts)


def _weights(head: nn.Module, rows: slice) -> Tensor:
    """The output rows (C, D) of all speech; under LoRA those that PEFT keeps apart from the frozen table."""
    adapter = getattr(head, "token_adapter", None)
    if adapter is None:
        return head.weight[rows]
    return adapter.trainable_tokens_delta[adapter.active_adapters[0]][: rows.stop - rows.start]


def further_places(labels: Tensor, vocabulary: SpeechVocabulary, tokens: int) -> Iterator[tuple[int, Tensor]]:
    """Where further tokens are learnt: of each distance d from 2 to n the positions (R, L - d) whose token counts.

    It does where it and all before it are speech that the model answers with, its end among them: what lies between two
    answers, or between two stretches of one, is none, so that no head looks beyond an end.
    """
    first = int(vocabulary.offsets[0])
    speech = (labels >= first) & (labels < vocabulary.speech_rows.stop) | (labels == vocabulary.speech_end_id)
    there = speech[:, 1:]
    for distance in range(2, tokens + 1):
        there = there[:, :-1] & speech[:, distance:]
        yield distance, there


def check_multi_token(config: TrainingConfig, pattern: str) -> None:
    """Refuses what training with multi-token heads cannot do, or has not been shown to do.

    Raises:
        TrainingError: The pattern `delay`, or an engine that shards.
    """
    if config.multi_token is None:
        return
    if pattern == "delay":
        raise TrainingError(
            "training.multi_token: not with pattern=delay, whose further books are said one step at a time; take "
            "semantic or flatten"
        )
    for key in ("deepspeed", "fsdp"):
        if getattr(config, key):
            raise TrainingError(f"training.multi_token: not with training.{key}, which holds parts of the head's rows")


def multi_token_objective(vocabulary: SpeechVocabulary, settings: MultiTokenSettings) -> Objective:
    """What `slm.training.train.train` minimises for a model with multi-token heads."""
    return Objective(functools.partial(MultiTokenTrainer, vocabulary=vocabulary, loss_weight=settings.loss_weight))
