"""Does everything run on this machine's GPUs? The first thing to run on a new one; a few minutes, no download.

    python benchmarks/gpu_smoke.py [--device cuda|cpu] [--only WORD...] [--folder FOLDER] [--timeout-s 900]

Tiny models on generated sounds go through the commands as a user gives them, each in a process of its own: training a
tokenizer (discriminators, averaged weights, accumulation), encoding, fine-tuning, speaking and transcribing, in fp32,
bf16 and fp16, on one GPU and on two; a compiled training, a resumed one, and codes compared with the CPU's; FSDP2,
ZeRO-2 and ZeRO-3 on two GPUs, in full and with adapters, compared with one GPU's losses. One line a check: ok, failed
with the error, or skipped with the reason. Exits with 1 where one failed.

Without a GPU it says so and ends; `--device cpu` runs the same checks on the CPU, all but fp16's and the engines'.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from slm.corpus import CodedCorpus
from tokenizer.teacher.recogniser import Recogniser, RecogniserConfig, save_recogniser

ROOT = Path(__file__).resolve().parents[1]
RATE_HZ = 16_000
PRECISIONS = ("fp32", "bf16", "fp16")
WIDTHS = ", ".join(
    f"{part}_width: 32" for part in ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder")
)
MODEL = f"model={{{WIDTHS}, latent_dim: 32, head_dim: 16, codebook_sizes: [32, 16, 16]}}"
JUDGES = "discriminator={periods: [2], fft_sizes: [256], period_channels: 2, band_channels: 2, start_step: 1}"
STEPS = (
    "training={steps: 4, batch_size: 8, accumulation: 2, save_steps: 2, log_steps: 1, validate_steps: 2, "
    "ema_decay: 0.9}"
)
LLM_STEPS = "training={steps: 4, tokens_per_step: 512, pack_length: 128, log_steps: 1, eval_steps: 2, save_steps: 2}"
FSDP2 = "training.trainer={fsdp_config: {version: 2, reshard_after_forward: true, state_dict_type: FULL_STATE_DICT}}"
ENGINES = {
    "fsdp2": ["training.fsdp=full_shard auto_wrap", FSDP2],
    "zero2": ["training.deepspeed=deepspeed-zero2"],
    "zero3": ["training.deepspeed=deepspeed-zero3"],
}
SAME_CODES = 0.995  # of book 0 in fp32, GPU beside CPU: sums are made in another order, nothing else differs
ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)\b.*")


class CheckFailed(Exception):
    """A command failed or its result is not what it should be; the message is the line to show."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    run: Callable[[], None]
    needs: tuple[str, ...] = ()  # checks whose results it reads
    skip: str = ""  # why it cannot be done here


