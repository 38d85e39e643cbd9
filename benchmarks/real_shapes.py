"""Whether the published sizes train here, by hand: ``python benchmarks/real_shapes.py [release-12.5hz paper-12.5hz]``.

Runs whole training steps of ``slm train-tokenizer`` at real shapes on random data and random weights: one 6 s crop, all
published losses and discriminators, a teacher of Whisper-small's shape (published: large-v3), bf16 (autocast),
activation checkpointing. Each preset runs in a process of its own. Printed: parameters, seconds of each step, peak
resident memory, the loss.

``python benchmarks/real_shapes.py --llm`` does the same for the fine-tuned LLM: Qwen2.5-0.5B's shape (vocabulary of
151,936) with random weights is given 16,384 speech tokens, saved, loaded, asked for a transcript and for speech, and
trained by LoRA on 512 tokens. ``--llm full`` trains it in full too, which takes about 10 GiB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from slm.generation import SpeechLM, generate_speech, generate_text
from slm.model.lora import LoraSettings, add_lora
from slm.model.modeling import load_llm, save_slm
from slm.model.speech_rows import extend_with_speech
from slm.settings import SpeechLimits, SynthesizeSettings, TranscribeSettings
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.training.answer_loss import AnswerLoss
from slm.training.trainer import bare_model
from slm.vocabulary import add_speech
from tokenizer.model.configuration import preset_config
from tokenizer.model.modeling import LMSPTModel
from tokenizer.teacher.whisper import SpeechTeacher
from tokenizer.training.discriminator import Discriminator, DiscriminatorConfig
from tokenizer.training.losses import LossWeights, MultiScaleMelLoss
from tokenizer.training.objective import Objective
from tokenizer.training.state import CodecTrainingConfig, TrainState
from tokenizer.training.step import train_step

WHISPER_SMALL = {"d_model": 768, "encoder_layers": 12, "encoder_attention_heads": 12, "encoder_ffn_dim": 3072}
QWEN_0_5B = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SPEECH_ROWS = 16_384
FRAME_RATE_HZ = 12.5
IGNORED = -100


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


@contextmanager
def measured(what: str) -> Iterator[None]:
    """Prints the seconds of a block and the process's peak of resident memory so far."""
    started = time.perf_counter()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"LLM: {what}: {time.perf_counter() - started:.1f} s, peak memory {peak:.2f} GiB", flush=True)


