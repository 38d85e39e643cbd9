"""Trains the recogniser with transformers' Trainer on augmented waveforms in an order fixed by (seed, step, sample).

Shapes: B batch, S samples at 16 kHz, M mel channels, T mel frames, L label characters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainingArguments

from tokenizer.data.augmentation import AugmentationConfig, augment
from tokenizer.data.mixing import TrainingAudio
from tokenizer.settings import ADJUSTABLE, EXTENDABLE
from tokenizer.teacher.recogniser import EOS, Recogniser, character_tokenizer, greedy_ctc
from tokenizer.teacher.whisper import MEL_HOP, WHISPER_RATE_HZ, WhisperLogMel


@dataclass
class RecogniserTrainingConfig:
    """Steps, batch and learning rate of the recogniser's training."""

    steps: int = field(
        default=3000,
        metadata={"help": "optimizer steps; a run, a complete one too, goes on where there are more", **EXTENDABLE},
    )
    batch_size: int = field(
        default=32, metadata={"help": "utterances per step, of all processes and accumulations together"}
    )
    accumulation: int = field(
        default=1, metadata={"help": "forward passes per step, of batch_size / (accumulation x processes) each"}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate (AdamW)"})
    warmup_share: float = field(default=0.1, metadata={"help": "share of the steps that warm up linearly"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's weight decay"})
    save_steps: int = field(default=500, metadata={"help": "steps between checkpoints", **ADJUSTABLE})
    keep_checkpoints: int = field(default=2, metadata={"help": "newest checkpoints to keep", **ADJUSTABLE})
    validate_steps: int = field(
        default=250, metadata={"help": "steps between greedy-CTC scores of the valid split", **ADJUSTABLE}
    )
    log_steps: int = field(default=25, metadata={"help": "steps between logged losses", **ADJUSTABLE})
    num_workers: int = field(default=0, metadata={"help": "processes that load and augment audio", **ADJUSTABLE})
    process_timeout_s: float = field(
        default=7200.0,
        metadata={
            "help": "how long processes wait for each other before they give up, in seconds: longer than the first "
            "one takes to validate, and to write a checkpoint",
            **ADJUSTABLE,
        },
    )

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "batch_size",
            "accumulation",
            "save_steps",
            "keep_checkpoints",
            "validate_steps",
            "log_steps",
        )
        problems = [f"{name}={getattr(self, name)}: must be at least 1" for name in counts if getattr(self, name) < 1]
        if self.process_timeout_s < 1:
            problems.append(f"process_timeout_s={self.process_timeout_s:g}: must be at least 1; 7200 are two hours")
        if self.accumulation > 0 and self.batch_size % self.accumulation:
            problems.append(f"batch_size={self.batch_size}: must divide by accumulation={self.accumulation}")
        if not 0 <= self.warmup_share < 1:
            problems.append(f"warmup_share={self.warmup_share}: must lie in [0, 1)")
        if problems:
            raise ValueError("training: " + "; ".join(problems))


def training_arguments(
    settings: RecogniserTrainingConfig, folder: str, micro_batch: int, precision: str, device: str, seed: int
) -> TrainingArguments:
    """What transformers' Trainer is told; `micro_batch` utterances go through one process at once.

    Args:
        settings: Steps, rates and when to save.
        folder: Where checkpoints go.
        micro_batch: Of one forward pass of one process.
        precision: "fp32", "bf16" or "fp16".
        device: "cpu" or "cuda".
        seed: Of what the Trainer draws.
    """
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=settings.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup_share * settings.steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=1.0,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device == "cpu",
        ddp_timeout=round(settings.process_timeout_s),
        save_steps=settings.save_steps,
        save_total_limit=settings.keep_checkpoints,
        eval_strategy="steps",
        eval_steps=settings.validate_steps,
        logging_steps=settings.log_steps,
        dataloader_num_workers=settings.num_workers,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
    )
    if not arguments.use_cpu and arguments.world_size == 1:
        # With several GPUs in one process the Trainer would take that many batches as one, for DataParallel.
        arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class TrainingUtterances(Dataset):
    """Item n of an endless augmented run: {"samples" (S,), "labels" (L,)}, drawn from (seed, n) alone.

    `texts` maps an utterance's id to its characters.
    """

    def __init__(
        self,
        audio: TrainingAudio,
        texts: dict[str, str],
        augmentation: AugmentationConfig,
        length: int,
        window_s: float,
        seed: int,
    ) -> None:
        self.audio, self.augmentation, self.length, self.seed = audio, augmentation, length, seed
        self.window_samples = round(window_s * WHISPER_RATE_HZ)
        encode = character_tokenizer().encode
        self.labels = {name: np.array([*encode(text, add_special_tokens=False), EOS]) for name, text in texts.items()}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        utterance, samples = self.audio.recording(self.audio.key(position))
        rng = np.random.default_rng((self.seed, position))
        changed = augment(samples, self.augmentation, rng, WHISPER_RATE_HZ)
        if len(changed) > self.window_samples:  # slowed past the window: the words would be cut
            changed = samples
        return {"samples": changed, "labels": self.labels[utterance.id], "padding": rng.uniform()}


@dataclass
class RecogniserCollator:
    """Pads to the longest of the batch and, for a random part of the rest, on towards the window.

    At inference inputs are padded to the window; a model that only ever saw tight batches would not know that silence.
    """

    log_mel: WhisperLogMel
    window_samples: int
    multiple: int = 2 * MEL_HOP  # samples: whole encoder frames, or whole codes of a quantizer

    def __call__(self, items: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        longest = max(len(item["samples"]) for item in items)
        fraction = max(0.0, 2 * float(items[0]["padding"]) - 1)
        wanted = longest + fraction * (self.window_samples - longest)
        wanted = min(-(-int(wanted) // self.multiple) * self.multiple, self.window_samples)
        samples = torch.stack(
            [torch.from_numpy(np.pad(i["samples"][:wanted], (0, max(0, wanted - len(i["samples"]))))) for i in items]
        )
        labels = torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(item["labels"]) for item in items], batch_first=True, padding_value=-100
        )
        lengths = torch.tensor([min(len(item["samples"]), wanted) for item in items])
        return {"input_features": self.log_mel(samples), "labels": labels, "lengths": lengths}


class RecogniserTrainer(Trainer):
    """Trainer whose loss is the joint CTC / attention loss and whose data order is the data set's own."""

    def __init__(
        self,
        model: Recogniser,
        args: TrainingArguments,
        train_dataset: TrainingUtterances,
        data_collator: RecogniserCollator,
        ctc_weight: float,
        validate: Callable[[Recogniser], dict[str, float]],
        **kwargs,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=train_dataset,
            data_collator=data_collator,
            **kwargs,
        )
        self.ctc_weight = ctc_weight
        self.validate = validate
        self.model_accepts_loss_kwargs = False  # the loss is a mean: Trainer divides it by the accumulation

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs, ctc_weight=self.ctc_weight).loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.accelerator.unwrap_model(model).maintain_codebook()
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        self.model.eval()
        metrics = self.validate(self.model)
        self.model.train()
        self.log(metrics)
        return metrics


@torch.no_grad()
def greedy_ctc_texts(recogniser: Recogniser, waveforms: list[np.ndarray], batch_size: int = 32) -> list[str]:
    """Greedy CTC transcripts of waveforms (S,) at 16 kHz, each padded to the window as at inference."""
    config = recogniser.config
    log_mel = WhisperLogMel(config.num_mel_bins)
    window = config.max_source_positions * 2 * MEL_HOP
    decode = character_tokenizer().decode
    texts = []
    for start in range(0, len(waveforms), batch_size):
        chunk = [np.pad(w[:window], (0, max(0, window - len(w)))) for w in waveforms[start : start + batch_size]]
        features = log_mel(torch.from_numpy(np.stack(chunk))).to(recogniser.device)
        lengths = torch.tensor([min(len(w), window) for w in waveforms[start : start + batch_size]])
        paths = greedy_ctc(recogniser.ctc_logits(features, lengths))
        texts += [decode(ids, skip_special_tokens=True) for ids in paths]
    return texts
