"""``slm resynthesize``: your own recordings through one or more speech tokenizers, and back to sound.

For each tokenizer (the embedded ones where none is named) and each of its outputs (reconstruction, semantic
reconstruction, resynthesis) a WAV, beside it the
recording as the tokenizers got it; ``resynthesis.json`` with frame rate, bitrate, speed and scores; ``index.html``, a
page to listen to. Recordings are read, encoded, decoded, written and scored piece by piece: memory does not grow with
their length where the tokenizer can be cut into chunks. Each start makes everything anew, once it has read every
recording whole; nothing is written over but what `slm resynthesize` wrote.

Not here: corpora (``slm encode``), WER over a test set (``slm evaluate``).

Shapes: S samples, s samples of one block, K books, F code frames; waveforms (S,), codes (K, F).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import soundfile
import torch

from eval.codes import nominal_bitrate
from eval.judges.config import JudgeConfig
from eval.judges.judge import Judge, check_judge, load_judge
from eval.speech.measures.registry import Measure, chosen_measures
from recipes.config import ConfigError, Problems
from recipes.inference.named_files import UnusableFiles, check_named_files, unusable_files
from recipes.plugins import plugins_key
from recipes.runs.embedded import RECOGNISERS, TOKENIZERS, resolve_judge
from recipes.runs.files import atomic_write_text
from recipes.runs.logs import log
from recipes.runs.machine import resolve_device, resolve_precision, seed_everything
from recipes.runs.own_folders import refuse_unwritable
from recipes.runs.progress import progress
from recipes.runs.run_folder import describe_run
from recipes.scoring.labels import distinct, file_name, labels_of
from recipes.scoring.resynthesis import (
    MOST_PIECES,
    PIECE_S,
    RESULTS_FILE,
    cer_to_recording,
    means,
    print_tables,
    refuse_foreign_files,
    scores,
    transcribe_excerpt,
    write_page,
)
from recipes.scoring.round_trip import Codec, decode_timed, encode_timed, warm_up, write_wav
from tokenizer import load_tokenizer
from tokenizer.data.utterances import AudioError, Utterance
from tokenizer.long_form.chunking import CHUNK_S
from tokenizer.long_form.long_audio import LongAudio
from tokenizer.precision import exact_fp32


@dataclass
class Config:
    """What goes through what."""

    own_files: ClassVar[tuple[str, ...]] = (RESULTS_FILE,)  # by it `--restart` knows a folder of this command

    files: list[str] = field(
        default_factory=list,
        metadata={"help": "recordings: any container that libsndfile reads, any rate, any number of channels"},
    )
    tokenizers: list[str] | str = field(
        default_factory=lambda: list(TOKENIZERS),
        metadata={"help": "one or [several,of,them]: embedded names, folders, presets or hub names"},
    )
    output: str = field(default="resynthesis", metadata={"help": "the folder for audio, scores and page (-o)"})
    judge: str | None = field(
        default=RECOGNISERS[0],
        metadata={"help": "recogniser that says what it hears: embedded or hub name, folder, pocketsphinx; null: none"},
    )
    measures: list[str] = field(
        default_factory=list,
        metadata={"help": "[names,of,measures] of the audio; none: log-mel distance, STOI, PESQ and level"},
    )
    measure_models: dict[str, str] = field(
        default_factory=dict, metadata={"help": "{measure: model} in place of its own, as in slm evaluate"}
    )
    excerpt_s: float = field(
        default=30.0, metadata={"help": "seconds from the start that the page plays and the judge reads"}
    )
    chunk_s: float = field(default=CHUNK_S, metadata={"help": "seconds that go through a tokenizer at a time"})
    precision: str = field(default="auto", metadata={"help": "of encoding: auto, fp32, bf16 or fp16"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    seed: int = field(default=0, metadata={"help": "of a preset's random weights"})
    allow_untrained: bool = field(default=False, metadata={"help": "accept a preset's random weights"})
    strict: bool = field(default=False, metadata={"help": "stop at the first file that cannot be used"})
    plugins: list[str] = plugins_key()

    def __post_init__(self) -> None:
        if isinstance(self.tokenizers, str):
            self.tokenizers = [self.tokenizers]
        if not self.output:
            raise ValueError("output: empty; name a folder with -o")
        if not (self.excerpt_s > 0 and self.chunk_s > 0):
            raise ValueError("excerpt_s and chunk_s must be above 0 seconds")

    @property
    def run_dir(self) -> str:
        """The folder that is written; what `--restart` sets aside."""
        return self.output

    @run_dir.setter
    def run_dir(self, folder: str) -> None:
        self.output = folder


@dataclass
class Job:
    """All that is needed, checked."""

    codecs: list[Codec]
    judge: JudgeConfig | None
    measures: list[Measure]
    precision: str
    device: str
    stems: list[str]  # of each file's outputs

    @property
    def recording_hz(self) -> int:
        """The rate of the recording that the results stand beside: the highest that a tokenizer hears."""
        return max(codec.model.config.sampling_rate for codec in self.codecs)


def _judge(name: str) -> JudgeConfig:
    judge = resolve_judge(JudgeConfig(name))
    check_judge(judge)
    return judge


def _tokenizer(name: str, allow_untrained: bool) -> Any:
    """Raises ConfigError for one that gives no sound, or noise; and what `load_tokenizer` raises."""
    model = load_tokenizer(name)
    if not model.trained and not allow_untrained:
        raise ConfigError(
            f"tokenizer {name} has random weights: noise is all that would come back. Train one with `slm "
            "train-tokenizer`, name a trained folder, or set allow_untrained=true for a trial of speed or plumbing"
        )
    if not model.decode_paths:
        raise ConfigError(f"tokenizer {name} has no decoder: it makes codes, but no sound of them; leave it out")
    return model


def prepare(config: Config) -> Job:
    """Load the tokenizers and name the outputs. Raises ConfigError and what `load_tokenizer` or the judge raise."""
    if not config.files:
        raise ConfigError("nothing to do: give FILE..., e.g. slm resynthesize recording.wav -o heard")
    if len({str(Path(name)) for name in config.tokenizers}) != len(config.tokenizers):
        raise ConfigError(f"tokenizers: one stands there twice: {', '.join(config.tokenizers)}")
    if Path(config.output).exists() and not Path(config.output).is_dir():
        raise ConfigError(f"output (-o): {config.output} is a file; name a folder")
    refuse_unwritable(Path(config.output), "output (-o)")
    problems = Problems("slm resynthesize")
    device = problems.attempt(resolve_device, config.device)
    precision = problems.attempt(resolve_precision, config.precision, device or "cpu")
    judge = problems.attempt(_judge, config.judge) if config.judge else None
    measures = problems.attempt(chosen_measures, config.measures, config.measure_models)
    seed_everything(config.seed)
    models = [problems.attempt(_tokenizer, name, config.allow_untrained) for name in config.tokenizers]
    problems.raise_all()
    codecs = [
        Codec(name, label, model.to(device), model.fingerprint(precision))
        for name, label, model in zip(config.tokenizers, labels_of(config.tokenizers), models, strict=True)
    ]
    job = Job(
        codecs, judge, measures, precision, device, distinct([file_name(Path(name).stem) for name in config.files])
    )
    inputs = {Path(name).resolve() for name in config.files}
    for stem in job.stems:
        for path in _outputs(config, job, stem):
            if path.resolve() in inputs:
                raise ConfigError(f"{path} is one of the recordings and would be overwritten: choose another -o")
    refuse_foreign_files(Path(config.output), [path for stem in job.stems for path in _outputs(config, job, stem)])
    return job


def plan(config: Config) -> dict[str, object]:
    """What would be made; raises what would stop it, and where a recording cannot be used, which ones."""
    job = prepare(config)
    check_named_files(config.files)
    facts: dict[str, object] = {name: _describe(soundfile.info(name)) for name in config.files}
    for codec in job.codecs:
        facts[codec.label] = {
            "frame rate (Hz)": codec.model.config.frame_rate,
            "codebooks": codec.model.config.codebook_sizes,
            "outputs": ", ".join(codec.model.decode_paths),
        }
    return facts | {"precision": job.precision, "device": job.device, "result": config.output}


@exact_fp32()  # judges and tokenizers whose protocol says fp32
def run(config: Config) -> Path:
    """Make everything; returns the page.

    Raises:
        AudioError: some files could not be used (after all else is made), or, with `strict`, the first of them.
    """
    job, out = prepare(config), Path(config.output)
    readable, errors = _readable(config, job)
    if not readable:
        raise _unusable(config, errors, f"nothing was made, and {out} is as it was")
    for error in errors:
        log.warning("%s", error["error"])
    judge = load_judge(job.judge, job.device) if job.judge else None
    if not (out / RESULTS_FILE).exists():  # so that after a cut the same command finds its own files there
        atomic_write_text(out / RESULTS_FILE, json.dumps({"recordings": [], "run": describe_run(config)}) + "\n")
    recordings = []
    for codec in job.codecs:
        warm_up(codec, job.precision, job.device)
    for recording, stem in progress(readable, "resynthesize", len(readable)):
        written: list[Path] = []
        try:
            recordings.append(_one_recording(config, job, judge, recording, stem, written))
        except AudioError as error:
            if config.strict:
                raise
            log.warning("%s", error)
            errors.append({"file": recording.utterance.id, "error": str(error)})
            for path in written:
                path.unlink(missing_ok=True)
    if not recordings:
        raise _unusable(config, errors, "nothing was made")
    results = {
        "recordings": recordings,
        "errors": errors,
        "tokenizers": [
            {"name": c.name, "label": c.label, "fingerprint": c.fingerprint, "model_type": c.model.config.model_type}
            for c in job.codecs
        ],
        "protocol": {
            "scores": f"against the recording at {job.recording_hz} Hz; means over pieces of at most {PIECE_S:g} s, at "
            f"most {MOST_PIECES} of a recording",
            "real_time_factor": "seconds of encoding and decoding for a second of audio, reading and writing not "
            "counted, one recording at a time",
            "precision": job.precision,
            "device": job.device,
            "threads": torch.get_num_threads(),
            "judge": judge.identity if judge else None,
            "excerpt_s": config.excerpt_s,
        },
        "config": asdict(config),
        "run": describe_run(config),
    }
    results["means"] = means(results)
    atomic_write_text(out / RESULTS_FILE, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    page = write_page(results, out)
    print_tables(results)
    if errors:
        raise _unusable(config, errors, f"the others are in {out}")
    return page


def _readable(config: Config, job: Job) -> tuple[list[tuple[LongAudio, str]], list[dict[str, str]]]:
    """Every recording that can be used, with the stem of its outputs; and what is wrong with each of the others."""
    found, errors = [], []
    for name, stem in zip(config.files, job.stems, strict=True):
        try:
            found.append((LongAudio(Utterance(name, name), job.recording_hz), stem))
        except AudioError as error:
            if config.strict:
                raise
            errors.append({"file": name, "error": str(error)})
    return found, errors


def _unusable(config: Config, errors: list[dict[str, str]], rest: str) -> UnusableFiles:
    return unusable_files({error["file"]: error["error"] for error in errors}, len(config.files), rest)


@torch.inference_mode()
def _one_recording(
    config: Config, job: Job, judge: Judge | None, recording: LongAudio, stem: str, written: list[Path]
) -> dict[str, Any]:
    """One file through all tokenizers; returns its entry of the results. Raises AudioError.

    `written` gets every file before it is begun.
    """
    utterance, out, name = recording.utterance, Path(config.output), recording.utterance.id
    original = out / f"{stem}-recording.wav"
    written.append(original)
    n_samples = write_wav(original, recording.blocks(), job.recording_hz)
    info = soundfile.info(name)
    entry: dict[str, Any] = {
        "file": name,
        "facts": _describe(info),
        "duration_s": n_samples / job.recording_hz,
        "sampling_rate": info.samplerate,
        "channels": info.channels,
        "audio": original.name,
        "heard": transcribe_excerpt(judge, original, config.excerpt_s),
        "rows": [],
    }
    if alone := [measure for measure in job.measures if not measure.needs_reference]:
        entry["measured"] = scores(original, original, original.name, alone)
    for codec in job.codecs:
        codec_config = codec.model.config
        sizes, frame_rate = codec_config.codebook_sizes, codec_config.frame_rate
        at_its_rate = LongAudio(utterance, codec_config.sampling_rate)
        codes, encode_s = encode_timed(codec, at_its_rate, config.chunk_s, job.precision, job.device)
        for way, n_books, way_hz in codec.ways():
            path = out / f"{stem}-{codec.label}-{way.replace('_', '-')}.wav"
            written.append(path)
            way_samples = math.ceil(n_samples * way_hz / job.recording_hz)
            decode_s = decode_timed(codec, codes[:n_books], way, config.chunk_s, path, way_hz, way_samples)
            wall_s = encode_s + decode_s
            row = {
                "tokenizer": codec.label,
                "way": way,
                "audio": path.name,
                "sampling_rate": way_hz,
                "frame_rate_hz": float(frame_rate),
                "n_books": n_books,
                "codebook_sizes": list(sizes[:n_books]),
                "bitrate_bps": nominal_bitrate(frame_rate, sizes[:n_books]),
                "wall_s": wall_s,
                "real_time_factor": wall_s / entry["duration_s"],
            }
            transcript = transcribe_excerpt(judge, path, config.excerpt_s)
            row |= scores(original, path, codec.label, job.measures)
            row |= {"heard": transcript, "heard_cer": cer_to_recording(entry["heard"], transcript)}
            entry["rows"].append(row)
    return entry


def _outputs(config: Config, job: Job, stem: str) -> list[Path]:
    ways = [f"{codec.label}-{way.replace('_', '-')}" for codec in job.codecs for way, _, _ in codec.ways()]
    return [Path(config.output) / f"{stem}-{name}.wav" for name in ["recording", *ways]]


def _describe(info: Any) -> str:
    channels = {1: "mono", 2: "stereo, mixed to mono"}.get(info.channels, f"{info.channels} channels, mixed to mono")
    return f"{info.duration:.2f} s, {info.samplerate} Hz, {channels}, {info.format} {info.subtype}"
