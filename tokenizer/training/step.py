"""One training step of the codec: the discriminators, then the generator, over all micro-batches of all processes.

The result is that of one process with the whole batch, up to rounding: every loss is a mean over items of equal
weight, so that the mean over micro-batches and processes is the mean over the batch. Only the logged `*_share` figures
are ratios, and means of ratios.

Shapes: B crops of a micro-batch, S samples.
"""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tokenizer.model.modeling import LMSPTModel, LMSPTOutput
from tokenizer.teacher.distillation import clip_groups
from tokenizer.training.invariance import invariance_loss
from tokenizer.training.losses import discriminator_loss
from tokenizer.training.objective import Objective, codec_losses, loss_weights, split_real_and_generated
from tokenizer.training.parallel import average_gradients, gather_codes, mean_figures
from tokenizer.training.revival import dead_rule
from tokenizer.training.state import Batch, CodecTrainingConfig, Metrics, TrainState

TARGETS = ("characters", "changed_values")  # of a batch: for losses, nothing that the forward pass hears


def learning_rate_factor(step: int, config: CodecTrainingConfig) -> float:
    """Linear warm-up, then a cosine from 1 to `final_lr_share`, and that from the schedule's end on.

    A function of the step and of the schedule's length: where that stays, extending a run changes no step before.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.schedule_length - config.warmup_steps)
    return config.final_lr_share + (1 - config.final_lr_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train_step(
    state: TrainState, batches: list[Batch], objective: Objective, config: CodecTrainingConfig, accelerator: Accelerator
) -> Metrics:
    """One step: the discriminators on real and generated crops, then the generator on all its losses.

    With several micro-batches the discriminators move after the last of them, and the generator is judged by the
    result: its forward passes run twice then, instead of all their graphs being kept.

    Args:
        state: is changed, but for its step number.
        batches: this process's micro-batches, of equal size, as TrainingCrops' items collated and then parted between
            host and device (`loop.on_device`).
        objective: what is minimised.
        config: of the training.
        accelerator: precision and processes.

    Returns:
        Figures of the whole batch. Where loss or gradient of the generator is not finite, it has not moved, nor its
        books and averages; `gradient_norm` is then absent or not finite, or with fp16 `overflow` says that the loss
        scale was lowered, as it is meant to be. The discriminators have had their turn before, and move by their own
        loss and gradient: where those are not finite, `discriminator_skipped` is 1.
    """
    metrics: Metrics = _set_learning_rates(state, config)
    adversarial = state.discriminator is not None and state.step >= objective.discriminator_start
    ready: LMSPTOutput | None = None
    if adversarial:
        if len(batches) == 1:  # the common case: one forward pass serves both
            ready = _forward(state, batches[0], objective, accelerator)
        metrics |= _discriminator_step(state, batches, ready, objective, config, accelerator)

    weights, sums, parts = loss_weights(objective), {}, []
    revives = _revives(state.step, config)
    state.optimizer.zero_grad()
    for batch in batches:
        output = ready if ready is not None else _forward(state, batch, objective, accelerator)
        with accelerator.autocast():
            losses = codec_losses(
                objective,
                output,
                batch["input_values"],
                state.model_config,
                state.discriminator if adversarial else None,
                state.projection,
                batch.get("semantic_only"),
                batch.get("characters"),
            )
            if objective.invariance.weight:
                losses |= _invariance(state.model, batch, output, objective)
        losses["total"] = sum(weights[name] * value for name, value in losses.items() if name in weights)
        accelerator.backward(losses["total"] / len(batches))
        _add(sums, losses, len(batches))
        parts.append(_codes_only(output, revives))
        del output, losses  # the graph goes before the next micro-batch builds its own
    metrics |= {f"loss/{name}": value for name, value in mean_figures(sums, accelerator).items()}

    groups = clip_groups(state.model, state.projection, objective.distillation.probes)
    norms = _norms(groups, state.optimizer, config, accelerator)
    finite = math.isfinite(metrics["loss/total"]) and all(map(math.isfinite, norms))
    if not _move(state.optimizer, finite, accelerator):
        if accelerator.scaler is not None and math.isfinite(metrics["loss/total"]):
            return metrics | {"overflow": 1.0}
        return metrics | {"gradient_norm": math.nan}
    metrics |= dict(zip(("gradient_norm", "gradient_norm/probe"), norms, strict=False))
    _after_move(state, gather_codes(parts, revives, accelerator), revives, config, metrics)
    return metrics


def _set_learning_rates(state: TrainState, config: CodecTrainingConfig) -> Metrics:
    """Sets both optimizers' rates for this step; returns them, the discriminators' where it is one of its own."""
    factor = learning_rate_factor(state.step, config)
    rates = {"learning_rate": config.learning_rate * factor}
    for group in state.optimizer.param_groups:
        group["lr"] = rates["learning_rate"]
    if state.discriminator_optimizer is not None:
        peak = config.discriminator_learning_rate or config.learning_rate
        rate = peak * (factor if config.discriminator_schedule == "cosine" else 1.0)
        for group in state.discriminator_optimizer.param_groups:
            group["lr"] = rate
        if rate != rates["learning_rate"]:
            rates["learning_rate/discriminator"] = rate
    return rates


def _forward(state: TrainState, batch: Batch, objective: Objective, accelerator: Accelerator) -> LMSPTOutput:
    given = {name: value for name, value in batch.items() if name not in TARGETS}
    with accelerator.autocast():
        return state.model(**given, auxiliary=objective.distillation.auxiliary)


def _invariance(model: LMSPTModel, batch: Batch, output: LMSPTOutput, objective: Objective) -> dict[str, Tensor]:
    """The loss of the changed crops' semantic codes, and the share of the frames that keep theirs."""
    projected = model.semantic_projection(batch["changed_values"], batch.get("padding_mask"), batch.get("lengths"))
    loss, kept = invariance_loss(
        projected,
        model.quantizer.books[0].codebook.weight,
        output.audio_codes[:, 0],
        output.audio_codes_mask,
        objective.invariance.temperature,
    )
    return {"invariance": loss, "invariance_kept": kept}


