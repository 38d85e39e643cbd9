"""`slm encode` beside the bare model, and its memory as the corpus grows: ``python benchmarks/encode_corpus.py``.

    python benchmarks/encode_corpus.py MANIFEST [--tokenizer embedded-12.5hz] [--threads N] [--minutes 30] [--rounds 5]
                                       [--hours 1 5 20] [--precision auto] [--output FILE]

The recordings of MANIFEST (FLAC, WAV, ...; any manifest.jsonl) are repeated until there is enough audio.

Speed: in each round `slm encode` (from reading the manifest to the finished index; audio read from disk, decoded,
encoded, written) takes turns with the bare model: the same batches, decoded and padded in memory beforehand, through
`model.encode` alone with weight norm folded, in the same precision and with the same threads, all of them at work on
one batch. A third candidate gives the bare model its batches as `slm encode` does, one thread to each.

Memory: for each of --hours a fresh process runs `slm encode` over so much audio; its resident memory is sampled twice
a second. Flat: the peaks differ by at most 200 MB.

Printed as Markdown; `--hours` without a number leaves memory out, `--rounds 0` speed.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.commands import encode
from recipes.encoding.encoder import Encoder, pad_batch
from recipes.encoding.plan import bucket, deal, durations_of, make_items, read_splits
from recipes.runs.logs import hide_loading_bars
from recipes.runs.machine import cpu_has_fast_bf16, resolve_precision
from tokenizer import load_tokenizer
from tokenizer.data.utterances import DataSource
from tokenizer.precision import autocast

FLAT_MB = 200


def repeated_manifest(manifest: Path, hours: float, folder: Path) -> Path:
    """A manifest of the same recordings, again and again under new ids, until they last for `hours`."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").split("\n") if line.strip()]
    target, seconds, turn = folder / f"{hours:g}h.jsonl", 0.0, 0
    with target.open("w", encoding="utf-8") as file:
        while seconds < 3600 * hours:
            for row in rows:
                audio = str((manifest.parent / row["audio"]).resolve())
                file.write(json.dumps(row | {"id": f"{row['id']}-{turn}", "audio": audio, "split": "train"}) + "\n")
                seconds += row["duration"]
                if seconds >= 3600 * hours:
                    break
            turn += 1
    return target


def settings(options: argparse.Namespace, manifest: Path, run_dir: Path) -> encode.Config:
    return encode.Config(
        run_dir=str(run_dir),
        tokenizer=options.tokenizer,
        data=[DataSource(str(manifest))],
        splits=["train"],
        precision=options.precision,
        device=options.device,
        allow_untrained=True,
        batch_seconds=options.batch_seconds,
    )


