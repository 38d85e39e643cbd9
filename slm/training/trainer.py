"""Transformers' Trainer on packed batches: a loss weighted per task, and evaluation of each task.

Shapes: R rows of length L, V ids; `input_ids`, `labels`, `position_ids`, `loss_weights` (R, L); logits (R, L, V).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import Trainer

from slm.model.further_books import further_books_of
from slm.model.lora import tables_without_their_rows
from slm.tasks.sequences import IGNORE
from slm.training.answer_loss import AnswerLoss
from slm.training.batches import Batch, PackedBatches
from slm.training.zero_checkpoints import convert_for, read_universal, remove_universal, written_by_others

log = logging.getLogger(__name__)

Measure = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Objective:
    """What is minimised, on what: the answers' loss on packed sequences, or another.

    Others: `slm.training.objectives`, `slm.training.preference`.

    Args:
        trainer: The Trainer whose `compute_loss` is minimised; takes what `SpeechTrainer` does.
        batches: What each optimizer step sees; takes what `PackedBatches` does.
        evaluates_first: Whether an evaluation comes before the first step too; not again after a resume.
    """

    trainer: Callable[..., SpeechTrainer]
    batches: Callable[..., PackedBatches] = PackedBatches
    evaluates_first: bool = False


def bare_model(model: nn.Module) -> nn.Module:
    """The causal LM in a PeftModel; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _attention_of_the_cpu(model: nn.Module) -> Iterator[None]:
    """Attention that a CPU can compute, where an engine leaves the model until it trains."""
    own = model.config._attn_implementation
    changes = "flash" in own and next(model.parameters()).device.type == "cpu"
    if changes:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if changes:
            model.set_attn_implementation(own)


def _sharding_one_table_once(prepare: Callable[..., Any]) -> Callable[..., Any]:
    def prepared(*args: Any, **kwargs: Any) -> Any:
        with tables_without_their_rows():
            return prepare(*args, **kwargs)

    return prepared


