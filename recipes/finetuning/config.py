"""The keys of `slm finetune`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recipes.plugins import plugins_key
from recipes.runs.run_folder import ADJUSTABLE
from slm.model.lora import LoraSettings
from slm.patterns import resolve_pattern
from slm.tasks.styles import PromptsConfig
from slm.training.config import TrainingConfig
from slm.training.samples import NoiseConfig


@dataclass
class CorpusSource:
    """One of several coded corpora."""

    path: str = field(metadata={"help": "the run_dir of `slm encode`"})
    weight: float = field(
        default=1.0, metadata={"help": "how often an epoch sees each of its utterances: 0.5 every other time, 3 thrice"}
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "those of task_weights that are learnt from it, such as [asr] where its voices are not to be "
            "learnt to speak with; null: all"
        },
    )

    def __post_init__(self) -> None:
        if self.tasks == []:
            raise ValueError(f"tasks: of corpus {self.path} empty; name some, or leave the corpus out")
        if not self.weight > 0:
            raise ValueError(f"weight: {self.weight} of corpus {self.path} must be above 0; leave it out instead")


@dataclass
class TextReplay:
    """Plain text that is trained on beside speech, so that the LLM keeps what it knows of text."""

    path: str = field(metadata={"help": "a file of texts, one a line; every fiftieth is kept for the valid loss"})
    weight: float = field(
        default=1.0, metadata={"help": "how often an epoch of the speech sees each line: 0.1 every tenth time"}
    )
    loss_weight: float = field(default=1.0, metadata={"help": "of a token of text in the loss"})

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.loss_weight < 0:
            raise ValueError(f"replay: weight {self.weight} must be above 0, loss_weight {self.loss_weight} not below")


@dataclass
class Config:
    """What is trained on what."""

    recipe = "finetune"  # what run.json calls the command

    run_dir: str = field(default="runs/finetune", metadata={"help": "run folder; the model goes to run_dir/model"})
    model: str = field(
        default="", metadata={"help": "embedded-lm, hub name or folder of a causal LM (or of one that speaks already)"}
    )
    random_weights: bool = field(
        default=False,
        metadata={
            "help": "the model's architecture alone, its weights drawn anew: a control for what pretraining gives"
        },
    )
    corpus: str = field(default="", metadata={"help": "coded corpus: the run_dir of `slm encode`"})
    corpora: list[CorpusSource] = field(
        default_factory=list, metadata={"help": "or several of one tokenizer, e.g. corpora.0.path=runs/codes"}
    )
    task_weights: dict[str, float] = field(
        default_factory=lambda: {"asr": 1.0, "tts": 1.0},
        metadata={"help": "weight of a token of each task in the loss; tasks of your own come from `plugins`"},
    )
    replay: TextReplay | None = field(
        default=None,
        metadata={
            "help": "plain text beside speech, as a task `text`: its valid loss is measured, whose exponential is the "
            "perplexity of a token (before the first step too with training.trainer.eval_on_start=true). With "
            "loss_weight 0 it is only measured"
        },
    )
    n_codebooks: int = field(default=1, metadata={"help": "codebooks that become speech tokens, from book 0 on"})
    pattern: Literal["auto", "semantic", "flatten", "delay", "parallel"] = field(
        default="auto",
        metadata={
            "help": "how the codes of a frame come in the sequence: semantic: book 0 alone; flatten: one after the "
            "other, n_codebooks positions a frame; delay: side by side, a position a frame, each book a frame later "
            "than the one before, with tables and heads of their own; parallel: the same, all books of one frame at "
            "once; auto: semantic or flatten, by n_codebooks"
        },
    )
    prosody_bins: int = field(
        default=8,
        metadata={
            "help": "of task tts-prosody: bins of each word's duration, F0 and energy, cut at the training split's "
            "quantiles; a model that has learnt some keeps those"
        },
    )
    further_weight: float = field(
        default=1.0,
        metadata={
            "help": "with delay or parallel: weight of the books beside book 0 in the loss, all together; book 0's is 1"
        },
    )
    speech_rows: Literal["noise", "codebook"] = field(
        default="noise",
        metadata={
            "help": "what a speech token starts from: noise, or its codebook vector (LM-SPT tokenizers), from "
            "which a short training on little data learns far sooner"
        },
    )
    normaliser: str = field(
        default="basic",
        metadata={"help": "of texts that the model writes (ASR): basic (basic:de, ...), whisper-english, none"},
    )
    prompt_normaliser: str = field(
        default="",
        metadata={
            "help": "of texts that it reads (TTS), e.g. none, which keeps case and punctuation; empty: as `normaliser`"
        },
    )
    eval_utterances: int | None = field(
        default=500,
        metadata={
            "help": "utterances of the valid split that losses are measured on, always the same; null: all",
            **ADJUSTABLE,
        },
    )
    prompts: PromptsConfig = field(
        default_factory=PromptsConfig, metadata={"help": "how tasks are asked for, beside their marks"}
    )
    noise: NoiseConfig = field(default_factory=NoiseConfig, metadata={"help": "changes to the prompts"})
    eval_transcripts: int = field(
        default=0,
        metadata={
            "help": "so many valid utterances are also written out at each evaluation: asr_wer, asr_cer (and of any "
            "task that answers in text)",
            **ADJUSTABLE,
        },
    )
    max_length: int | None = field(default=None, metadata={"help": "longer sequences are left out; null: the model's"})
    lora: LoraSettings | None = field(
        default=None, metadata={"help": "train adapters, e.g. lora.rank=16; null: in full"}
    )
    weights: Literal["fp32", "bf16"] = field(
        default="fp32", metadata={"help": "how weights are held (bf16: LoRA only)"}
    )
    training: TrainingConfig = field(default_factory=TrainingConfig, metadata={"help": "steps, rates, engine"})
    seed: int = field(default=0, metadata={"help": "of new rows, order and noise"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    precision: str = field(default="auto", metadata={"help": "auto, fp32, bf16 or fp16: what is computed in"})
    plugins: list[str] = plugins_key()

    def __post_init__(self) -> None:
        if self.replay is not None and "text" in self.task_weights:
            raise ValueError("replay and task_weights.text: both are a task called text; give one of them")
        weights = self.task_weights.values()
        if any(weight < 0 for weight in weights) or not any(weights):
            raise ValueError(f"task_weights: {self.task_weights} must not fall below 0, and one must be above")
        if self.random_weights and self.lora is not None:
            raise ValueError("random_weights: adapters on a base that knows nothing learn little; train in full")
        if self.training.shared_codebook and self.lora is not None:
            raise ValueError("training.shared_codebook: trained in full; leave lora out")
        if self.training.freeze_layers and self.lora is not None:
            raise ValueError("training.freeze_layers: adapters leave every layer's own weights as they are; drop one")
        resolve_pattern(self.pattern, self.n_codebooks)
        if self.prosody_bins < 2:
            raise ValueError(f"prosody_bins: {self.prosody_bins} must be at least 2")
        if self.further_weight <= 0:
            raise ValueError(f"further_weight: {self.further_weight:g} must be above 0, or its books learn nothing")
        if self.corpus and self.corpora:
            raise ValueError("corpus and corpora: give one of them")
        for key in ("wordings", "languages"):
            if others := [task for task in getattr(self.prompts, key) if not self.task_weights.get(task)]:
                raise ValueError(
                    f"prompts.{key}: {', '.join(others)} is not trained; set its task_weights, or leave it"
                )
        if self.eval_utterances is not None and self.eval_utterances < 1:
            raise ValueError(f"eval_utterances: {self.eval_utterances} must be at least 1, or null for all")
        if self.eval_transcripts < 0:
            raise ValueError(f"eval_transcripts: {self.eval_transcripts} must be at least 1, or 0 for none")
        if self.weights != "fp32" and self.lora is None:
            raise ValueError(
                "weights: bf16 loses small updates when trained in full; use fp32 with precision=bf16, or lora"
            )