class Smoke:
    """The checks and where they work.

    Args:
        folder: of recordings, runs and logs.
        device: cuda or cpu.
        gpus: how many GPUs there are.
        timeout_s: after which a command counts as hanging.
    """

    def __init__(self, folder: Path, device: str, gpus: int, timeout_s: float) -> None:
        self.folder, self.device, self.gpus, self.timeout_s = folder, device, gpus, timeout_s
        self.manifest, self.teacher = folder / "corpus" / "manifest.jsonl", folder / "teacher"
        self.data = f"data=[{{path: {self.manifest}}}]"

    def checks(self) -> list[Check]:
        """All of them, those first whose results others read."""
        compiler = "" if shutil.which("g++") or shutil.which("cc") else "torch.compile needs a C++ compiler"
        found = [Check("codes as on the CPU", self.compare_codes), Check("train-lm", self.train_lm)]
        for precision in PRECISIONS:
            half = "fp16 needs a GPU" if precision == "fp16" and self.device == "cpu" else ""
            found += self.in_precision(precision, 1, half)
            found += self.in_precision(precision, 2, half or self.too_few)
        found += [self.sharded(engine, lora) for engine in ENGINES for lora in (False, True)]
        found += [
            Check("resume", self.resume, ("train fp32",)),
            Check("compile", self.compile, ("train fp32",), compiler),
        ]
        return found

    @property
    def too_few(self) -> str:
        """Why two processes cannot be started, each on a GPU of its own."""
        return f"needs two GPUs, there is {self.gpus}" if self.device == "cuda" and self.gpus < 2 else ""

    def in_precision(self, precision: str, processes: int, skip: str) -> list[Check]:
        """Training, encoding, fine-tuning and generation with each other's results."""
        tag = precision if processes == 1 else f"{precision} x{processes}"

        def name(command: str) -> str:
            return f"{command} {tag}"

        def check(command: str, work: Callable[[str, str, int], None], *needs: str) -> Check:
            return Check(name(command), lambda: work(tag, precision, processes), needs, skip)

        train, codes, tuned = (name(command) for command in ("train", "encode", "finetune"))
        alone = f"encode {precision}"
        found = [check("train", self.train, *([f"train {precision}"] if processes > 1 else []))]
        found.append(check("encode", self.encode, train, *([alone] if processes > 1 else [])))
        found.append(check("finetune", self.finetune, codes, "train-lm"))
        if processes == 1:
            found.append(check("generate", self.generate, tuned))
        return found

    def sharded(self, engine: str, lora: bool) -> Check:
        """A fine-tuning on two GPUs that share weights or moments out."""
        skip = self.too_few
        if self.device == "cpu":
            skip = "tests/test_fsdp2.py and tests/test_distributed.py run it on CPUs"
        elif engine != "fsdp2" and importlib.util.find_spec("deepspeed") is None:
            skip = "needs DeepSpeed (pip install '.[deepspeed]')"
        name = f"finetune {engine}{' lora' if lora else ''} x2"
        return Check(name, lambda: self.compare_engine(engine, lora), ("encode fp32", "train-lm"), skip)

    def compare_engine(self, engine: str, lora: bool) -> None:
        """The same training alone and under an engine, in fp32."""
        kind = ["lora"] if lora else []
        runs = [self.run_dir("finetune", "alone", *kind), self.run_dir("finetune", engine, *kind)]
        for run, processes, own in ((runs[0], 1, []), (runs[1], 2, ENGINES[engine])):
            if not (run / "complete.json").is_file():
                settings = [
                    f"model={self.run_dir('lm') / 'model'}",
                    f"corpus={self.run_dir('codes', 'fp32')}",
                    LLM_STEPS,
                ]
                settings += [f"run_dir={run}", "precision=fp32", *own, *(["lora.rank=4"] if lora else [])]
                self.slm(run.name, "finetune", *settings, processes=processes)
        for alone, together in zip(*(losses(run, "loss") for run in runs), strict=True):
            near("a step's loss", together, alone, 1e-3)

    def make_inputs(self) -> None:
        """Recordings of voiced tones with noise, and a small recogniser of random weights to teach."""
        rng, rows = np.random.default_rng(0), []
        self.manifest.parent.mkdir(parents=True)
        for number in range(24):
            seconds, pitch_hz = rng.uniform(0.6, 1.4), rng.uniform(90, 300)
            time_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
            sound = sum(0.2 / n * np.sin(2 * np.pi * n * pitch_hz * time_s) for n in range(1, 6))
            sound = sound * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time_s)) + rng.normal(scale=0.01, size=len(time_s))
            name, split = f"{number:02d}.flac", ("train", "train", "valid", "test")[number % 4]
            soundfile.write(self.manifest.parent / name, sound.astype(np.float32), RATE_HZ)
            text = " ".join(rng.choice(["one", "two", "three", "four"], 3))
            rows.append(
                {"id": f"u{number:02d}", "audio": name, "text": text, "speaker": f"s{number % 3}", "split": split}
            )
        self.manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        torch.manual_seed(0)
        sizes = RecogniserConfig(hidden_size=64, encoder_layers=2, decoder_layers=1, window_s=2.0)
        save_recogniser(Recogniser.from_scratch(sizes), self.teacher)

    def slm(self, log: str, *arguments: str, processes: int = 1, device: str = "") -> None:
        """Runs one command. Raises CheckFailed with its error where it fails or hangs; its output is in `logs`."""
        launcher = [sys.executable, "-m"]
        if processes > 1:
            launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # torchrun's own default, and for one process as many sums in one order as for two
        environment.setdefault("OMP_NUM_THREADS", "1")
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = seen.split(",") if seen else [str(number) for number in range(self.gpus)]
        on_cpu = (device or self.device) == "cpu"
        environment["CUDA_VISIBLE_DEVICES"] = "" if on_cpu else ",".join(gpus[:processes])
        file = self.folder / "logs" / f"{log.replace(' ', '-')}.log"
        file.parent.mkdir(exist_ok=True)
        command = [*launcher, "recipes.cli", arguments[0], "--debug", *arguments[1:]]
        with file.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            try:
                code = process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its workers
                process.wait()
                raise CheckFailed(f"still running after {self.timeout_s:g} s; see {file}") from None
        if code:
            raise CheckFailed(f"{error_in(file.read_text(encoding='utf-8', errors='replace'))} (see {file})")

    def run_dir(self, *names: str) -> Path:
        """The folder of a run."""
        return self.folder / "-".join(names).replace(" ", "-")

    def train(self, tag: str, precision: str, processes: int) -> None:
        """A tokenizer; with two processes the first loss must be that of one."""
        self.training(self.run_dir("tokenizer", tag), f"train {tag}", precision, processes=processes)
        if processes > 1:
            alone, together = (losses(self.run_dir("tokenizer", run))[0] for run in (precision, tag))
            near("the first step's mel loss", together, alone, 1e-3 if precision == "fp32" else 0.05)

    def training(self, run: Path, log: str, precision: str, *changes: str, processes: int = 1) -> None:
        arguments = [self.data, MODEL, JUDGES, STEPS, f"teacher.name={self.teacher}", "crops.crop_s=0.5"]
        arguments += [f"run_dir={run}", f"precision={precision}", "trackers=[]", *changes]
        self.slm(log, "train-tokenizer", *arguments, processes=processes)
        losses(run)
        if not (run / "model" / "model.safetensors").is_file():
            raise CheckFailed(f"no model in {run}")

    def encode(self, tag: str, precision: str, processes: int) -> None:
        """A coded corpus; of two processes the same codes as of one."""
        run, tokenizer = self.run_dir("codes", tag), self.run_dir("tokenizer", precision) / "model"
        self.encoding(run, f"encode {tag}", str(tokenizer), precision, processes)
        if processes > 1:
            same(
                codes_of(run), codes_of(self.run_dir("codes", precision)), 1.0, "of the codes are those of one process"
            )

    def encoding(
        self, run: Path, log: str, tokenizer: str, precision: str, processes: int = 1, device: str = ""
    ) -> None:
        arguments = (self.data, f"tokenizer={tokenizer}", f"run_dir={run}", f"precision={precision}", "shard_size=6")
        self.slm(log, "encode", *arguments, processes=processes, device=device)

    def compare_codes(self) -> None:
        """The embedded tokenizer's fp32 codes, here and on the CPU."""
        runs = {device: self.run_dir("embedded", device) for device in dict.fromkeys((self.device, "cpu"))}
        for device, run in runs.items():
            self.encoding(run, f"codes on {device}", "embedded-12.5hz", "fp32", device=device)
        same(codes_of(runs[self.device]), codes_of(runs["cpu"]), SAME_CODES, "of book 0 in fp32 are the CPU's codes")

    def train_lm(self) -> None:
        """A small text LM to fine-tune."""
        sizes = "lm={vocab_size: 300, hidden_size: 32, layers: 2, heads: 2, key_value_heads: 1, intermediate_size: 64}"
        self.slm("train-lm", "train-lm", self.data, sizes, LLM_STEPS, f"run_dir={self.run_dir('lm')}", "precision=fp32")

    def finetune(self, tag: str, precision: str, processes: int) -> None:
        """An LLM that hears and speaks."""
        run, lm = self.run_dir("finetune", tag), self.run_dir("lm") / "model"
        arguments = [f"model={lm}", f"corpus={self.run_dir('codes', tag)}", LLM_STEPS, f"run_dir={run}"]
        self.slm(f"finetune {tag}", "finetune", *arguments, f"precision={precision}", processes=processes)
        losses(run, "loss")

    def generate(self, tag: str, precision: str, processes: int) -> None:
        """Speech of a text, and text of speech, with the weights held in the precision."""
        model = self.run_dir("finetune", tag) / "model"
        arguments = [f"model={model}", f"data.path={self.manifest}", "limit=2", f"weights={precision}"]
        arguments += [f"tokenizer={self.run_dir('tokenizer', precision) / 'model'}"]
        for command in ("synthesize", "transcribe"):
            run = self.run_dir(command, tag)
            self.slm(f"{command} {tag}", command, *arguments, f"run_dir={run}")
            if not (run / "predictions.jsonl").is_file():
                raise CheckFailed(f"no predictions in {run}")

    def resume(self) -> None:
        """From the middle of the training, with all that it did after taken away."""
        whole, cut = self.run_dir("tokenizer", "fp32"), self.run_dir("tokenizer", "cut")
        shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("checkpoint-*4", "complete.json", "model"))
        file = cut / "config.yaml"
        file.write_text(file.read_text(encoding="utf-8").replace(str(whole), str(cut)), encoding="utf-8")
        self.training(cut, "resume", "fp32")
        log = (self.folder / "logs" / "resume.log").read_text(encoding="utf-8")
        if "resumed at step 2" not in log:
            raise CheckFailed("it did not go on from the checkpoint of step 2")
        near("the last step's mel loss", losses(cut)[-1], losses(whole)[-1], 0.02)

    def compile(self) -> None:
        """The same training, its encoders and decoders compiled."""
        run = self.run_dir("tokenizer", "compiled")
        self.training(run, "compile", "fp32", "training.compile=true")
        near("the last step's mel loss", losses(run)[-1], losses(self.run_dir("tokenizer", "fp32"))[-1], 0.02)


