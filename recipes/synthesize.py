"""``slm synthesize``: text to speech with a fine-tuned SLM.

Speaks your own words (``slm synthesize "text" -o out.wav model=RUN/model``), or the texts of a split of a data source
or coded corpus. One sample per text, drawn from its own random stream; codes become sound by semantic reconstruction
(main decoder, book 0) or, where the model speaks several codebooks, from all of them. Writes ``audio/*.wav``,
``predictions.jsonl`` and ``predictions.json``.

Not here: scores (``slm evaluate``), choice among samples.
"""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from eval.text import get_normaliser
from recipes.config import ConfigError
from recipes.runtime import MAY_CHANGE, RunFolder, disk_errors, log, resolve_device
from recipes.transcribe import (
    begun,
    check_inputs,
    corpus_rows,
    in_chunks,
    model_vocabulary,
    require_input,
    source_utterances,
    speech_tokenizer,
    write_predictions,
)
from slm.generation import SpeechLM, SynthesizeSettings, synthesize_codes
from slm.vocabulary import SpeechVocabulary
from tokenizer.data import DataSource


@dataclass
class Config:
    """What is said with what."""

    run_dir: str = field(default="", metadata={"help": "where audio and predictions go; may be empty with a text"})
    model: str = field(default="", metadata={"help": "folder of a fine-tuned model (RUN_DIR/model of `slm finetune`)"})
    text: str = field(default="", metadata={"help": "what to say"})
    output: str = field(
        default="", metadata={"help": "the file for a text without run_dir; empty: out.wav", MAY_CHANGE: True}
    )
    data: DataSource | None = field(default=None, metadata={"help": "or a data source, e.g. data.path=manifest.jsonl"})
    corpus: str | None = field(default=None, metadata={"help": "or a coded corpus: the run_dir of `slm encode`"})
    split: str = field(default="test", metadata={"help": "split of the data source or corpus"})
    limit: int | None = field(default=None, metadata={"help": "only the first N texts"})
    tokenizer: str = field(default="", metadata={"help": "speech tokenizer; empty: the one the model was trained with"})
    decoding: SynthesizeSettings = field(default_factory=SynthesizeSettings, metadata={"help": "how codes are drawn"})
    weights: str = field(default="fp32", metadata={"help": "how the model is held: fp32, bf16, fp16"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})

    def __post_init__(self) -> None:
        check_inputs(self, self.text, "text")
        if self.output and self.run_dir:
            raise ValueError(
                f"output (-o): {self.output!r} would be ignored with run_dir, where audio goes to "
                f"{self.run_dir}/audio; give one of the two"
            )

    @property
    def output_file(self) -> str:
        """Where the audio of a single text goes."""
        return self.output or "out.wav"


def read_texts(config: Config, vocabulary: SpeechVocabulary) -> list[tuple[str, str]]:
    """(id, text) of everything to say."""
    if config.corpus:
        return [(row["id"], row["text"]) for row in corpus_rows(config, vocabulary)]
    if config.data:
        return [(utterance.id, utterance.text) for utterance in source_utterances(config)]
    return [("text", config.text)]