class Bare:
    """The model alone, over the batches that `slm encode` makes of a manifest, decoded in memory."""

    def __init__(self, options: argparse.Namespace, manifest: Path, precision: str) -> None:
        config = settings(options, manifest, Path("unused"))
        torch.manual_seed(0)
        self.model = load_tokenizer(options.tokenizer).to(options.device)
        if hasattr(self.model, "fold_weight_norm"):
            self.model.fold_weight_norm()
        self.precision, self.device = precision, options.device
        utterances = read_splits(config.data, config.splits)["train"]
        facts = self.model.config
        items = make_items(utterances, durations_of(utterances, 2), 1, 0, facts.hop_length, facts.sampling_rate)
        batches = [b for shard in deal(items, config.batch_seconds, config.shard_size) for b in shard]
        reader = Encoder(self.model, precision, self.device, config.batch_seconds, strict=True)
        self.batches = [self._padded(reader.read(batch)) for batch in batches]
        self.audio_s = sum(int(mask.sum()) for _, mask in self.batches) / facts.sampling_rate

    def _padded(self, waveforms: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        rate = self.model.config.sampling_rate
        return pad_batch(self.model, waveforms, round(bucket(max(map(len, waveforms)) / rate) * rate))

    def _encode(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        values, mask = batch
        with torch.inference_mode(), autocast(self.precision, self.device):
            return self.model.encode(values.to(self.device), mask.to(self.device)).audio_codes.cpu()

    def at_once(self) -> None:
        """Batch by batch, all threads at work on each."""
        for batch in self.batches:
            self._encode(batch)

    def side_by_side(self) -> None:
        """As many batches at a time as there are threads, one thread to each."""
        threads = torch.get_num_threads()

        def alone(batch: tuple[Tensor, Tensor]) -> None:
            torch.set_num_threads(1)
            self._encode(batch)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(alone, self.batches))
        torch.set_num_threads(threads)


def speed(options: argparse.Namespace, folder: Path) -> str:
    """The table of ratios."""
    manifest = repeated_manifest(options.manifest, options.minutes / 60, folder)
    asked = encode.plan(settings(options, manifest, folder / "plan"))
    options = argparse.Namespace(**vars(options) | {"precision": asked["precision"]})
    bare = Bare(options, manifest, options.precision)
    n_runs = 0

    def whole() -> None:
        nonlocal n_runs
        n_runs += 1
        encode.run(settings(options, manifest, folder / f"codes-{n_runs}"))

    candidates = {"slm encode": whole, "bare model": bare.at_once}
    if torch.device(options.device).type == "cpu":
        candidates["bare model, a batch to each thread"] = bare.side_by_side
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    bare.at_once()  # first calls set kernels up
    for turn in range(options.rounds):
        for name in list(candidates) if turn % 2 == 0 else reversed(candidates):
            started = time.perf_counter()
            candidates[name]()
            seconds[name].append(time.perf_counter() - started)
    lines = [
        f"`{options.tokenizer}`, {bare.audio_s / 60:.1f} min of audio in {len(bare.batches)} batches, precision "
        f"{options.precision}, {options.rounds} rounds in turns",
        "",
        "| | x real time | `slm encode` by it, median (smallest to largest) |",
        "|---|---:|---:|",
    ]
    for name, found in seconds.items():
        ratios = [b / e for b, e in zip(found, seconds["slm encode"], strict=True)]
        shown = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        ratio = "1" if name == "slm encode" else shown
        lines.append(f"| {name} | {bare.audio_s / statistics.median(found):.0f} | {ratio} |")
    return "\n".join(lines)


def resident_mb(field: str = "VmRSS") -> float:
    """This process's resident memory in MB as Linux counts it (`VmRSS` now, `VmHWM` its peak)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1000


def child(options: argparse.Namespace) -> None:
    """Encodes `options.manifest` and prints what it took, as JSON."""
    samples: list[float] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.5):
            samples.append(resident_mb())

    watcher = threading.Thread(target=sample)
    watcher.start()
    started = time.perf_counter()
    encode.run(settings(options, options.manifest, options.child))
    wall_s = time.perf_counter() - started
    done.set()
    watcher.join()
    samples.append(resident_mb())
    index = json.loads((options.child / "index.json").read_text(encoding="utf-8"))
    audio_s = index["splits"]["train"]["duration_s"]
    # The first quarter, half, and so on of the run: growth with time shows there.
    quarters = [max(samples[: max(1, len(samples) * n // 4)]) for n in range(1, 5)]
    print(json.dumps({"audio_s": audio_s, "wall_s": wall_s, "peak_mb": resident_mb("VmHWM"), "quarters_mb": quarters}))


def memory(options: argparse.Namespace, folder: Path) -> str:
    """The table of resident memory."""
    lines = [
        "| hours of audio | recordings | x real time | peak resident (MB) | highest by a quarter, half, three quarters "
        "of the run, its end (MB) |",
        "|---:|---:|---:|---:|---:|",
    ]
    peaks = []
    for hours in options.hours:
        manifest = repeated_manifest(options.manifest, hours, folder)
        keep = ("tokenizer", "precision", "device", "threads", "batch_seconds")
        same = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in keep]
        command = [sys.executable, __file__, str(manifest), *same, "--child", str(folder / f"codes-{hours:g}h")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{hours:g} h: {done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        peaks.append(found["peak_mb"])
        n_rows = manifest.read_text(encoding="utf-8").count("\n")
        quarters = ", ".join(f"{value:.0f}" for value in found["quarters_mb"])
        x_real_time = found["audio_s"] / found["wall_s"]
        lines.append(f"| {hours:g} | {n_rows:,} | {x_real_time:.0f} | {found['peak_mb']:.0f} | {quarters} |")
    spread = max(peaks) - min(peaks)
    verdict = "flat" if spread <= FLAT_MB else "not flat"
    return "\n".join([*lines, "", f"Peaks differ by {spread:.0f} MB: {verdict} (within {FLAT_MB} MB)."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(__file__).resolve().parents[2] / "shared" / "data" / "kathleen-arctic" / "manifest.jsonl"
    parser.add_argument("manifest", nargs="?", type=Path, default=data)
    parser.add_argument("--tokenizer", default="embedded-12.5hz")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hours", type=float, nargs="*", default=[1.0, 5.0, 20.0])
    parser.add_argument("--batch-seconds", type=float, default=encode.Config().batch_seconds)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # a preset's weights are random, as it says
    logging.getLogger("slm").setLevel(logging.ERROR)
    hide_loading_bars()
    if options.child:
        child(options)
        return
    fast = "with" if cpu_has_fast_bf16() else "without"
    parts = [
        f"{platform.machine()} {fast} fast bf16 ({resolve_precision('auto', options.device)} is what auto tries first "
        f"on {options.device}), {options.threads} threads, torch {torch.__version__}"
    ]
    with tempfile.TemporaryDirectory() as name:
        if options.rounds:
            parts.append(speed(options, Path(name)))
        if options.hours:
            parts.append(memory(options, Path(name)))
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
