"""Rebuilt speech as predictions that `slm evaluate` reads: the line of an utterance, and how all were made.

Shapes: K books of a word, W words, F frames, S samples; word codes (K, W), waveforms (S,).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from recipes.inference.batches import Times
from recipes.inference.scripts import NON_FINITE_SAMPLES
from recipes.inference.speech_checks import is_silent
from recipes.runs.files import atomic_write_text
from recipes.runs.machine import describe_machine, machine_text
from slm.text_aligned.configuration import TextAlignedConfig
from slm.text_aligned.decoding import RebuiltCodes

TASK = "text-aligned"
SPOKEN = "tts-text-aligned"  # of word codes that an SLM wrote: text to speech, and a row among the others of it


def prediction_row(
    utterance_id: str,
    text: str,
    audio: str,
    rebuilt: RebuiltCodes,
    waveform: np.ndarray,
    rate: int,
    word_codes: np.ndarray | None,
) -> dict[str, Any]:
    """The line of predictions.jsonl.

    Args:
        utterance_id: The utterance's.
        text: As the corpus writes it.
        audio: Its file, from the run folder.
        rebuilt: Its semantic codes.
        waveform: (S,) what became of them; the utterance fails where a sample is not finite.
        rate: Hz.
        word_codes: (K, W) that it was rebuilt from; None: from the text alone.
    """
    finite = bool(np.isfinite(waveform).all())
    faults = ([] if rebuilt.ended else ["length"]) + ["silence"] * is_silent(waveform) + ["non_finite"] * (not finite)
    return {
        "id": utterance_id,
        "task": TASK,
        "text": text,
        "audio": audio if finite else None,
        "word_codes": None if word_codes is None else word_codes.tolist(),
        "n_codes": len(rebuilt.codes),
        "duration_s": round(len(waveform) / rate, 3),
        "truncated": not rebuilt.ended,
        "finish_reason": ("stop" if rebuilt.ended else "length") if finite else None,
        "faults": faults,
        "error": None if finite else NON_FINITE_SAMPLES,
    }


def write_rebuilt(
    config: Any, model: TextAlignedConfig, label: str, rows: Sequence[dict[str, Any]], times: Times, recorded_s: float
) -> Path:
    """Writes predictions.jsonl and its sidecar; returns the former.

    Args:
        config: The command's configuration.
        model: The model's.
        label: What tables call the model: two ways to rebuild are two rows there.
        rows: The utterances' lines, in their order.
        times: Seconds of the parts.
        recorded_s: Seconds of the recordings.
    """
    task = SPOKEN if config.word_codes == "slm" else TASK
    path = Path(config.run_dir) / "predictions.jsonl"
    lines = (json.dumps(row | {"task": task}, ensure_ascii=False) + "\n" for row in rows)
    atomic_write_text(path, "".join(lines))
    audio_s = sum(row["duration_s"] for row in rows if row["error"] is None)
    wall_s = times.encode_s + times.generate_s + times.decode_s
    n_words = sum(len(row["word_codes"][0]) for row in rows if row["word_codes"])
    words_per_s = n_words / recorded_s if recorded_s else 0.0
    sidecar = {
        "task": task,
        "answers": "speech",
        "reference": "text",
        "scored_by": "wer",
        "model": label,
        "tokenizer": config.tokenizer or model.tokenizer,
        "fingerprint": model.fingerprint,
        "frame_rate": round(words_per_s, 4),  # one frame per word
        "n_codebooks": model.word_books,
        "positions_per_s": round(words_per_s, 4),
        "bits_per_s": round(words_per_s * model.bits_per_word, 2),
        "word_codes": config.word_codes,
        "normaliser": model.normaliser,
        "decoding": asdict(config.decoding),
        "seed": config.decoding.seed,
        "source": config.corpus,
        "split": config.split,
        "n": len(rows),
        "n_failed": sum(row["error"] is not None for row in rows),
        "n_truncated": sum(row["truncated"] for row in rows),
        "wall_s": round(wall_s, 3),
        "audio_s": round(audio_s, 3),
        "timed": "words and codes from codes, tokenizer's decoder",
        "real_time_factor": round(wall_s / audio_s, 5) if audio_s else None,
        "encode_s": round(times.encode_s, 3),
        "generate_s": round(times.generate_s, 3),
        "decode_s": round(times.decode_s, 3),
        "machine": machine_text({"machine": describe_machine()}),
    }
    atomic_write_text(path.with_suffix(".json"), json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n")
    return path