def _discriminator_step(
    state: TrainState,
    batches: list[Batch],
    ready: LMSPTOutput | None,
    objective: Objective,
    config: CodecTrainingConfig,
    accelerator: Accelerator,
) -> Metrics:
    state.discriminator_optimizer.zero_grad()
    sums: dict[str, Tensor] = {}
    for batch in batches:
        with torch.no_grad():
            output = ready if ready is not None else _forward(state, batch, objective, accelerator)
        real, fake = batch["input_values"], output.audio_values.detach()
        with accelerator.autocast():
            loss = discriminator_loss(*split_real_and_generated(state.discriminator(torch.cat([real, fake]))))
        accelerator.backward(loss / len(batches))
        _add(sums, {"loss/discriminator": loss}, len(batches))
    metrics = mean_figures(sums, accelerator)
    groups = [list(state.discriminator.parameters())]
    (norm,) = _norms(groups, state.discriminator_optimizer, config, accelerator)
    finite = math.isfinite(metrics["loss/discriminator"]) and math.isfinite(norm)
    if _move(state.discriminator_optimizer, finite, accelerator):
        metrics["gradient_norm/discriminator"] = norm
    elif accelerator.scaler is None or not math.isfinite(metrics["loss/discriminator"]):
        metrics["discriminator_skipped"] = 1.0
    return metrics


def _add(sums: dict[str, Tensor], values: dict[str, Tensor], n: int) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.detach() / n


def _codes_only(output: LMSPTOutput, with_latents: bool) -> LMSPTOutput:
    return LMSPTOutput(
        audio_codes=output.audio_codes,
        projected_latents=output.projected_latents if with_latents else None,
    )


def _norms(
    groups: list[list[nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    config: CodecTrainingConfig,
    accelerator: Accelerator,
) -> list[float]:
    """Averages the gradients over processes and clips each group; their norms before, the same in every process."""
    for group in groups:
        average_gradients(group, accelerator)
    accelerator.unscale_gradients(optimizer)
    return [float(nn.utils.clip_grad_norm_(group, config.gradient_clip)) for group in groups]


def _move(optimizer: torch.optim.Optimizer, finite: bool, accelerator: Accelerator) -> bool:
    """Takes the optimizer's step where loss and gradients are finite; whether it was taken.

    A gradient scaler decides by itself, and must be asked each time: it lowers its scale where it refuses.
    """
    if accelerator.scaler is not None:
        optimizer.step()
        return not optimizer.step_was_skipped
    if finite:
        optimizer.step()
    return finite


def _revives(step: int, config: CodecTrainingConfig) -> bool:
    return (
        bool(config.revive_steps)
        and step % config.revive_steps == 0
        and step < config.revive_until * config.schedule_length
    )


@torch.no_grad()
def _after_move(
    state: TrainState, codes: LMSPTOutput, revives: bool, config: CodecTrainingConfig, metrics: Metrics
) -> None:
    """Codebook use, counts, revival and averaged weights: the same in every process, from the codes of all of them."""
    model: LMSPTModel = state.model
    frames = codes.audio_codes[:, 0].numel()
    rules = [dead_rule(book.size, frames, config.usage_decay) for book in model.quantizer.books]
    state.counts.add(model.update_usage(codes, [rule.decay for rule in rules]))
    dead, revived = [], []
    if revives:
        thresholds = [rule.threshold for rule in rules]
        dead = [book.usage < threshold for book, threshold in zip(model.quantizer.books, thresholds, strict=True)]
        generator = torch.Generator().manual_seed(state.step)
        revived = model.revive_dead_codes(codes, generator, thresholds, [rule.trial for rule in rules])
        metrics["revived"] = float(sum(revived))
    if state.ema is None:
        return
    state.ema.update_parameters(model)
    # A mean of the dead entry and the new one lies where there are no latents: for 1 / (1 - decay) steps it would stay
    # dead in the model that is validated and saved.
    books = zip(model.quantizer.books, state.ema.module.quantizer.books, dead, revived, strict=False)
    for book, mean, rows, count in books:
        if count:  # none in a frozen book, nor in one without entries to learn
            mean.codebook.weight[rows] = book.codebook.weight[rows]