def file_name(utterance_id: str) -> str:
    """A file name for an id; ids that are none get a hash, so that two never share a name."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", utterance_id)[:100]
    if plain != utterance_id or plain.startswith("."):
        plain = f"{plain.lstrip('.')}-{hashlib.sha256(utterance_id.encode()).hexdigest()[:8]}"
    return plain + ".wav"


def decoding_tokenizer(config: Config, vocabulary: SpeechVocabulary, device: str) -> Any:
    """The speech tokenizer the model was trained with. Raises ConfigError where it has no decoder."""
    tokenizer = speech_tokenizer(config, vocabulary, device)
    if not tokenizer.ways_back:
        raise ConfigError(
            f"the model speaks the codes of {config.tokenizer or vocabulary.tokenizer}, which has no decoder to make "
            "sound of them: it can transcribe, not synthesize. Fine-tune a model on codes of a tokenizer with a decoder"
        )
    return tokenizer


@torch.inference_mode()
def decode(tokenizer: Any, codes: np.ndarray, device: str) -> np.ndarray:
    """(n, F) codes -> (S,) waveform by the main decoder, within [-1, 1]."""
    values = tokenizer.decode(torch.from_numpy(codes)[None].to(device)).audio_values
    return values[0, 0].float().clamp(-1, 1).cpu().numpy()


def plan(config: Config) -> dict[str, object]:
    """What would be said; raises what would stop it."""
    require_input(config, config.text, '"TEXT"')
    if config.run_dir:
        RunFolder(config.run_dir).check(config)
    device = resolve_device(config.device)
    vocabulary = model_vocabulary(config)
    tokenizer = decoding_tokenizer(config, vocabulary, "cpu")
    texts = read_texts(config, vocabulary)
    budget = config.decoding.min_seconds * len(texts)
    budget += config.decoding.seconds_per_character * sum(len(text) for _, text in texts)
    return {
        "model": config.model,
        "speech tokenizer": config.tokenizer or vocabulary.tokenizer,
        "texts": len(texts),
        "speech tokens at most": int(budget * vocabulary.frame_rate * vocabulary.n_codebooks),
        "sampling rate (Hz)": tokenizer.config.sampling_rate,
        "device": device,
        "result": config.run_dir or config.output_file,
    }


def run(config: Config) -> Path:
    """Synthesize; returns predictions.jsonl, or the audio file where no run_dir is set."""
    require_input(config, config.text, '"TEXT"')
    device = resolve_device(config.device)
    vocabulary = model_vocabulary(config)
    folder = begun(config, [config.text])
    if folder is not None and folder.complete:
        log.info("%s is complete: skipped", config.run_dir)
        return folder.path("predictions.jsonl")
    normalise = get_normaliser(vocabulary.normaliser)
    texts = read_texts(config, vocabulary)
    tokenizer = decoding_tokenizer(config, vocabulary, device)
    speech_lm = SpeechLM.load(config.model, device, config.weights)
    if folder is None:
        output = speak_one(config, speech_lm, tokenizer, normalise(config.text), device)
        return output
    folder.path("audio").mkdir(exist_ok=True)
    rate, rows, audio_s, wall_s = tokenizer.config.sampling_rate, {}, 0.0, 0.0
    for name, text in texts:
        if not normalise(text):
            rows[name] = _row(name, text, error="no text to say")
            log.warning("%s: no text to say", name)
    good = sorted(((name, text) for name, text in texts if name not in rows), key=lambda item: len(item[1]))
    for chunk in in_chunks(good, 2, config.decoding.batch_size, "synthesize"):
        started = time.perf_counter()
        said = [normalise(text) for _, text in chunk]
        outputs = synthesize_codes(speech_lm, said, config.decoding, keys=[name for name, _ in chunk])
        share = (time.perf_counter() - started) / len(chunk)
        for (name, text), output in zip(chunk, outputs, strict=True):
            started = time.perf_counter()
            waveform = decode(tokenizer, output.codes, device)
            wall = share + time.perf_counter() - started
            audio = f"audio/{file_name(name)}"
            with disk_errors(folder.path(audio)):
                soundfile.write(folder.path(audio), waveform, rate, subtype="PCM_16")
            audio_s, wall_s = audio_s + len(waveform) / rate, wall_s + wall
            n_codes = int(output.codes.size)
            rows[name] = _row(name, text, audio=audio, n_codes=n_codes, truncated=output.truncated, wall_s=wall)
    ordered = [rows[name] for name, _ in texts]
    path = write_predictions(config, "tts", ordered, vocabulary, wall_s, audio_s)
    truncated = sum(row["truncated"] for row in ordered)
    log.info("said %d of %d texts, %d cut off; %.1f s of speech", len(good), len(texts), truncated, audio_s)
    folder.mark_complete({"n": len(texts), "n_failed": len(texts) - len(good), "n_truncated": truncated})
    return path


def speak_one(config: Config, speech_lm: SpeechLM, tokenizer: Any, text: str, device: str) -> Path:
    """Says one text into config.output_file."""
    if not text:
        raise ConfigError(
            f"text: {config.text!r} holds nothing to say after the {speech_lm.vocabulary.normaliser!r} normaliser"
        )
    output = synthesize_codes(speech_lm, [text], config.decoding)[0]
    if output.truncated:
        log.warning("the model did not end within its budget: the audio is cut off (decoding.min_seconds raises it)")
    path = Path(config.output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(path):
        soundfile.write(path, decode(tokenizer, output.codes, device), tokenizer.config.sampling_rate, subtype="PCM_16")
    return path


def _row(
    name: str,
    text: str,
    audio: str | None = None,
    n_codes: int = 0,
    truncated: bool = False,
    error: str | None = None,
    wall_s: float = 0.0,
) -> dict[str, Any]:
    return {
        "id": name,
        "task": "tts",
        "text": text,
        "audio": audio,
        "n_codes": n_codes,
        "truncated": truncated,
        "error": error,
        "wall_s": round(wall_s, 4),
    }
