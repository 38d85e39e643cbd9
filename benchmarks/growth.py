"""How time and memory grow: ``python benchmarks/growth.py [--output docs/growth.svg] [--table FILE]``.

    python benchmarks/growth.py [--tokenizer embedded-12.5hz] [--manifest FILE] [--threads N] [--points 4] [--scale 1]

`slm encode` (from reading the manifest to the finished index) and a whole training step of the tokenizer (crops read
and cut, discriminators, all losses, a teacher of Whisper-tiny's width and two layers), each against the length of the
audio, the batch, and the size of the corpus; three panels each. Every point is a fresh process, warmed up on something
small before the clock starts. Memory is the process's peak beyond what it had after that warm-up.

The audio is noise in FLAC files of 4 s, written once, or the recordings of --manifest, repeated. Printed: a table, and
per panel the slopes of the lines fitted to the logarithms (over all points, and over the last two, where what does not
grow weighs least): 1 is linear growth, 0 none. --scale makes everything shorter (0.5) or longer.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import soundfile
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from recipes.runs.logs import hide_loading_bars
from recipes.runs.machine import cpu_has_fast_bf16
from recipes.runs.process_settings import keep_compiled_kernels, keep_freed_memory
from tokenizer.embedded import installed

CLIP_S, RATE = 4.0, 16_000
TEACHER = {"d_model": 384, "encoder_layers": 2, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536}


@dataclass(frozen=True)
class Point:
    """What one process does: everything but what its panel varies stays at these values."""

    work: str = "encode"  # or "step"
    length_s: float = CLIP_S  # of each recording; of a crop
    batch: float = 60.0  # seconds of audio in a batch; crops in one
    corpus: float = 240.0  # seconds of audio; recordings in the manifest


@dataclass(frozen=True)
class Panel:
    """One quantity that grows."""

    title: str
    x_label: str
    varied: str
    points: list[Point]
    expected: tuple[str, str]  # slopes of time and of memory: 1 linear, 0 none


def panels(n: int, scale: float) -> list[Panel]:
    """Six panels of n points each, every point twice the one before."""
    doubling = [2.0**i for i in range(n)]
    encode, step = Point(), Point("step", length_s=1.0, batch=2, corpus=64)
    many = replace(encode, corpus=480 * scale)
    return [
        Panel(
            "slm encode: length of the recording",
            "seconds of one recording",
            "length_s",
            [replace(encode, length_s=120 * scale * f, corpus=120 * scale * f) for f in doubling],
            ("1", "0: chunks"),
        ),
        Panel(
            "slm encode: batch",
            "seconds of audio in a batch",
            "batch",
            [replace(many, batch=16 * f) for f in doubling],
            ("0", "1"),
        ),
        Panel(
            "slm encode: corpus",
            "seconds of audio in all",
            "corpus",
            [replace(encode, corpus=480 * scale * f) for f in doubling],
            ("1", "0"),
        ),
        Panel(
            "training step: length of the crop",
            "seconds of a crop",
            "length_s",
            [replace(step, length_s=max(0.25, scale) * f) for f in doubling],
            ("1", "1"),
        ),
        Panel(
            "training step: batch",
            "crops in a batch",
            "batch",
            [replace(step, batch=2 * f) for f in doubling],
            ("1", "1"),
        ),
        Panel(
            "training step: corpus",
            "recordings in the manifest",
            "corpus",
            [replace(step, corpus=100 * 4**i) for i in range(n)],
            ("0", "0"),
        ),
    ]


def write_noise(folder: Path, seconds: float, name: str) -> Path:
    """A FLAC file of noise, its level moving as speech's does."""
    rng = np.random.default_rng(round(seconds * 1000))
    with soundfile.SoundFile(folder / f"{name}.flac", "w", RATE, 1, "PCM_16") as file:
        left = round(seconds * RATE)
        while left > 0:
            noise = rng.normal(scale=0.05, size=min(left, 60 * RATE))
            file.write(noise * (1 + np.sin(np.arange(len(noise)) / 4000)))
            left -= len(noise)
    return folder / f"{name}.flac"