def error_in(log: str) -> str:
    """The line of a log that names the error: the first one that a Python traceback ends in, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if ERROR.match(line) and "ChildFailedError" not in line]
    return (named or lines or ["no output"])[0 if named else -1][:300]


def losses(run: Path, name: str = "loss/mel") -> list[float]:
    """A training's losses, step by step. Raises CheckFailed where there are none or one is not finite."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [row[name] for row in rows if name in row]
    if not found or not all(map(math.isfinite, found)):
        raise CheckFailed(f"{name} of {run}: {found or 'none'}")
    return found


def near(what: str, found: float, wanted: float, tolerance: float) -> None:
    """Raises CheckFailed where a figure is not, relative, what it should be."""
    if abs(found - wanted) > tolerance * abs(wanted):
        raise CheckFailed(f"{what} is {found:.4f}, not {wanted:.4f} (within {100 * tolerance:g} %)")


def codes_of(run: Path) -> dict[str, np.ndarray]:
    """Codes (K, F) of every utterance of a coded corpus."""
    corpus = CodedCorpus.open(run)
    return {row["id"]: np.asarray(row["audio_codes"]) for split in corpus.splits for row in corpus.rows(split)}


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], least: float, what: str) -> None:
    """Raises CheckFailed where fewer frames than `least` have the same code: all books' for 1, else book 0's."""
    if found.keys() != wanted.keys():
        raise CheckFailed(f"{len(found)} utterances were encoded, not {len(wanted)}")
    books = slice(None) if least == 1 else slice(1)
    equal = np.concatenate([(found[name][books] == wanted[name][books]).ravel() for name in wanted])
    if equal.mean() < least:
        raise CheckFailed(f"{100 * equal.mean():.2f} % {what}, {100 * least:g} % are wanted")


