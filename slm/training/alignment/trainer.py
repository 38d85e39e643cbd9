"""Fine-tuning with a loss on named attention heads, which learn to go through the text once and in order.

After Neekhara et al. 2024 (arXiv 2406.17957), who do so with the cross-attention of an encoder-decoder. A decoder-only
LLM has no such; here it is the attention of some of its heads from the positions that predict codes to those of the
prompt's text, out of all that they attend to: so these heads also learn to look at the text at all. Only utterances
that say their prompt count. Nothing is added to the model, which generates as before.

Shapes: N spoken texts of a micro-batch, h heads, F positions that predict codes, T tokens of text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slm.patterns import LATE
from slm.tasks.sequences import Example
from slm.training.alignment.attention_reader import KEY, AttentionReader, Head, Reading, heads_of
from slm.training.alignment.config import AlignmentConfig
from slm.training.alignment.forward_sum import forward_sum
from slm.training.batches import Batch, pack
from slm.training.config import TrainingError
from slm.training.trainer import Objective, SpeechTrainer, bare_model

SPOKEN = "spoken"  # the batch's, of those that say a text


class AlignmentTrainer(SpeechTrainer):
    """A `SpeechTrainer` that adds `loss_weight` times the mean forward-sum loss of a frame, over the step's frames.

    Args:
        alignment: Heads, weight and prior.
    """

    def __init__(self, *args: Any, alignment: AlignmentConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        bare = bare_model(self.model)
        self.alignment, self.reader = alignment, AttentionReader(bare, heads_of(alignment, bare))
        self._summed: Tensor | None = None  # of the micro-batch
        self._step_frames = torch.zeros(())

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], Tensor]:
        """As of `SpeechTrainer`; the frames of the step are counted beside its answer tokens."""
        batches, total = super().get_batch_samples(*args, **kwargs)
        frames = sum(int(batch[SPOKEN][:, 5].sum()) for batch in batches if SPOKEN in batch)
        self._step_frames = torch.tensor(float(frames), device=total.device)
        if self.args.world_size > 1:
            self._step_frames = self.accelerator.reduce(self._step_frames, reduction="sum")
        return batches, total

    def _added_loss(self) -> Tensor | None:
        """That of the alignment, over the whole optimizer step."""
        if self._summed is None or not self.alignment.loss_weight:
            return None
        share = self._summed / self._step_frames.clamp_min(1) * self.accelerator.num_processes
        return self.alignment.loss_weight * share

    def _weighted_sum(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, Any]:
        self._summed = self._beside = None
        if SPOKEN not in inputs:
            if not model.training:  # none of a task, or of this batch alone: all processes sum up alike
                self._beside = torch.zeros(2, 2 * len(self.reader.heads), dtype=torch.float64)
            return super()._weighted_sum(model, inputs)
        strength = self.alignment.strength(self.state.global_step) if model.training else 0.0
        with self.reader.reading(inputs[SPOKEN], strength) as reading:
            found = super()._weighted_sum(model, inputs)
        losses, sharpness = alignment_figures(reading)
        frames = reading.spoken.frames
        self._summed = losses.mean(1).sum()
        if model.training:
            each = torch.repeat_interleave(losses.mean(1) / frames, frames)  # so that their mean is over frames
            self.note(alignment_loss=each, alignment_sharpness=torch.repeat_interleave(sharpness.mean(1), frames))
        else:
            sums = torch.cat([losses.sum(0), (sharpness * frames[:, None]).sum(0)])
            self._beside = torch.stack([sums, frames.sum().to(sums).expand_as(sums)]).double().cpu()
        return found

    def _further_figures(self, beside: Tensor) -> dict[str, float]:
        """The mean loss and sharpness of a frame, over all heads and, where there are several, of each."""
        if not beside[1, 0]:  # a task that says no text
            return {}
        losses, sharpness = ((beside[0] / beside[1]).view(2, -1)).tolist()
        found = {"alignment_loss": sum(losses) / len(losses), "alignment_sharpness": sum(sharpness) / len(sharpness)}
        if len(losses) > 1:
            found |= {
                f"alignment_loss_{layer}_{head}": x for (layer, head), x in zip(self.reader.heads, losses, strict=True)
            }
        return found


def alignment_figures(reading: Reading) -> tuple[Tensor, Tensor]:
    """Of each text and head, (N, h): the forward-sum loss, and the mean over frames of the attention's maximum."""
    found, spoken = reading.log_attention, reading.spoken
    n, heads = found.shape[:2]
    frames, tokens = (count.repeat_interleave(heads) for count in (spoken.frames, spoken.tokens))
    losses = forward_sum(found.flatten(0, 1), frames, tokens).view(n, heads)
    token = torch.arange(found.shape[3], device=found.device)
    highest = found.detach().masked_fill(token >= spoken.tokens[:, None, None, None], -torch.inf).amax(3).exp()
    frame = torch.arange(found.shape[2], device=found.device)
    inside = frame < spoken.frames[:, None, None]
    return losses, (highest * inside).sum(2) / spoken.frames[:, None]


@torch.no_grad()
def attention_to_text(model: nn.Module, example: Example, heads: Sequence[Head]) -> Tensor:
    """How much each head attends to each token of the text while the example's codes are predicted: (h, F, T), fp32.

    Args:
        model: A causal LM or a PeftModel around one, not sharded; its mode is put back.
        example: A sequence that says its prompt.
        heads: (layer, head) in rising order, as they come back.
    """
    bare, was_training = bare_model(model), model.training
    device = next(bare.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in pack([example], [1.0], pack_length=0).items()}
    model.eval()
    try:
        with AttentionReader(bare, heads).reading(batch[SPOKEN]) as reading:
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    finally:
        model.train(was_training)
    return reading.log_attention[0].exp().float().cpu()


def check_alignment(config: AlignmentConfig | None, pattern: str, says_its_prompt: bool) -> None:
    """Refuses an alignment of what has none.

    Args:
        config: None: nothing is asked for.
        pattern: Of codes in the sequence.
        says_its_prompt: Whether one of the trained tasks does.

    Raises:
        TrainingError: Pattern `delay` or `parallel`, or no task whose speech says its prompt's text.
    """
    if config is None:
        return
    if pattern in LATE:
        raise TrainingError(
            f"{KEY}: not with pattern={pattern}, which has an objective of its own; take semantic or flatten"
        )
    if not says_its_prompt:
        raise TrainingError(
            f"{KEY}: none of the tasks in task_weights says the text of its prompt; train tts, or drop it"
        )


def alignment_objective(config: AlignmentConfig | None) -> Objective | None:
    """What `slm.training.train.train` minimises with an alignment; None where none is asked for."""
    return None if config is None else Objective(functools.partial(AlignmentTrainer, alignment=config))
