"""Optimizer steps whose gradient is not finite are left out, told, and stop the training where they do not end.

The Trainer takes such a step: all weights become NaN, the loss that it logs goes on as if nothing had been (it leaves
NaN out of the mean), and the checkpoints from before are soon deleted.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainingArguments

log = logging.getLogger(__name__)

LIMIT = 5  # one bad batch is a step or two; what does not recover within five does not recover by itself
FP16_LIMIT = 30  # a loss scale of 65,536 that is halved so often is below any gradient's need


class FiniteSteps(TrainerCallback):
    """Leaves out the steps of a training whose gradient is NaN or infinite; five in a row stop it.

    With fp16 the loss scale leaves them out itself, some at the start until it has found its place; thirty in a row
    stop the training. DeepSpeed has taken the step when it is asked: one that it left out counts like ours, the first
    that it took stops the training, before anything of it is saved. Under FSDP's version 1 the first one stops the
    training where its loss is logged.

    Args:
        trainer: Of the training, which the callback is then added to.

    Raises:
        FloatingPointError: So many steps in a row, or one that an engine took; under FSDP's version 1 a checkpoint may
            have been saved since.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.left_out, self.in_a_row = 0, 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Drops the gradients of a step that is not finite: the optimizer then moves nothing and keeps its state."""
        if self.trainer.is_deepspeed_enabled:
            self._look_at_the_engine_s_step(args, state)
            return
        if self._is_fsdp_1:
            return
        parameters = list(model.parameters())
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):  # FSDP2: of all processes' parts
            norm = norm.full_tensor()
        if bool(torch.isfinite(norm)):
            self.in_a_row = 0
            return
        self._count(args, state)
        if not args.fp16:
            for parameter in parameters:
                parameter.grad = None

    @property
    def _is_fsdp_1(self) -> bool:
        return self.trainer.is_fsdp_enabled and not self.trainer.accelerator.is_fsdp2

    def _look_at_the_engine_s_step(self, args: TrainingArguments, state: Any) -> None:
        """What `on_pre_optimizer_step` does where DeepSpeed has made the step; all processes see one norm."""
        accelerator = self.trainer.accelerator
        norm = accelerator.clip_grad_norm_((), math.inf)  # clips nothing: DeepSpeed has done so
        if norm is None or (math.isfinite(norm) and norm >= 0):  # its older versions say -1 of one that is not finite
            self.in_a_row = 0
        elif args.fp16 or accelerator.optimizer_step_was_skipped:
            self._count(args, state)
        else:
            raise FloatingPointError(_stopped(f"the gradient of step {state.global_step + 1} is", args))

    def _count(self, args: TrainingArguments, state: Any) -> None:
        """Counts a step that is left out. Raises FloatingPointError where it is one too many in a row."""
        self.in_a_row, step = self.in_a_row + 1, state.global_step + 1
        limit = FP16_LIMIT if args.fp16 else LIMIT
        if self.in_a_row == limit:
            raise FloatingPointError(_stopped(f"the gradients of {limit} steps in a row, to step {step}, are", args))
        if args.fp16:  # its scale leaves the step out, and it is usual
            return
        self.left_out += 1
        if self.left_out == 1 and state.is_world_process_zero:
            log.warning(
                "step %d: its gradient is not finite, and the step is left out; %d in a row stop the training",
                step,
                limit,
            )

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Under FSDP's version 1: stops where a step's norm was not finite."""
        norm = (logs or {}).get("grad_norm")
        if norm is not None and not args.fp16 and self._is_fsdp_1 and not math.isfinite(norm):
            raise FloatingPointError(_stopped(f"the gradient of step {state.global_step} is", args))

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Says how many there were."""
        if self.left_out and state.is_world_process_zero:
            log.warning("%d of %d steps were left out: their gradients were not finite", self.left_out, state.max_steps)


def _stopped(what: str, args: TrainingArguments) -> str:
    precision = "" if not (args.bf16 or args.fp16) else ", precision=fp32"
    return (
        f"{what} not finite; the training stops, and the checkpoints in {args.output_dir} are from before. Start it "
        f"again with a lower training.learning_rate{precision}, or look for what is wrong in its data"
    )