def report(checks: Sequence[Check], only: Sequence[str]) -> int:
    """Does the checks and prints a line for each; returns how many failed.

    Args:
        checks: in order.
        only: words; checks that have one of them in their names are done, and those whose results they read.
    """
    by_name, wanted = {check.name: check for check in checks}, set()

    def want(name: str) -> None:
        wanted.add(name)
        for other in by_name[name].needs:
            want(other)

    for check in checks:
        if not only or any(word in check.name for word in only):
            want(check.name)
    done: dict[str, str] = {}
    for check in (check for check in checks if check.name in wanted):
        missing = [name for name in check.needs if done.get(name) != "ok"]
        why = check.skip or (f"needs {missing[0]!r}" if missing else "")
        started, status = time.perf_counter(), "skipped" if why else "ok"
        if not why:
            try:
                check.run()
            except Exception as error:  # whatever it is, the other checks say more
                status, why = "failed", (str(error) or type(error).__name__).splitlines()[0]
        done[check.name] = status
        seconds = "" if status == "skipped" else f" ({time.perf_counter() - started:.0f} s)"
        print(f"{status:8}{check.name}{seconds}{': ' if why else ''}{why}", flush=True)
    count = {status: list(done.values()).count(status) for status in ("ok", "failed", "skipped")}
    print(", ".join(f"{number} {status}" for status, number in count.items()))
    return count["failed"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, does the checks, returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="checks that have it in their names")
    parser.add_argument("--folder", type=Path, help="an empty one for runs and logs, which is kept")
    parser.add_argument(
        "--timeout-s", type=float, default=900.0, help="seconds after which a command counts as hanging"
    )
    options = parser.parse_args(arguments)
    gpus = torch.cuda.device_count()
    if options.device == "cuda" and not gpus:
        print(f"no GPU: torch {torch.__version__} sees none. --device cpu runs the same checks on the CPU")
        return 0
    kept = options.folder is not None
    folder = options.folder.resolve() if kept else Path(tempfile.mkdtemp(prefix="gpu-smoke-"))
    names = ", ".join(torch.cuda.get_device_name(n) for n in range(gpus)) if options.device == "cuda" else "the CPU"
    print(f"torch {torch.__version__}; {names}; runs and logs in {folder}", flush=True)
    smoke = Smoke(folder, options.device, gpus, options.timeout_s)
    smoke.make_inputs()
    failed = report(smoke.checks(), options.only)
    if not kept and not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
