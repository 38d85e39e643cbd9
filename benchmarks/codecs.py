"""Speed of the embedded tokenizers beside other codecs: ``python benchmarks/codecs.py [TOKENIZER ...]``.

    python benchmarks/codecs.py [--batch 8] [--seconds 10] [--rounds 5] [--threads N] [--quality results.json]
                                [--output FILE]

TOKENIZER is anything that `tokenizer=` takes (default: the embedded ones, and where they are not installed the presets
of their sizes: speed does not depend on training). Beside them stand transformers' Mimi, EnCodec, DAC and X-Codec in
their default sizes with random weights, at the sampling rate of each.

In each round every codec encodes and decodes the same seconds of noise; rounds run forwards and backwards in turn. The
table gives medians over the rounds as times real time, with the smallest and largest of both together, and the
codec's median over Mimi's in fp32. A codec so slow that one pass would take longer than --patience gets shorter clips
(column `clip`). bf16 (autocast) is measured where the hardware multiplies it fast; the peers' own look-ups are not
guarded against it, so their codes there may mean little: their column tells how fast they could be.
--quality reads what `slm evaluate` wrote: STOI and the judge's WER of the reconstructions.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    MimiConfig,
    MimiModel,
    XcodecConfig,
    XcodecModel,
)

from eval.results_file import load_results
from eval.schema import Row
from eval.speech.quality import QualitySummary
from recipes.runs.logs import hide_loading_bars
from recipes.runs.machine import cpu_has_fast_bf16
from recipes.runs.process_settings import keep_freed_memory
from tokenizer import LMSPTModel, load_tokenizer
from tokenizer.codecs.base import Codec
from tokenizer.codecs.transformers_codecs import DacCodec, EncodecCodec, MimiCodec, XCodec
from tokenizer.embedded import TOKENIZERS, installed
from tokenizer.precision import autocast

PEERS: dict[str, Callable[[], Codec]] = {
    "Mimi": lambda: MimiCodec(MimiModel(MimiConfig())),
    "EnCodec": lambda: EncodecCodec(EncodecModel(EncodecConfig())),
    "DAC": lambda: DacCodec(DacModel(DacConfig())),
    "X-Codec": lambda: XCodec(XcodecModel(XcodecConfig())),
}
TRIAL_S = 1.0  # of the pass that decides how long the clips may be


@dataclass
class Candidate:
    """One codec, and what was measured of it."""

    name: str
    codec: LMSPTModel | Codec
    clip_s: float = 0.0
    samples: Tensor = field(default_factory=lambda: torch.zeros(0))
    multiply_adds: tuple[float, float] = (0.0, 0.0)  # encode and decode, per second of audio
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # precision -> encode and decode

    def encode(self, samples: Tensor) -> Tensor:
        """Codes (B, K, F) of samples (B, 1, S)."""
        if isinstance(self.codec, Codec):  # past the wrapper, which would hold it to fp32
            return self.codec.encode_frames(samples)
        return self.codec.encode(samples).audio_codes

    def decode(self, codes: Tensor) -> Tensor:
        return self.codec.decode_frames(codes) if isinstance(self.codec, Codec) else self.codec.decode(codes)[0]

    def noise(self, batch: int, seconds: float) -> Tensor:
        """Noise (B, 1, S), S a whole number of frames."""
        config = self.codec.config
        return 0.1 * torch.randn(batch, 1, max(1, round(seconds * config.frame_rate)) * config.hop_length)

    def measure(self, precision: str, samples: Tensor) -> tuple[float, float]:
        """Seconds of encoding and of decoding (B, 1, S)."""
        with torch.inference_mode(), autocast(precision, "cpu"):
            started = time.perf_counter()
            codes = self.encode(samples)
            between = time.perf_counter()
            self.decode(codes)
            return between - started, time.perf_counter() - between

    def real_time(self, precision: str) -> list[tuple[float, float, float]]:
        """Times real time of encode, decode and both, round by round."""
        audio_s = self.samples.shape[0] * self.samples.shape[-1] / self.codec.config.sampling_rate
        return [(audio_s / e, audio_s / d, audio_s / (e + d)) for e, d in self.seconds[precision]]

    def median(self, precision: str, column: int) -> float | None:
        """Over the rounds; None where this precision was not measured or failed."""
        if not self.seconds.get(precision):
            return None
        return statistics.median(row[column] for row in self.real_time(precision))


def candidates(names: Sequence[str], peers: Sequence[str]) -> list[Candidate]:
    """The codecs, in eval mode, weight norm folded where they know how."""
    if not names:
        there = installed()
        names = [name if name in there else name.replace("embedded", "micro") for name in TOKENIZERS]
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a preset's weights are random, as it says
        for name in names:
            torch.manual_seed(0)
            codec = load_tokenizer(name)
            found.append(Candidate(name, codec.fold_weight_norm() if isinstance(codec, LMSPTModel) else codec))
        for name in peers:
            torch.manual_seed(0)
            found.append(Candidate(name, PEERS[name]().eval()))
    return found


def count(candidate: Candidate, seconds: float = 2.0) -> tuple[float, float]:
    """Multiply-adds per second of audio of encode and decode (matrix products and convolutions)."""
    samples = candidate.noise(1, seconds)
    audio_s = samples.shape[-1] / candidate.codec.config.sampling_rate
    totals = []
    # oneDNN's recurrent layer is one call that the counter does not know
    with warnings.catch_warnings(action="ignore"), torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        for work in (candidate.encode, candidate.decode):
            with FlopCounterMode(display=False) as counter:
                samples = work(samples)
            totals.append(counter.get_total_flops() / 2 / audio_s)
    return totals[0], totals[1]


def settle_clips(candidate: Candidate, batch: int, seconds: float, patience_s: float) -> None:
    """Chooses the length of the clips: `seconds`, or what keeps a pass within the patience; warms up on the way."""
    trial = candidate.noise(batch, min(TRIAL_S, seconds))
    candidate.measure("fp32", trial)
    took = sum(candidate.measure("fp32", trial)) / min(TRIAL_S, seconds)
    candidate.clip_s = min(seconds, max(TRIAL_S, float(int(patience_s / took))))
    candidate.samples = candidate.noise(batch, candidate.clip_s)


def run_rounds(found: list[Candidate], precisions: Sequence[str], rounds: int) -> None:
    """All codecs take turns; a codec that cannot compute in bf16 is left out there."""
    for precision in precisions:
        for candidate in found:
            try:
                candidate.measure(precision, candidate.samples)
                candidate.seconds[precision] = []
            except RuntimeError as error:
                print(f"{candidate.name} in {precision}: {str(error).splitlines()[0]}", flush=True)
    for turn in range(rounds):
        for candidate in found if turn % 2 == 0 else reversed(found):
            for precision, seconds in candidate.seconds.items():
                seconds.append(candidate.measure(precision, candidate.samples))
        print(f"round {turn + 1} of {rounds} done", flush=True)


def quality(results: Path | None, names: Sequence[str]) -> dict[str, str]:
    """What evaluations say of reconstructions: STOI, and WER by the first judge with its interval."""
    if results is None:
        return {}
    found, scores = load_results(results), {}

    def of(name: str, found: Row | QualitySummary) -> bool:
        return found.system == "reconstruction" and name in (found.model, Path(found.model).name, found.cell)

    for name in names:
        parts = []
        clips = [q for q in found.quality if of(name, q)]
        if clips and (stoi := clips[0].values.get("stoi")) is not None:
            parts.append(f"STOI {stoi:.2f}")
        rows = [r for r in found.rows if of(name, r)]
        if rows:
            low, high = rows[0].interval
            parts.append(f"WER {100 * rows[0].wer:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
        scores[name] = ", ".join(parts)
    return scores


def table(found: list[Candidate], precisions: Sequence[str], scores: dict[str, str]) -> str:
    """The Markdown table."""
    reference = next((c for c in found if c.name == "Mimi"), None)
    heads = ["codec", "parameters (M)", "Gmult-add/s encode", "decode", "bit/s", "clip (s)"]
    for precision in precisions:
        heads += [f"{precision} encode", "decode", "both (range)"]
        if reference is not None:
            heads.append(f"{precision} over Mimi fp32")
    lines = [heads + ["quality"]]
    for c in found:
        cells = [c.name, f"{sum(p.numel() for p in c.codec.parameters()) / 1e6:.1f}"]
        cells += [f"{value / 1e9:.2f}" for value in c.multiply_adds]
        cells += [f"{bitrate(c):.0f}", f"{c.clip_s:g}"]
        for precision in precisions:
            encode, decode, both = (c.median(precision, column) for column in range(3))
            if both is None:
                cells += ["", "", ""]
            else:
                rounds = [row[2] for row in c.real_time(precision)]
                cells += [f"{encode:.1f}x", f"{decode:.1f}x", f"{both:.1f}x ({min(rounds):.1f} to {max(rounds):.1f})"]
            if reference is not None:
                cells.append("" if both is None else f"{both / reference.median('fp32', 2):.1f}")
        lines.append(cells + [scores.get(c.name, "")])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def bitrate(candidate: Candidate) -> float:
    """Bits per second of all books."""
    config = candidate.codec.config
    return config.frame_rate * float(torch.tensor(config.codebook_sizes, dtype=torch.float64).log2().sum())


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="*", help="default: the embedded ones")
    parser.add_argument("--peers", nargs="*", choices=[*PEERS], default=[*PEERS])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each clip")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=5.0, help="seconds of one pass, about")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precisions", nargs="*", choices=["fp32", "bf16"], default=None)
    parser.add_argument("--quality", type=Path, help="results.json of slm evaluate or slm compare")
    parser.add_argument("--output", type=Path, help="write the table here too, as Markdown")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> str:
    """Measures and prints; returns the Markdown."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    hide_loading_bars()
    fast = cpu_has_fast_bf16()
    precisions = options.precisions or (["fp32", "bf16"] if fast else ["fp32"])
    found = candidates(options.tokenizers, options.peers)
    for candidate in found:
        candidate.multiply_adds = count(candidate)
        settle_clips(candidate, options.batch, options.seconds, options.patience)
        print(f"{candidate.name}: clips of {candidate.clip_s:g} s", flush=True)
    run_rounds(found, precisions, options.rounds)
    head = (
        f"Encode and decode, batch {options.batch}, {options.threads} thread(s) of {platform.machine()} "
        f"{'with' if fast else 'without'} fast bf16, torch {torch.__version__}: times real time, medians of "
        f"{options.rounds} alternating rounds."
    )
    text = f"{head}\n\n{table(found, precisions, quality(options.quality, [c.name for c in found]))}\n"
    print(f"\n{text}")
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    main()