def recordings(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of a manifest, their audio absolute: the given one's, or of noise."""
    if options.manifest:
        rows = [json.loads(line) for line in options.manifest.read_text(encoding="utf-8").split("\n") if line.strip()]
        if not rows or not all(row.get("duration") for row in rows):
            raise SystemExit(f"{options.manifest}: each line needs its `duration` in seconds, and there must be one")
        return [row | {"audio": str((options.manifest.parent / row["audio"]).resolve())} for row in rows]
    paths = [write_noise(folder, CLIP_S + i / 10, f"noise-{i}") for i in range(4)]
    return [{"id": p.stem, "audio": str(p), "text": "noise", "duration": CLIP_S + i / 10} for i, p in enumerate(paths)]


def manifest_of(rows: list[dict[str, Any]], seconds: float, count: float, target: Path) -> Path:
    """The same recordings again and again under new ids, for so many seconds or so many lines, whichever comes last."""
    total, n = 0.0, 0
    with target.open("w", encoding="utf-8") as file:
        while total < seconds or n < count:
            row = rows[n % len(rows)]
            file.write(json.dumps(row | {"id": f"{row['id']}-{n}", "split": "train"}) + "\n")
            total, n = total + row["duration"], n + 1
    return target


def peak_mb() -> float:
    """The process's peak resident memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def encode_point(point: Point, options: argparse.Namespace, rows: list[dict[str, Any]], folder: Path) -> list[float]:
    """Seconds of one `slm encode`, and its memory."""
    from recipes.commands import encode
    from tokenizer.data.utterances import DataSource

    def go(manifest: Path, name: str) -> None:
        config = encode.Config(
            run_dir=str(folder / name),
            tokenizer=options.tokenizer,
            data=[DataSource(str(manifest))],
            splits=["train"],
            batch_seconds=point.batch,
            precision=options.precision,
            allow_untrained=True,
        )
        encode.run(config)

    if point.length_s > CLIP_S:  # one recording, long
        path = write_noise(folder, point.length_s, "long")
        chosen = [{"id": "long", "audio": str(path), "text": "noise", "duration": point.length_s}]
    else:
        chosen = rows
    go(manifest_of(rows, 1.0, 1, folder / "warm-up.jsonl"), "warm-up")
    before, started = peak_mb(), time.perf_counter()
    go(manifest_of(chosen, point.corpus, 1, folder / "point.jsonl"), "codes")
    return [time.perf_counter() - started, peak_mb() - before]


def step_point(point: Point, options: argparse.Namespace, rows: list[dict[str, Any]], folder: Path) -> list[float]:
    """Seconds of one training step (the median of three), and its memory, the corpus's list included."""
    from accelerate import Accelerator
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from tokenizer import LMSPTModel
    from tokenizer.data.augmentation import AugmentationConfig
    from tokenizer.data.crops import CropConfig, TrainingCrops
    from tokenizer.data.manifest import read_sources
    from tokenizer.data.mixing import TrainingAudio
    from tokenizer.data.pieces import AudioStore
    from tokenizer.data.utterances import DataSource
    from tokenizer.model.configuration import preset_config
    from tokenizer.teacher.whisper import SpeechTeacher
    from tokenizer.training.discriminator import Discriminator, DiscriminatorConfig
    from tokenizer.training.losses import LossWeights, MultiScaleMelLoss
    from tokenizer.training.objective import Objective
    from tokenizer.training.state import CodecTrainingConfig, TrainState
    from tokenizer.training.step import train_step

    model = LMSPTModel(preset_config("micro-12.5hz")).train()
    discriminator = Discriminator(DiscriminatorConfig(period_channels=4, band_channels=8))
    low = options.precision == "bf16" or (options.precision == "auto" and cpu_has_fast_bf16())
    accelerator = Accelerator(mixed_precision="bf16" if low else "no", cpu=True)
    config = CodecTrainingConfig(batch_size=int(point.batch), revive_steps=0)
    networks = (model, discriminator)
    optimizers = [accelerator.prepare(torch.optim.AdamW(m.parameters(), 1e-4, config.betas)) for m in networks]
    state = TrainState(model, optimizers[0], discriminator, optimizers[1])
    teacher = SpeechTeacher(WhisperEncoder(WhisperConfig(**TEACHER)))
    objective = Objective(LossWeights(), MultiScaleMelLoss(model.config.sampling_rate), teacher, 100.0)

    def steps(crop_s: float, batch: int, n_recordings: float, n_steps: int) -> float:
        manifest = manifest_of(rows, 0.0, n_recordings, folder / "point.jsonl")
        store = AudioStore(read_sources([DataSource(str(manifest))], "train"), model.config.sampling_rate)
        audio = TrainingAudio([store], [1.0], model.config.sampling_rate, 0)
        n_books = model.config.num_codebooks
        crops = TrainingCrops(audio, CropConfig(crop_s), AugmentationConfig(), n_books, n_steps * batch, 0)
        took = []
        for step in range(n_steps):
            started = time.perf_counter()
            items = [crops[step * batch + i] for i in range(batch)]
            collated = {key: torch.stack([item[key] for item in items]) for key in items[0]}
            train_step(state, [collated], objective, config, accelerator)
            state.step += 1
            took.append(time.perf_counter() - started)
        return sorted(took)[n_steps // 2]

    steps(0.25, 1, 1, 1)
    before = peak_mb()
    steps(point.length_s, int(point.batch), point.corpus, 1)  # sets kernels up for these shapes
    seconds = steps(point.length_s, int(point.batch), point.corpus, 3)
    return [seconds, peak_mb() - before]


def measure(point: Point, options: argparse.Namespace, folder: Path) -> list[float]:
    """Seconds and MB of a point, measured in a process of its own."""
    arguments = [sys.executable, __file__, "--point", json.dumps(asdict(point)), "--work", str(folder)]
    arguments += ["--tokenizer", options.tokenizer, "--threads", str(options.threads), "--precision", options.precision]
    arguments += ["--manifest", str(options.manifest)] if options.manifest else []
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{point}: ended with {done.returncode}\n{done.stderr[-2000:]}")
    seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    return [seconds, megabytes]


def child(options: argparse.Namespace) -> None:
    """Measures one point and prints it as JSON."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    keep_compiled_kernels()
    hide_loading_bars()
    point = Point(**json.loads(options.point))
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        rows = recordings(options, options.work)
        work = encode_point if point.work == "encode" else step_point
        print(json.dumps(work(point, options, rows, Path(folder))))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line fitted to the logarithms; nan with fewer than two points."""
    if len(x) < 2:
        return math.nan
    return float(np.polyfit(np.log(x), np.log(np.maximum(y, 0.1)), 1)[0])


def draw(found: list[tuple[Panel, np.ndarray]], title: str, target: Path) -> None:
    """All panels in one SVG: time left, memory right, both axes logarithmic."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    FigureCanvasSVG(figure)
    figure.suptitle(title, fontsize=10)
    for axes, (panel, values) in zip(figure.subplots(2, 3).flat, found, strict=True):
        x, seconds, megabytes = values.T
        axes.loglog(x, seconds, "o-", color="tab:blue", label=f"seconds, slope {slope(x, seconds):.2f}")
        right = axes.twinx()
        right.loglog(x, np.maximum(megabytes, 0.1), "s--", color="tab:red", label="MB")
        right.set_ylim(1, max(2000, 2 * megabytes.max()))
        right.set_ylabel("peak memory, MB beyond the warm-up", color="tab:red", fontsize=8)
        axes.set(title=panel.title, xlabel=panel.x_label)
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.set_ylabel("seconds", color="tab:blue")
        middle = float(np.sqrt(seconds.min() * seconds.max()))
        axes.set_ylim(min(seconds.min() / 2, middle / 10), max(seconds.max() * 2, middle * 10))
        lines = [*axes.lines, *right.lines]
        names = [f"seconds, slope {slope(x, seconds):.2f}", f"MB, slope {slope(x, megabytes):.2f}"]
        axes.legend(lines, names, fontsize=8, loc="upper left")
        axes.grid(True, which="both", alpha=0.2)
    target.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "growth"}):  # small, the same bytes each time
        figure.savefig(target, format="svg", metadata={"Date": None})


def table(found: list[tuple[Panel, np.ndarray]]) -> str:
    """Every point, with the panels' slopes: over all points, and over the last two, where fixed costs weigh least."""
    heads = ["what grows", "values", "seconds", "slope, last, expected", "MB", "slope, last, expected"]
    lines = [heads, ["---"] * len(heads)]
    for panel, values in found:
        x, seconds, megabytes = values.T
        cells = [f"{panel.title} ({panel.x_label})", ", ".join(f"{v:g}" for v in x)]
        for y, digits, expected in ((seconds, 2, panel.expected[0]), (megabytes, 0, panel.expected[1])):
            cells.append(", ".join(f"{v:.{digits}f}" for v in y))
            cells.append(f"{slope(x, y):.2f}, {slope(x[-2:], y[-2:]):.2f}, {expected}")
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "embedded-12.5hz" if "embedded-12.5hz" in installed() else "micro-12.5hz"
    parser.add_argument(
        "--tokenizer", default=default, help="of slm encode; the step trains one of micro-12.5hz's size"
    )
    parser.add_argument("--manifest", type=Path, help="recordings to repeat, in place of noise")
    parser.add_argument("--points", type=int, default=4, help="in each panel")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("docs/growth.svg"), help="the plot")
    parser.add_argument("--table", type=Path, help="write the table here too, as Markdown")
    parser.add_argument("--point", help=argparse.SUPPRESS)  # what a child process measures
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> str:
    """Measures all points, draws and prints; returns the Markdown."""
    options = arguments(argv)
    if options.point:
        child(options)
        return ""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for panel in panels(options.points, options.scale):
            rows = []
            for point in panel.points:
                rows.append([getattr(point, panel.varied), *measure(point, options, Path(folder))])
                print(f"{panel.title}: {rows[-1][0]:g}: {rows[-1][1]:.2f} s, {rows[-1][2]:.0f} MB", flush=True)
            found.append((panel, np.array(rows)))
    title = (
        f"{options.tokenizer}, {options.threads} thread(s) of {platform.machine()} "
        f"{'with' if cpu_has_fast_bf16() else 'without'} fast bf16, precision {options.precision}, "
        f"torch {torch.__version__}"
    )
    draw(found, title, options.output)
    text = f"{title}\n\n{table(found)}\n"
    print(f"\n{text}\nplot: {options.output}")
    if options.table:
        options.table.write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    main()
