"""The tokenizer and its discriminators as the first step finds them: new, or from another training; parts frozen."""

from __future__ import annotations

import dataclasses
import json

import torch
from accelerate import Accelerator

from recipes.config import ConfigError
from recipes.exporting.discriminators import discriminator_file
from recipes.runs.logs import log
from recipes.tokenizer_training.config import Config, model_sizes
from recipes.tokenizer_training.objective import teacher_config
from tokenizer import load_tokenizer
from tokenizer.data.characters import N_CLASSES
from tokenizer.model.configuration import LMSPTConfig
from tokenizer.model.modeling import LMSPTModel
from tokenizer.teacher.contrastive import ContrastiveProjection
from tokenizer.teacher.distillation import FeatureProjection
from tokenizer.teacher.whisper import teacher_width
from tokenizer.training.discriminator import Discriminator
from tokenizer.training.initialisation import initialise_discriminators, initialise_from
from tokenizer.training.state import TrainState, averaged

SIZES = ("periods", "fft_sizes", "period_channels", "band_channels")  # keys that decide a discriminator's tensors


def new_model(config: Config) -> LMSPTModel:
    """The tokenizer as the first step finds it. Raises ConfigError for an `init_from` or `freeze` that cannot work."""
    model = LMSPTModel(model_sizes(config))
    if config.init_from is not None:
        try:
            initialise_from(model, config.init_from)
        except ValueError as error:
            raise ConfigError(f"init_from={error}") from None
    freeze_parts(config, model)
    return model


def check_init_from(config: Config) -> None:
    """Whether `init_from` is a tokenizer at all. Raises ConfigError."""
    try:
        load_tokenizer(config.init_from)
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"init_from={config.init_from}: not a tokenizer folder ({error})") from None


def new_discriminator(config: Config) -> Discriminator | None:
    """The discriminators as the first step finds them, None for none. Raises ConfigError where they cannot be had."""
    discriminator = Discriminator(config.discriminator) if config.discriminator.enabled else None
    if config.init_discriminators:
        start_discriminators(config, discriminator)
    return discriminator


def new_state(config: Config, accelerator: Accelerator) -> TrainState:
    """All that the first step moves, on the accelerator's device. Raises ConfigError as `new_model` does."""
    model, settings = new_model(config), config.training

    def optimizer(*modules: torch.nn.Module) -> torch.optim.Optimizer:
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        # fused: one pass over memory instead of ten; a loss scale (fp16) it would take off itself, and skip unseen
        fused = accelerator.scaler is None
        return torch.optim.AdamW(
            trained, settings.learning_rate, settings.betas, weight_decay=settings.weight_decay, fused=fused
        )

    projection = feature_projection(config, model.config)
    # Networks go to their device as they are, not into DistributedDataParallel: see tokenizer/training/parallel.py.
    model.to(accelerator.device)
    state = TrainState(model=model, optimizer=None, ema=averaged(model, settings.ema_decay))
    if projection is not None:
        state.projection = projection.to(accelerator.device)
    state.optimizer = accelerator.prepare(optimizer(model, *filter(None, [projection])))
    if (discriminator := new_discriminator(config)) is not None:
        state.discriminator = discriminator.to(accelerator.device)
        state.discriminator_optimizer = accelerator.prepare(optimizer(state.discriminator))
    return state


def start_discriminators(config: Config, discriminator: Discriminator | None) -> None:
    """Fills the discriminators with those of `init_from`.

    Raises:
        ConfigError: there is nothing to take them from or to put them in, or they are of other sizes.
    """
    if config.init_from is None or discriminator is None:
        missing = "init_from" if config.init_from is None else "discriminator.enabled=true"
        raise ConfigError(f"init_discriminators=true needs {missing}: it starts the discriminators from init_from's")
    file, made = discriminator_file(config.init_from)
    try:
        initialise_discriminators(discriminator, file)
    except ValueError as error:
        now = dataclasses.asdict(config.discriminator)
        keys = [f"discriminator.{key}={json.dumps(made[key])}" for key in SIZES if made.get(key, now[key]) != now[key]]
        sizes = f"set {' '.join(keys)} as there" if keys else "set discriminator.* as there"
        raise ConfigError(
            f"init_discriminators: {error}; {sizes}, or init_discriminators=false to start anew"
        ) from None
    if made.get("padding", "zeros") != config.discriminator.padding:
        log.warning("the discriminators of %s were trained with discriminator.padding=%s", file, made.get("padding"))
    log.info("discriminators start from %s; their optimizer starts anew", file)


def feature_projection(config: Config, sizes: LMSPTConfig) -> torch.nn.Module | None:
    """For pooled and contrastive distillation.

    Drawn from a generator of its own, so that cells share all their other first weights.
    """
    if config.distillation.kind not in ("pooled", "contrastive"):
        return None
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if config.distillation.kind == "contrastive":
            return ContrastiveProjection(sizes.latent_dim, N_CLASSES)
        return FeatureProjection(sizes.latent_dim, teacher_width(teacher_config(config)))


def freeze_parts(config: Config, model: LMSPTModel) -> None:
    """Takes the gradient from what is not to move: `freeze`, and an auxiliary decoder that nothing hears.

    Raises:
        ConfigError: for names that are no part of this tokenizer, where nothing is left to train, or for a probe that
            has no decoder of its own.
    """
    for name in config.freeze:
        try:
            model.get_submodule(name).requires_grad_(False)
        except AttributeError:
            parts = ", ".join(part for part, module in model.named_children() if list(module.parameters()))
            raise ConfigError(f"freeze: {name!r} is no part of this tokenizer; its parts: {parts}") from None
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"freeze={config.freeze} leaves nothing to train")
    auxiliary = model.auxiliary_decoder
    if config.distillation.probes and (auxiliary is None or not any(p.requires_grad for p in auxiliary.parameters())):
        raise ConfigError(
            "distillation.probe trains an auxiliary decoder: model.auxiliary_decoder=decoupled, and not in `freeze`"
        )
    if config.distillation.auxiliary == "skipped" and auxiliary is not None:
        auxiliary.requires_grad_(False)
