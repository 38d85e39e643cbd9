"""`slm transcribe` of a model that hears continuous features: its files, rows and sidecar are those of any other.

What it cannot do is refused by its key: codes as input, other tasks than ASR, drawn or several answers, long ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.config import ConfigError, Problems
from recipes.continuous.encoder import (
    ENCODER_RATE_HZ,
    FRAMES_PER_S,
    encode_recordings,
    encoder_fingerprint,
    load_encoder,
)
from recipes.inference.batches import Outcome, Times, begin_together, make_batches, work_through
from recipes.inference.named_files import check_named_files
from recipes.inference.predictions import begun, finished
from recipes.inference.setup import require_input, source_utterances
from recipes.inference.transcripts import give_transcripts
from recipes.runs.logs import log
from recipes.runs.machine import resolve_device
from recipes.runs.processes import Processes
from slm.model.continuous import FACTS_FILE, load_continuous
from slm.tasks import get_task
from tokenizer.data.audio import load_audio
from tokenizer.data.utterances import AudioError, Utterance
from tokenizer.teacher.whisper import TeacherConfig


@dataclass(frozen=True)
class NoPattern:
    """Stands where a pattern of codes does."""

    name: str = "continuous"


@dataclass(frozen=True)
class Heard:
    """What a sidecar says of the features, where another's says it of codes."""

    tokenizer: str
    frame_rate: float
    normaliser: str
    fingerprint: str = ""  # of codes: there are none
    n_codebooks: int = 1
    ids_per_frame: int = 1
    pattern: NoPattern = NoPattern()

    @property
    def normaliser_of_prompts(self) -> str:
        """No text is in its prompts."""
        return self.normaliser


def plan(config: Any) -> dict[str, object]:
    """What would be transcribed; raises all that would stop it, together."""
    problems = Problems("slm transcribe")
    problems.attempt(_refuse, config)
    problems.attempt(require_input, config, config.files, "FILE...")
    problems.attempt(check_named_files, config.files, config.max_duration_s)
    utterances = problems.attempt(_utterances, config)
    problems.raise_all()
    facts = _facts(config)
    return {
        "model": config.model,
        "encoder": facts["encoder"]["name"],
        "utterances": len(utterances),
        "beams": config.decoding.num_beams,
        "result": config.run_dir or "the terminal",
    }


def run(config: Any, processes: Processes) -> Path | dict[str, str]:
    """Transcribes; what it returns and raises is as `recipes.commands.transcribe.run`'s."""
    inputs = [Path(path) for path in config.files]
    if (done := finished(config, inputs)) is not None:
        return done
    _refuse(config)
    require_input(config, config.files, "FILE...")
    device, facts = resolve_device(config.device), _facts(config)
    encoder = load_encoder(TeacherConfig(**facts["encoder"]), device)
    if encoder_fingerprint(encoder) != facts["encoder_fingerprint"]:
        raise ConfigError(
            f"model {config.model}: its encoder {facts['encoder']['name']} holds other weights than those it was "
            "trained on; give it back that encoder, or train it anew"
        )
    folder = begin_together(lambda: begun(config, inputs), config, processes)
    model, text_tokenizer, _ = load_continuous(config.model, encoder.encoder.config.d_model, config.weights)
    model.to(device)
    utterances, limits = _utterances(config), config.decoding

    def work(numbers: Sequence[int]) -> Outcome:
        rows: dict[int, dict[str, Any]] = {}
        heard, times, started = {}, Times(), time.perf_counter()
        for number in numbers:
            one = utterances[number]
            rows[number] = {
                "id": one.id,
                "task": "asr",
                "reference": one.text,
                "hypothesis": None,
                "truncated": False,
                "faults": [],
                "error": None,
                "duration_s": None,
                "wall_s": 0.0,
            }
            try:
                heard[number] = load_audio(one, ENCODER_RATE_HZ, min(config.max_duration_s or 1e9, encoder.window_s))
                rows[number]["duration_s"] = len(heard[number]) / ENCODER_RATE_HZ
            except AudioError as error:
                rows[number]["error"] = str(error)
                if not config.files:
                    log.warning("%s", error)
        if not heard:
            return Outcome(rows, times)
        features = encode_recordings(encoder, list(heard.values()))
        times.encode_s = time.perf_counter() - started
        most = [limits.min_tokens + round(limits.tokens_per_s * len(w) / ENCODER_RATE_HZ) for w in heard.values()]
        answers = model.generate(features, most, limits.num_beams)
        times.generate_s = time.perf_counter() - started - times.encode_s
        for number, ids in zip(heard, answers, strict=True):
            ended = bool(ids) and ids[-1] == model.end_id
            rows[number] |= {
                "hypothesis": text_tokenizer.decode(ids, skip_special_tokens=True).strip(),
                "truncated": not ended,
                "faults": [] if ended else ["length"],
                "wall_s": round((times.encode_s + times.generate_s) / len(heard), 4),
            }
            times.n_tokens += len(ids)
        return Outcome(rows, times)

    batches = make_batches([one.duration or 0.0 for one in utterances], [1] * len(utterances), limits.batch_size)
    outcome = work_through(batches, work, folder, processes, "transcribe")
    rows = [row for _, row in sorted(outcome.rows.items())]

    rate = FRAMES_PER_S / facts["projector"]["stack"]
    heard = Heard(f"{facts['encoder']['name']}, continuous", rate, facts["normaliser"])

    def give() -> Path | None:
        return give_transcripts(config, get_task("asr"), rows, heard, outcome.times, folder, processes.count)

    path = processes.together(lambda: give() if processes.is_main else None)[0]
    return {row["id"]: row["hypothesis"] for row in rows} if folder is None else path


def _utterances(config: Any) -> list[Utterance]:
    if config.data:
        return source_utterances(config)
    return [Utterance(id=str(path), audio=str(path), split="test") for path in config.files]


def _facts(config: Any) -> dict[str, Any]:
    return json.loads((Path(config.model).expanduser() / FACTS_FILE).read_text(encoding="utf-8"))


def _refuse(config: Any) -> None:
    """Raises ConfigError for keys that a model without codes has no use for."""
    name = f"model {config.model}: hears continuous features, not codes"
    wrong = {
        "corpus": (config.corpus, "give data.path=... or files"),
        "task": (config.task != "asr", "it was trained for asr alone"),
        "tokenizer": (config.tokenizer, "leave it out; its encoder is its own"),
        "wording": (config.wording, "its prompt has no words"),
        "language": (config.language, "its prompt has no tag of a language"),
        "piece_s": (config.piece_s, "what is longer than its encoder's window is an error"),
        "decoding.temperature": (config.decoding.temperature, "greedy or a beam"),
        "decoding.n_best": (config.decoding.n_best > 1, "it gives one answer"),
        "decoding.loop_tokens": (config.decoding.loop_tokens, "it knows no loops"),
    }
    if found := [f"{key} ({way})" for key, (given, way) in wrong.items() if given]:
        raise ConfigError(f"{name}; {', '.join(found)}")