class SpeechTrainer(Trainer):
    """A Trainer whose loss is divided by all weighted answer tokens of the optimizer step, wherever they are."""

    def __init__(
        self,
        *args: Any,
        evaluation: dict[str, list[Batch]],
        task_weights: dict[str, float],
        embedding_learning_rate: float | None = None,
        decayed_tables: bool = True,
        measure: Measure | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.measure = measure
        self.evaluation, self.task_weights = evaluation, task_weights
        self.embedding_learning_rate, self.decayed_tables = embedding_learning_rate, decayed_tables
        self.answer_loss = self._answer_loss()
        if self.is_fsdp_enabled and bare_model(self.model) is not self.model:
            self.accelerator.prepare = _sharding_one_table_once(self.accelerator.prepare)
        # Of the newest batch outside of training what an objective takes beside its loss: sums and their weights.
        self._beside: torch.Tensor | None = None
        self._figures: dict[str, tuple[float, int]] = {}
        self._micro_batch = (0, -1)  # the step, and the newest of its micro-batches in this process
        # Tells the Trainer that compute_loss below already divides by the whole step.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The Trainer's, without the tables where rows of them have to stay (`slm.model.freezing`)."""
        names = super().get_decay_parameter_names(model)
        if self.decayed_tables:
            return names
        tables = self._tables(model)
        own = {name for name, parameter in model.named_parameters() if id(parameter) in tables}
        return [name for name in names if name not in own]

    @staticmethod
    def _tables(model: nn.Module) -> set[int]:
        bare = bare_model(model)
        modules = (bare.get_input_embeddings(), bare.get_output_embeddings(), further_books_of(bare))
        return {id(p) for module in modules if module is not None for p in module.parameters()}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer; tables that have a learning rate of their own are groups of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self.embedding_learning_rate is not None:
            tables = self._tables(self.model if model is None else model)
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in tables]
                if own:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in tables]
                    optimizer.add_param_group({**group, "params": own, "lr": self.embedding_learning_rate})
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The step's micro-batches and the sum of their loss weights over all processes, () fp32."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            total += batch["loss_weights"][:, 1:].sum(dtype=torch.float64).cpu()
        total = total.to(device=device, dtype=torch.float32)
        if self.args.world_size > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        return batches, total

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's; what dropout draws follows from seed, step and micro-batch, in whichever process that is."""
        step, newest = self._micro_batch
        self._micro_batch = (step, newest + 1) if step == self.state.global_step else (self.state.global_step, 0)
        step, own = self._micro_batch
        drawn_from = [self.args.seed, step, own * self.args.world_size + self.args.process_index]
        torch.manual_seed(int(np.random.SeedSequence(drawn_from).generate_state(1, np.uint64)[0]))
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Weighted cross-entropy, (); `num_items_in_batch` () is the sum of weights over the whole optimizer step."""
        total, outputs = self._weighted_sum(model, inputs)
        # Engines average gradients over processes: this process's share is scaled up by their number first.
        loss = total / num_items_in_batch.clamp_min(1e-8) * self.accelerator.num_processes
        if (added := self._added_loss()) is not None:
            loss = loss + added
        return (loss, outputs) if return_outputs else loss

    def _added_loss(self) -> torch.Tensor | None:
        """What an objective adds to the loss of the micro-batch that `_weighted_sum` has just seen, (); None: 0."""
        return None

    def _answer_loss(self) -> AnswerLoss | None:
        """The loss that makes no logits of the whole batch; None where the model or its engine cannot have it."""
        bare = bare_model(self.model)
        with _attention_of_the_cpu(bare):
            loss = AnswerLoss.of(bare, self.model)
        if loss is None:
            why = f"{type(bare).__name__} changes its logits after the head"
        elif self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            # It gathers a layer's weights while the layer runs: those of several layers are there one by one.
            why = "" if loss.is_plain else "ZeRO-3 holds the rows of adapters' heads in parts"
        else:
            version_1 = self.is_fsdp_enabled and not self.accelerator.is_fsdp2
            why = "FSDP's version 1 holds the head's weights in one with others'" if version_1 else ""
        if not why:
            return loss
        log.warning(
            "%s: the loss takes the logits of whole micro-batches, 12 bytes a token and row of the vocabulary; where "
            "memory runs out, raise training.gradient_accumulation",
            why,
        )
        return None

    def _weighted_sum(self, model: nn.Module, inputs: Batch) -> tuple[torch.Tensor, Any]:
        if self.answer_loss is not None:
            names = ("input_ids", "position_ids", "labels")
            parts = (inputs[name] for name in names)
            return self.answer_loss(model, *parts, inputs["loss_weights"], ignored=IGNORE), None
        outputs = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)
        labels, weights = inputs["labels"][:, 1:], inputs["loss_weights"][:, 1:]
        answered = labels != IGNORE
        losses = F.cross_entropy(outputs.logits[:, :-1][answered].float(), labels[answered], reduction="none")
        return (losses * weights[answered]).sum(), outputs

    def note(self, **figures: torch.Tensor) -> None:
        """Takes down values, whose means stand beside the next loss that is logged."""
        for name, values in figures.items():
            total, count = self._figures.get(name, (0.0, 0))
            self._figures[name] = total + float(values.detach().double().sum()), count + values.numel()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with the means of what was noted since the last loss."""
        if "loss" in logs:
            logs = logs | {name: total / count for name, (total, count) in self._figures.items() if count}
            self._figures.clear()
        super().log(logs, *args, **kwargs)

    def _further_figures(self, beside: torch.Tensor) -> dict[str, float]:
        """What an objective tells of a task beside its loss, from all of its `_beside`, (2, figures)."""
        return {}

    def _over_processes(self, sums: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(sums.to(self.args.device, torch.float32), reduction="sum").double().cpu()

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Mean loss per answer token of each task on the valid split, of all by the tasks' weights, and `measure`'s."""
        model = self.model_wrapped if self.is_deepspeed_enabled or self.is_fsdp_enabled else self.model
        model.eval()
        metrics, weighted, norm = {}, 0.0, 0.0
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        for task, batches in self.evaluation.items():
            sums, beside = torch.zeros(2, dtype=torch.float64), None
            # Sharded engines need as many forward passes in every process: the missing ones repeat a batch and count
            # nothing.
            for lap in range(-(-len(batches) // processes)):
                index = lap * processes + rank
                batch = self._prepare_inputs(batches[index % len(batches)])
                with torch.no_grad(), self.compute_loss_context_manager():
                    total, _ = self._weighted_sum(model, batch)
                if self._beside is not None:
                    beside = torch.zeros_like(self._beside) if beside is None else beside
                    beside += self._beside * (index < len(batches))
                if index < len(batches):
                    sums += torch.stack(
                        [total.double().cpu(), batch["loss_weights"][:, 1:].sum(dtype=torch.float64).cpu()]
                    )
            sums = self._over_processes(sums)
            metrics[f"{metric_key_prefix}_{task}_loss"] = float(sums[0] / sums[1])
            told = {} if beside is None else self._further_figures(self._over_processes(beside))
            metrics |= {f"{metric_key_prefix}_{task}_{name}": value for name, value in told.items()}
            weight = self.task_weights.get(task, 0.0)  # what is measured only
            weighted, norm = weighted + weight * float(sums[0]), norm + weight * float(sums[1])
        if norm:  # 0 where all that is valid is measured only
            metrics[f"{metric_key_prefix}_loss"] = weighted / norm
        if self.measure is not None:
            # By the first process alone; the others learn what it found, so that all choose and stop alike.
            found = [self.measure(self.model) if self.is_world_process_zero() else {}]
            for name, value in broadcast_object_list(found)[0].items():
                metrics[f"{metric_key_prefix}_{name}"] = value
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        model.train()
        return metrics

    def _load_best_model(self) -> None:
        """The Trainer's, from a checkpoint of another number of processes too."""
        best = Path(self.state.best_model_checkpoint)
        converts = self.is_deepspeed_enabled and written_by_others(best, self.args.world_size)
        if converts:
            convert_for(best, self.args)
            read_universal(self.model_wrapped, True)
        super()._load_best_model()
        if converts:
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                remove_universal(best)
