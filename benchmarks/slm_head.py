"""Memory and time of the SLM's loss as the vocabulary grows: ``python benchmarks/slm_head.py [--model FOLDER]``.

    python benchmarks/slm_head.py [--rows 32000 151936 263232] [--tokens 512] [--width 640] [--rounds 3] [--threads N]
                                  [--plot FILE.svg]

The loss and its gradients for a batch of which two fifths are answers: `whole`, logits of all positions, as a plain
transformers training makes them, and `answers`, `slm.training.answer_loss`; full training (a tied table that learns),
with four layers and random weights; and `answers, frozen table`, as under adapters. Each in a process of its own: the
peak is that process's memory beyond what it had before the first step (Linux). With --model, a LoRA step of that
causal LM with 2,048 new rows too: as PEFT does it (a copy of the table in each pass, whole logits), and as `slm
finetune` does.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from slm.training.answer_loss import AnswerLoss
from slm.training.trainer import bare_model

IGNORED = -100
NEW_ROWS = 2048
KINDS = ("whole", "answers", "answers, frozen table")


def batch(rows: int, tokens: int) -> dict[str, Tensor]:
    """Rows of 128 tokens, the last two fifths of each the answer."""
    ids = torch.randint(1, rows, (tokens // 128, 128), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :77] = IGNORED
    positions = torch.arange(128).expand_as(ids)
    return {"input_ids": ids, "position_ids": positions, "labels": labels, "weights": (labels != IGNORED).float()}


def whole_logits(model: nn.Module, input_ids: Tensor, position_ids: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The loss as it is written where nobody thinks of the vocabulary."""
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=IGNORED)
    return (losses * weights[:, 1:].flatten()).sum()


def make_model(kind: str, options: argparse.Namespace, rows: int) -> nn.Module:
    """The model of a row of the table."""
    torch.manual_seed(0)
    if not kind.startswith("LoRA"):
        sizes = {"hidden_size": options.width, "intermediate_size": 3 * options.width, "num_hidden_layers": 4}
        heads = {"num_attention_heads": options.width // 64, "num_key_value_heads": 2}
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=rows, **sizes, **heads, tie_word_embeddings=True))
        model.lm_head.weight.requires_grad_("frozen" not in kind)
        return model
    from peft import LoraConfig, get_peft_model

    from slm.model.lora import keep_tables_whole

    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    new = range(base.config.get_text_config().vocab_size - NEW_ROWS, base.config.get_text_config().vocab_size)
    settings = LoraConfig(r=16, target_modules="all-linear", trainable_token_indices=list(new), task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    if kind == "LoRA, answers":
        keep_tables_whole(model)
    return model


def resident_kib(name: str) -> int:
    """Memory of this process as Linux tells it: VmRSS, now, or VmHWM, at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(kind: str, options: argparse.Namespace, rows: int, results: Any) -> None:
    """Seconds of a step (median of the rounds) and MiB beyond the model's own, of one way."""
    torch.set_num_threads(options.threads)
    model = make_model(kind, options, rows).train()
    bare = bare_model(model)
    data = batch(bare.get_input_embeddings().weight.shape[0], options.tokens)
    loss = AnswerLoss(bare) if "answers" in kind else None
    for parameter in model.parameters():  # gradients exist from the first step on, and are not the head's matter
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gc.collect()
    # The peak begins anew: making the model has had one of its own.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, seconds = resident_kib("VmRSS"), []
    for _ in range(options.rounds + 1):
        started = time.perf_counter()
        value = whole_logits(model, **data) if loss is None else loss(model, **data, ignored=IGNORED)
        value.backward()
        seconds.append(time.perf_counter() - started)
    peak = resident_kib("VmHWM") - before
    results.put((median(seconds[1:]), peak / 1024, float(value.detach())))


def draw(found: dict[tuple[str, int], float], tokens: int, path: str) -> None:
    """Memory against the vocabulary, a line for each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(kind for kind, _ in found):
        points = sorted((rows, peak) for (one, rows), peak in found.items() if one == kind)
        axes.plot(*zip(*points, strict=True), marker="o", label=kind)
    axes.set(xlabel="rows of the vocabulary", ylabel="MiB beyond the model and its gradients", ylim=(0, None))
    axes.set_title(f"A step's loss and gradients, {tokens} tokens, two fifths of them answers")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[32_000, 151_936, 263_232])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", help="folder of a causal LM, for a LoRA step")
    parser.add_argument("--plot", help="an SVG of memory against the vocabulary")
    options = parser.parse_args()
    runs = [(kind, rows) for rows in options.rows for kind in KINDS]
    runs += [(kind, 0) for kind in ("LoRA, PEFT's way", "LoRA, answers") if options.model]
    print(f"{options.tokens} tokens, {options.threads} threads, torch {torch.__version__}\n")
    print("| vocabulary | loss | seconds | MiB beyond the model | value |\n|---|---|---|---|---|")
    context, found = multiprocessing.get_context("spawn"), {}
    for kind, rows in runs:
        results = context.SimpleQueue()
        process = context.Process(target=measure, args=(kind, options, rows, results))
        process.start()
        process.join()
        if process.exitcode:
            print(f"| {rows or options.model} | {kind} | failed ({process.exitcode}) | | |")
            continue
        seconds, peak, value = results.get()
        print(f"| {rows or os.path.basename(options.model)} | {kind} | {seconds:.2f} | {peak:,.0f} | {value:.2f} |")
        if rows:
            found[kind, rows] = peak
    if options.plot and found:
        draw(found, options.tokens, options.plot)


if __name__ == "__main__":
    main()
