"""The keys of `slm train-tokenizer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from recipes.config import ConfigError
from recipes.runs.run_folder import ADJUSTABLE
from recipes.runs.tracking import Tracker
from tokenizer.data.augmentation import AugmentationConfig
from tokenizer.data.crops import CropConfig
from tokenizer.data.utterances import DataSource
from tokenizer.model.configuration import LMSPTConfig, preset_config
from tokenizer.model.presets import PRESETS
from tokenizer.teacher.distillation import DistillationConfig
from tokenizer.teacher.whisper import TeacherConfig
from tokenizer.training.discriminator import DiscriminatorConfig
from tokenizer.training.invariance import InvarianceConfig
from tokenizer.training.losses import LossWeights
from tokenizer.training.state import CodecTrainingConfig
from tokenizer.training.stft import Padding


@dataclass
class Config:
    """Everything of one tokenizer training."""

    run_dir: str = field(default="runs/tokenizer", metadata={"help": "run folder; the model goes to run_dir/model"})
    data: list[DataSource] = field(
        default_factory=list, metadata={"help": "where training and valid recordings come from"}
    )
    preset: str = field(default="nano-12.5hz", metadata={"help": f"size and frame rate: {', '.join(sorted(PRESETS))}"})
    model: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "LMSPTConfig fields that differ from the preset"}
    )
    teacher: TeacherConfig | None = field(
        default_factory=TeacherConfig,
        metadata={"help": "speech encoder; null with distillation.kind=none or contrastive only"},
    )
    distillation: DistillationConfig = field(
        default_factory=DistillationConfig, metadata={"help": "what the teacher teaches"}
    )
    weights: LossWeights = field(default_factory=LossWeights, metadata={"help": "what each loss counts"})
    mel_padding: Padding = field(
        default="zeros", metadata={"help": "beyond a crop's ends in the mel loss: zeros, or (published) reflect"}
    )
    discriminator: DiscriminatorConfig = field(
        default_factory=DiscriminatorConfig, metadata={"help": "adversarial training"}
    )
    crops: CropConfig = field(
        default_factory=CropConfig, metadata={"help": "crops, quantizer dropout, semantic-only share"}
    )
    augmentation: AugmentationConfig = field(
        default_factory=lambda: AugmentationConfig(noise_probability=0.0), metadata={"help": "changes to the waveforms"}
    )
    invariance: InvarianceConfig = field(
        default_factory=InvarianceConfig,
        metadata={"help": "semantic codes that stay the same under noise and gain (off by default)"},
    )
    training: CodecTrainingConfig = field(
        default_factory=CodecTrainingConfig, metadata={"help": "steps, batch, optimizer"}
    )
    init_from: str | None = field(
        default=None,
        metadata={
            "help": "start from this tokenizer folder; at another frame rate what fits is reused. Optimizers start anew"
        },
    )
    init_discriminators: bool = field(
        default=False,
        metadata={
            "help": "take the discriminators of init_from too, all or none: those in its folder `discriminators/` (slm "
            "export discriminators=true), or in the last checkpoint of its run. Their optimizer starts anew"
        },
    )
    freeze: list[str] = field(
        default_factory=list,
        metadata={"help": "parts of the tokenizer that must not move, e.g. [auxiliary_decoder] with init_from"},
    )
    precision: str = field(
        default="auto",
        metadata={"help": "auto, fp32 (a GPU convolves it in TF32, as torch is set), bf16, or on a GPU fp16"},
    )
    trackers: list[Tracker] = field(
        default_factory=lambda: ["tensorboard"],
        metadata={
            "help": "beside metrics.jsonl: tensorboard, wandb (project and mode from WANDB_*)",
            **ADJUSTABLE,
        },
    )
    seed: int = field(default=0, metadata={"help": "seed of weights, order, crops and augmentation"})

    def __post_init__(self) -> None:
        if self.distillation.semantic_reconstruction and not self.crops.semantic_only:
            raise ValueError(
                "distillation.semantic_reconstruction: is the loss of the items that crops.semantic_only leaves book 0 "
                "alone, of which there are none; set crops.semantic_only=0.3 or so"
            )


def model_sizes(config: Config) -> LMSPTConfig:
    """The preset's sizes with what `model` changes. Raises ConfigError where they cannot be."""
    try:
        sizes = preset_config(config.preset, **config.model)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"preset={config.preset}, model={config.model}: {error}") from None
    if config.invariance.weight and sizes.semantic_quantizer == "fsq":
        raise ConfigError("invariance.weight: needs a vector book's entries, which semantic_quantizer=fsq lacks")
    return sizes
