"""Whether the published sizes train here, by hand: ``python benchmarks/real_shapes.py [release-12.5hz paper-12.5hz]``.

Runs whole training steps of ``slm train-tokenizer`` at real shapes on random data and random weights: one 6 s crop, all
published losses and discriminators, a teacher of Whisper-small's shape (published: large-v3), bf16 (autocast),
activation checkpointing. Each preset runs in a process of its own. Printed: parameters, seconds of each step, peak
resident memory, the loss.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time

import torch
from accelerate import Accelerator
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tokenizer.model.configuration import preset_config
from tokenizer.model.modeling import LMSPTModel
from tokenizer.teacher.whisper import SpeechTeacher
from tokenizer.training.discriminator import Discriminator, DiscriminatorConfig
from tokenizer.training.losses import LossWeights, MultiScaleMelLoss
from tokenizer.training.objective import Objective
from tokenizer.training.state import CodecTrainingConfig, TrainState
from tokenizer.training.step import train_step

WHISPER_SMALL = {"d_model": 768, "encoder_layers": 12, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072}


def measure(preset: str, options: argparse.Namespace) -> None:
    """Takes the steps and prints what they cost."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    accelerator = Accelerator(mixed_precision="no" if options.precision == "fp32" else "bf16", cpu=True)
    config = CodecTrainingConfig(batch_size=1, revive_steps=1, activation_checkpointing=options.checkpointing)
    model = LMSPTModel(preset_config(preset)).train()
    if options.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    discriminator = Discriminator(DiscriminatorConfig(band_channels=64, padding="reflect"))
    state = TrainState(
        model=model,
        optimizer=accelerator.prepare(torch.optim.AdamW(model.parameters(), config.learning_rate, config.betas)),
        discriminator=discriminator,
        discriminator_optimizer=accelerator.prepare(
            torch.optim.AdamW(discriminator.parameters(), config.learning_rate, config.betas)
        ),
    )
    teacher = SpeechTeacher(WhisperEncoder(WhisperConfig(**WHISPER_SMALL)))
    objective = Objective(
        LossWeights(), MultiScaleMelLoss(model.config.sampling_rate), teacher, distillation_weight=100.0
    )
    counts = {
        "tokenizer": model,
        "discriminators": discriminator,
        "teacher (frozen)": teacher,
    }
    sizes = ", ".join(f"{name} {sum(p.numel() for p in m.parameters()) / 1e6:.1f} M" for name, m in counts.items())
    print(f"{preset}: {sizes}; {options.precision}, crop {options.crop_s:g} s, {options.threads} thread(s)", flush=True)
    samples = round(options.crop_s * model.config.sampling_rate)
    for step in range(options.steps):
        batch = {
            "input_values": 0.1 * torch.randn(1, 1, samples),
            "padding_mask": torch.ones(1, samples, dtype=torch.bool),
            "n_acoustic_books": torch.tensor([model.config.num_codebooks - 1]),
            "semantic_only": torch.tensor([False]),
        }
        started = time.perf_counter()
        metrics = train_step(state, [batch], objective, config, accelerator)
        state.step += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{preset}: step {step + 1}: {time.perf_counter() - started:.1f} s, peak memory {peak:.2f} GiB, loss "
            f"{metrics['loss/total']:.2f}, gradient norm {metrics['gradient_norm']:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["release-12.5hz", "paper-12.5hz"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--crop-s", type=float, default=6.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    options = parser.parse_args()
    failed = []
    for preset in options.presets:  # a fresh process each: a peak is one preset's own
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(preset, options))
        process.start()
        process.join()
        if process.exitcode:
            failed.append(f"{preset}: ended with {process.exitcode} (negative: killed, -9 is often out of memory)")
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