def text_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with as many entries as asked for; those beyond the bytes occur in no text."""
    entries = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    entries += [f"<filler {number}>" for number in range(size - len(entries))]
    made = Tokenizer(models.BPE(vocab={entry: number for number, entry in enumerate(entries)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|end|>", padding_side="left")


def grow(folder: Path, options: argparse.Namespace) -> None:
    """Makes the model in `folder/base`, gives it speech, and saves it in `folder/slm`."""
    sizes = options.llm_sizes
    with measured("random weights, saved"):
        Qwen2ForCausalLM(Qwen2Config(**sizes)).save_pretrained(folder / "base")
        text_tokenizer(sizes["vocab_size"]).save_pretrained(folder / "base")
    with measured("loaded"):
        model, tokenizer, _ = load_llm(str(folder / "base"))
    before = model.get_input_embeddings().weight.shape[0]
    with measured(f"{options.speech_rows:,} speech tokens added"):
        vocabulary = add_speech(tokenizer, [options.speech_rows], fingerprint="0" * 64, frame_rate=FRAME_RATE_HZ)
    with measured("embedding grown"):
        extend_with_speech(model, vocabulary, seed=0)
    rows, count = model.get_input_embeddings().weight.shape[0], sum(p.numel() for p in model.parameters())
    print(f"LLM: rows {before:,} -> {rows:,}, parameters {count / 1e6:.1f} M", flush=True)
    with measured("saved"):
        save_slm(model, tokenizer, vocabulary, folder / "slm")


def generate(folder: Path, options: argparse.Namespace) -> None:
    """Loads the grown model and asks it for a transcript of 10 s and for 4 s of speech."""
    with measured("loaded again"):
        speech_lm = SpeechLM.load(folder / "slm")
    codes = np.random.default_rng(0).integers(0, options.speech_rows, (1, round(10 * FRAME_RATE_HZ)))
    with measured("a transcript of 10 s"):
        settings = TranscribeSettings(tokens_per_s=3.2)
        (written,) = generate_text(speech_lm, get_task("asr"), [UtteranceTokens(codes=codes)], settings)
    text = speech_lm.vocabulary.encode_text(speech_lm.text_tokenizer, "random weights say nothing that anybody knows")
    with measured("speech for 45 letters, at most 4 s"):
        settings, limits = SynthesizeSettings(temperature=1.0), SpeechLimits(4.0)
        (spoken,) = generate_speech(speech_lm, get_task("tts"), [UtteranceTokens(text=text)], [limits], settings)
    legal = bool((spoken.codes >= 0).all() and (spoken.codes < options.speech_rows).all())
    print(f"LLM: {written.n_tokens} tokens of text; {spoken.codes.shape[1]} codes, all legal: {legal}", flush=True)


def train_lora(folder: Path, options: argparse.Namespace) -> None:
    """Steps of LoRA with the speech rows trained, in fp32."""
    model, _, vocabulary = load_llm(str(folder / "slm"))
    _train("LoRA", add_lora(model, vocabulary, LoraSettings()), vocabulary.new_ids, options)


def train_full(folder: Path, options: argparse.Namespace) -> None:
    """Steps that train everything, in fp32."""
    model, _, vocabulary = load_llm(str(folder / "slm"))
    _train("full", model, vocabulary.new_ids, options)


def _train(kind: str, model: nn.Module, speech_ids: Sequence[int], options: argparse.Namespace) -> None:
    bare = bare_model(model)
    answers, learnt = AnswerLoss(bare), [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt)
    print(f"LLM: {kind}: {sum(p.numel() for p in learnt) / 1e6:.1f} M parameters are trained", flush=True)
    ids = torch.tensor(list(speech_ids))[torch.randint(len(speech_ids), (1, options.llm_tokens))]
    labels = ids.clone()
    labels[:, : options.llm_tokens // 2] = IGNORED
    batch = {"input_ids": ids, "position_ids": torch.arange(options.llm_tokens)[None], "labels": labels}
    for step in range(options.steps):
        with measured(f"{kind}, step {step + 1} of {options.llm_tokens} tokens, half of them answer"):
            answers(model, **batch, weights=(labels != IGNORED).float(), ignored=IGNORED).backward()
            optimizer.step()
            optimizer.zero_grad()


def in_a_process(work: Callable[..., None], *args: Any) -> str | None:
    """Runs `work` in a process of its own, whose peak of memory is its own; says so if it failed."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=args)
    process.start()
    process.join()
    ended = f"ended with {process.exitcode} (negative: killed, -9 is often out of memory)"
    return ended if process.exitcode else None


def with_threads(work: Callable[..., None], folder: Path, options: argparse.Namespace) -> None:
    """One part of the LLM's measurements, in its process."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    work(folder, options)


def measure_llm(options: argparse.Namespace) -> list[str]:
    """All that is asked of the LLM; what failed."""
    work = [grow, generate, train_lora] + ([train_full] if options.llm == "full" else [])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for part in work:
            if ended := in_a_process(with_threads, part, Path(folder), options):
                return [f"{part.__name__}: {ended}"]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["release-12.5hz", "paper-12.5hz"])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--crop-s", type=float, default=6.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--llm", nargs="?", const="lora", choices=["lora", "full"], help="the LLM, not the tokenizers")
    parser.add_argument("--llm-tokens", type=int, default=512, help="of a training step")
    parser.add_argument("--folder", help="where the LLM is written meanwhile (about 4.5 GB); default: the system's")
    options = parser.parse_args()
    options.llm_sizes, options.speech_rows = QWEN_0_5B, SPEECH_ROWS
    if options.llm:
        failed = measure_llm(options)
    else:
        ended = {preset: in_a_process(measure, preset, options) for preset in options.presets}
        failed = [f"{preset}: {how}" for preset, how in ended.items() if how]
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
