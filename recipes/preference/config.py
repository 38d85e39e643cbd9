"""The keys of `slm train-preference`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from eval.judges.config import JudgeConfig
from recipes.plugins import plugins_key
from slm.model.lora import LoraSettings
from slm.settings import SynthesizeSettings
from slm.training.config import TrainingConfig


@dataclass
class RewardSettings:
    """What an answer is worth: 0 at best, less for what is heard wrong, for its length, and where it did not end."""

    length_weight: float = field(
        default=0.5,
        metadata={
            "help": "of |ln(duration / expected duration)| beyond `length_tolerance`; expected is the text's length by "
            "the rate of speech that the model was trained on. 0: no such term"
        },
    )
    length_tolerance: float = field(
        default=0.3, metadata={"help": "share by which an answer may be longer, or shorter, and lose nothing"}
    )
    stop_penalty: float = field(
        default=1.0, metadata={"help": "taken off an answer that was cut off, is a loop, silent or not finite"}
    )

    def __post_init__(self) -> None:
        if min(self.length_weight, self.length_tolerance, self.stop_penalty) < 0:
            raise ValueError("reward: length_weight, length_tolerance and stop_penalty must be 0 or more")


@dataclass
class DPOSettings:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    samples: int = field(default=8, metadata={"help": "answers drawn for each text, of which two make a pair"})
    margin: float = field(
        default=0.1,
        metadata={"help": "reward by which the best answer must be above the worst; other texts are ties, and dropped"},
    )
    beta: float = field(default=0.1, metadata={"help": "how strongly the start holds the model"})
    sft_weight: float = field(
        default=0.0, metadata={"help": "of the chosen answers' own loss per token, added to DPO's; 0: none"}
    )

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"dpo.samples: {self.samples} must be at least 2: a pair is two answers")
        if self.margin <= 0 or self.beta <= 0 or self.sft_weight < 0:
            raise ValueError("dpo: margin and beta must be above 0, sft_weight 0 or more")


@dataclass
class GRPOSettings:
    """Group relative policy optimisation (DeepSeekMath, Shao et al. 2024, arXiv 2402.03300)."""

    group_size: int = field(default=8, metadata={"help": "answers drawn for each text of a step"})
    clip: float = field(default=0.2, metadata={"help": "ratios of probabilities count from 1 - clip to 1 + clip"})
    kl_weight: float = field(
        default=0.04,
        metadata={
            "help": "of the divergence from the start in the loss; above 0 a training in full holds the start in "
            "memory too (with lora it is the model without adapters)"
        },
    )
    updates: int = field(
        default=1, metadata={"help": "optimizer steps that learn from the same answers; above 1 the clipping counts"}
    )

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(f"grpo.group_size: {self.group_size} must be at least 2: rewards count within a group")
        if not 0 < self.clip < 1 or self.kl_weight < 0 or self.updates < 1:
            raise ValueError("grpo: 0 < clip < 1, kl_weight 0 or more and updates at least 1 are needed")


def _training() -> TrainingConfig:
    return TrainingConfig(
        steps=200, learning_rate=5e-6, warmup_steps=10, log_steps=5, eval_steps=50, save_steps=50, schedule="linear"
    )


def _sampling() -> SynthesizeSettings:
    return SynthesizeSettings(temperature=1.0, top_k=0, word_retries=0)


@dataclass
class Config:
    """What is preferred, by which judge, and how it is learnt."""

    recipe = "train-preference"  # what run.json calls the command

    run_dir: str = field(default="runs/preference", metadata={"help": "run folder; the model goes to run_dir/model"})
    model: str = field(
        default="", metadata={"help": "the start: a model that speaks (RUN_DIR/model of `slm finetune`)"}
    )
    method: Literal["dpo", "grpo"] = field(
        default="dpo",
        metadata={
            "help": "dpo: pairs of the start's own answers, drawn and judged once; grpo: groups of answers, drawn and "
            "judged anew at each step"
        },
    )
    task: Literal["", "tts", "tts-aligned"] = field(
        default="",
        metadata={"help": "how texts are said: tts, or word by word; empty: tts-aligned where the model learnt it"},
    )
    corpus: str = field(
        default="", metadata={"help": "texts to say: the run_dir of `slm encode` (splits train and valid)"}
    )
    texts: str = field(default="", metadata={"help": "or a file of texts, one a line"})
    limit: int | None = field(
        default=None, metadata={"help": "only so many of the texts, chosen at random, always the same"}
    )
    eval_texts: int = field(
        default=100,
        metadata={
            "help": "held-out texts that are spoken at each evaluation and judged by both judges: of the corpus's "
            "valid split, or taken out of the texts"
        },
    )
    judge: JudgeConfig = field(
        default_factory=lambda: JudgeConfig(name="embedded-recogniser"),
        metadata={"help": "who judges what is learnt from: a folder or name"},
    )
    second_judge: JudgeConfig = field(
        default_factory=lambda: JudgeConfig(name="embedded-second-recogniser"),
        metadata={"help": "another one, which is never learnt from: better for `judge` alone is no better"},
    )
    normaliser: str = field(
        default="basic", metadata={"help": "of texts and of what is heard, before CER and WER: basic (basic:de, ...)"}
    )
    reward: RewardSettings = field(default_factory=RewardSettings, metadata={"help": "what an answer is worth"})
    dpo: DPOSettings = field(default_factory=DPOSettings, metadata={"help": "with method=dpo"})
    grpo: GRPOSettings = field(default_factory=GRPOSettings, metadata={"help": "with method=grpo"})
    sampling: SynthesizeSettings = field(
        default_factory=_sampling,
        metadata={"help": "how answers to learn from are drawn: by the model's own probabilities"},
    )
    decoding: SynthesizeSettings = field(
        default_factory=SynthesizeSettings, metadata={"help": "how held-out texts are spoken: as `slm synthesize` does"}
    )
    tokenizer: str = field(default="", metadata={"help": "speech tokenizer; empty: the one the model was trained with"})
    lora: LoraSettings | None = field(
        default=None, metadata={"help": "train adapters, e.g. lora.rank=16; null: in full"}
    )
    weights: Literal["fp32", "bf16"] = field(
        default="fp32", metadata={"help": "how weights are held (bf16: LoRA only)"}
    )
    training: TrainingConfig = field(default_factory=_training, metadata={"help": "steps, rates"})
    seed: int = field(default=0, metadata={"help": "of the order of texts and pairs, and of new adapters"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    precision: str = field(default="auto", metadata={"help": "auto, fp32, bf16 or fp16: what is computed in"})
    plugins: list[str] = plugins_key()

    def __post_init__(self) -> None:
        if self.corpus and self.texts:
            raise ValueError("corpus and texts: give one of them")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: {self.limit} must be at least 1, or null for all")
        if self.eval_texts < 1:
            raise ValueError(
                f"eval_texts: {self.eval_texts} must be at least 1: without any, nobody sees what is gamed"
            )
        if not self.sampling.temperature or self.sampling.retries or self.sampling.word_retries:
            raise ValueError(
                "sampling: temperature must be above 0 (a greedy answer is always the same), retries and "
                "word_retries 0 (an answer that does not end is what the others are better than)"
            )
        if self.sampling.multi_token > 1 or self.decoding.multi_token > 1:
            raise ValueError(
                "sampling.multi_token, decoding.multi_token: heads for further tokens are not kept while preferences "
                "are learnt; leave them at 1"
            )
        if self.weights != "fp32" and self.lora is None:
            raise ValueError(
                "weights: bf16 loses small updates when trained in full; use fp32 with precision=bf16, or lora"
            )
        training, updates = self.training, self.grpo.updates
        if training.freeze_layers and self.lora is not None:
            raise ValueError("training.freeze_layers: adapters leave every layer's own weights as they are; drop one")
        if training.multi_token is not None:
            raise ValueError("training.multi_token: answers are preferred as wholes; it is for slm finetune")
        if training.alignment is not None:
            raise ValueError("training.alignment: preferences are about whole answers; it is for slm finetune")
        if training.epochs is not None:
            raise ValueError("training.epochs: how many pairs or answers there are is not known before; give steps")
        if training.deepspeed or training.fsdp:
            raise ValueError(
                "training.deepspeed and training.fsdp: a model that is held in parts cannot speak while it learns; a "
                "large one is trained with lora"
            )
        if self.method == "grpo":
            if self.sampling.guidance > 1:
                raise ValueError("sampling.guidance: its answers are not drawn by the model's own probabilities; set 1")
            if training.steps % updates or training.save_steps % updates:
                raise ValueError(
                    f"grpo.updates: training.steps ({training.steps}) and training.save_steps ({training.save_steps}) "
                    f"must be multiples of {updates}, since no checkpoint keeps the answers of a step"
                )
        names = measured_names()
        if training.keep == "best" and training.keep_by not in names:
            raise ValueError(f"training.keep_by: {training.keep_by!r} is not measured; there are {', '.join(names)}")


def measured_names() -> list[str]:
    """What is measured on held-out texts such that less is better: what `training.keep_by` may go by."""
    return ["judge_wer", "judge_cer", "second_judge_wer", "second_judge_cer", "kl", "stop_failures_per_1000"]
