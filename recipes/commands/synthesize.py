"""``slm synthesize``: text to speech with a fine-tuned SLM.

Speaks your own words (``slm synthesize "text" -o out.wav model=RUN/model``), or the texts of a split of a data source
or coded corpus. A text longer than the model's training texts is said sentence by sentence, with a pause between. What
the model cannot say is warned of before it speaks, and what looks lost (truncated, silent, short for its words) after.
One sample per text, drawn from its own random stream; codes become sound by semantic reconstruction (main decoder,
book 0) or, where the model speaks several codebooks, from all of them. Writes ``audio/*.wav``, ``predictions.jsonl``
and ``predictions.json``.

Not here: scores (``slm evaluate``), choice among samples.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from transformers import PreTrainedTokenizerBase

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError, Problems
from recipes.inference.long_texts import Part, cut_text
from recipes.inference.predictions import begun, finished, in_chunks, write_predictions
from recipes.inference.setup import (
    Setup,
    check_inputs,
    check_setup,
    corpus_rows,
    require_input,
    source_utterances,
    speech_tokenizer,
)
from recipes.inference.speech_checks import speech_warnings, unsayable
from recipes.runs.files import disk_errors
from recipes.runs.logs import log
from recipes.runs.run_folder import MAY_CHANGE
from slm.generation import SpeechLM, SynthesizeOutput, SynthesizeSettings, seconds_allowed, synthesize_codes
from slm.modeling import describe_llm
from slm.vocabulary import SpeechVocabulary
from tokenizer.data.utterances import DataSource

SINGLE = "text"  # the id of a text that was given by itself
LANGUAGE = "en"  # whose abbreviations end no sentence, where the normaliser names no language
UNKNOWN_LONGEST_TEXT = 200  # characters said in one go, where a model does not tell how long its training's texts were
MAX_WARNINGS = 20  # lines of warnings


@dataclass
class Config:
    """What is said with what."""

    run_dir: str = field(default="", metadata={"help": "where audio and predictions go; may be empty with a text"})
    model: str = field(default="", metadata={"help": "folder of a fine-tuned model (RUN_DIR/model of `slm finetune`)"})
    text: str = field(default="", metadata={"help": "what to say"})
    output: str = field(
        default="",
        metadata={
            "help": "the file for a text without run_dir, its ending names the format (wav, flac, ogg, mp3); empty: "
            "out.wav",
            MAY_CHANGE: True,
        },
    )
    data: DataSource | None = field(default=None, metadata={"help": "or a data source, e.g. data.path=manifest.jsonl"})
    corpus: str | None = field(default=None, metadata={"help": "or a coded corpus: the run_dir of `slm encode`"})
    split: str = field(default="test", metadata={"help": "split of the data source or corpus"})
    limit: int | None = field(default=None, metadata={"help": "only the first N texts"})
    tokenizer: str = field(default="", metadata={"help": "speech tokenizer; empty: the one the model was trained with"})
    decoding: SynthesizeSettings = field(default_factory=SynthesizeSettings, metadata={"help": "how codes are drawn"})
    max_characters: int | None = field(
        default=None,
        metadata={
            "help": "a longer text is cut into sentences, those at commas; counted as it is said; null: the length of "
            f"all but 1 % of the training's texts, {UNKNOWN_LONGEST_TEXT} where the model does not tell it"
        },
    )
    pause_s: float = field(
        default=0.3, metadata={"help": "silence put between two sentences of a text that is cut; in a sentence half"}
    )
    strict: bool = field(
        default=False, metadata={"help": "refuse a text that holds what the model cannot say, in place of a warning"}
    )
    weights: str = field(default="fp32", metadata={"help": "how the model is held: fp32, bf16, fp16"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})

    former_defaults = {"decoding.seconds_per_character": 0.25}  # of finished folders

    def __post_init__(self) -> None:
        check_inputs(self, self.text, "text")
        if self.max_characters is not None and self.max_characters < 1:
            raise ValueError(f"max_characters: {self.max_characters} must be at least 1, or null")
        if self.pause_s < 0:
            raise ValueError(f"pause_s: {self.pause_s:g} must be 0 or more")
        audio_format(self.output_file)
        if self.output and self.run_dir:
            raise ValueError(
                f"output (-o): {self.output!r} would be ignored with run_dir, where audio goes to "
                f"{self.run_dir}/audio; give one of the two"
            )

    @property
    def output_file(self) -> str:
        """Where the audio of a single text goes."""
        return self.output or "out.wav"


@dataclass
class Script:
    """One text on its way to speech, and what became of it."""

    id: str
    text: str
    parts: list[Part]
    unsayable: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    error: str | None = None
    audio: str = ""
    outputs: dict[int, SynthesizeOutput] = field(default_factory=dict)  # by number of the part, until they are written
    segments: list[dict[str, Any]] = field(default_factory=list)
    n_codes: int = 0
    duration_s: float = 0.0
    truncated: bool = False
    wall_s: float = 0.0

    @property
    def place(self) -> str:
        """Which text a message is about; a single one needs no name."""
        return "" if self.id == SINGLE else f"{self.id}: "

    def key(self, number: int, by_text: bool) -> str:
        """What decides a part's random stream, beside the seed."""
        whole = self.parts[number].said if by_text else self.id
        return whole if len(self.parts) == 1 else f"{whole} {number}"

    def row(self) -> dict[str, Any]:
        """Its line of predictions.jsonl; ``segments`` where it was cut."""
        row = {
            "id": self.id,
            "task": "tts",
            "text": self.text,
            "audio": None if self.error else self.audio,
            "n_codes": self.n_codes,
            "truncated": self.truncated,
            "finish_reason": None if self.error else finish_reason(self.truncated),
            "warnings": self.unsayable + self.lost,
            "error": self.error,
            "wall_s": round(self.wall_s, 4),
        }
        return row | ({"segments": self.segments} if len(self.segments) > 1 else {})


def read_texts(config: Config, vocabulary: SpeechVocabulary) -> list[tuple[str, str]]:
    """(id, text) of everything to say."""
    if config.corpus:
        return [(row["id"], row["text"]) for row in corpus_rows(config, vocabulary)]
    if config.data:
        return [(utterance.id, utterance.text) for utterance in source_utterances(config)]
    return [(SINGLE, config.text)]


def file_name(utterance_id: str) -> str:
    """A file name for an id; ids that are none get a hash, so that two never share a name."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", utterance_id)[:100]
    if plain != utterance_id or plain.startswith("."):
        plain = f"{plain.lstrip('.')}-{hashlib.sha256(utterance_id.encode()).hexdigest()[:8]}"
    return plain + ".wav"


def decoding_tokenizer(config: Config, vocabulary: SpeechVocabulary, device: str) -> Any:
    """The speech tokenizer the model was trained with. Raises ConfigError where it has no decoder."""
    tokenizer = speech_tokenizer(config, vocabulary, device)
    if not tokenizer.decode_paths:
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


def longest_text(config: Config, vocabulary: SpeechVocabulary) -> int:
    """Characters that are said in one go."""
    if config.max_characters is not None:
        return config.max_characters
    return vocabulary.trained_on.longest_text if vocabulary.trained_on else UNKNOWN_LONGEST_TEXT


def read_scripts(config: Config, vocabulary: SpeechVocabulary, text_tokenizer: PreTrainedTokenizerBase) -> list[Script]:
    """Everything to say, cut into parts, with what the model cannot say of it.

    Raises:
        ConfigError: `strict`, and there is such a thing; or the only text holds nothing to say.
    """
    normalise, longest = get_normaliser(vocabulary.normaliser), longest_text(config, vocabulary)
    language = vocabulary.normaliser.partition(":")[2]
    language = LANGUAGE if language in ("", "any") else language
    scripts = []
    for name, text in read_texts(config, vocabulary):
        script = Script(
            name, text, cut_text(text, normalise, longest, LANGUAGE if language in ("", "any") else language)
        )
        if not script.parts:
            script.error = f"nothing to say: {text!r} holds no word after the normaliser {vocabulary.normaliser!r}"
        script.unsayable = unsayable(text, normalise, vocabulary, text_tokenizer)
        scripts.append(script)
    if config.text and scripts[0].error:
        raise ConfigError(f"text: {scripts[0].error}")
    if config.strict and (warnings := the_first(f"{s.place}{line}" for s in scripts for line in s.unsayable)):
        head = "the model cannot say all of the text as it is written (without strict it speaks all the same):"
        raise ConfigError("\n  - ".join([head, *warnings]))
    return scripts


def the_first(lines: Iterable[str]) -> list[str]:
    """So many lines as a reader takes in, and how many more there are."""
    lines = list(lines)
    rest = len(lines) - MAX_WARNINGS
    return lines[:MAX_WARNINGS] + ([f"... and {rest} more"] if rest > 0 else [])


def prepare(config: Config) -> Setup:
    """Raises all that would stop a synthesis, together."""
    problems = Problems("slm synthesize")
    problems.attempt(require_input, config, config.text, '"TEXT"')
    setup = check_setup(problems, config, decoding_tokenizer)
    problems.raise_all()
    return setup


def plan(config: Config) -> dict[str, object]:
    """What would be said; raises all that would stop it, together."""
    setup = prepare(config)
    vocabulary, tokenizer = setup.vocabulary, setup.tokenizer
    scripts = read_scripts(config, vocabulary, describe_llm(config.model).tokenizer)
    parts = [part for script in scripts for part in script.parts]
    budget = sum(seconds_allowed(vocabulary, part.said, config.decoding) for part in parts)
    facts: dict[str, object] = {
        "model": config.model,
        "speech tokenizer": config.tokenizer or vocabulary.tokenizer,
        "texts": len(scripts),
        "parts they are cut into": len(parts),
    }
    if (known := vocabulary.trained_on) is not None:
        facts["seconds of speech (about)"] = round(sum(len(part.said) for part in parts) / known.characters_per_s[1], 1)
    return facts | {
        "speech tokens at most": int(budget * vocabulary.frame_rate * vocabulary.n_codebooks),
        "cannot be said": the_first(f"{s.place}{line}" for s in scripts for line in s.unsayable) or "nothing",
        "sampling rate (Hz)": tokenizer.config.sampling_rate,
        "device": setup.device,
        "result": config.run_dir or config.output_file,
    }


def run(config: Config) -> Path:
    """Synthesize; returns predictions.jsonl, or the audio file where no run_dir is set."""
    if (done := finished(config, [config.text])) is not None:
        return done
    setup = prepare(config)
    vocabulary, tokenizer, device = setup.vocabulary, setup.tokenizer, setup.device
    folder = begun(config, [config.text])
    speech_lm = SpeechLM.load(config.model, device, config.weights)
    scripts = read_scripts(config, vocabulary, speech_lm.text_tokenizer)
    warn(f"{script.place}{line}" for script in scripts for line in [*script.unsayable, *filter(None, [script.error])])
    for script in scripts:
        script.audio = f"audio/{file_name(script.id)}" if folder else config.output_file
    where = folder.folder if folder else Path()
    with disk_errors(where / scripts[0].audio):
        (where / scripts[0].audio).parent.mkdir(parents=True, exist_ok=True)
    for script in generated(config, scripts, speech_lm, by_text=folder is None):
        started = time.perf_counter()
        write_speech(config, script, tokenizer, vocabulary, where, device)
        script.wall_s += time.perf_counter() - started
    warn(f"{script.place}{line}" for script in scripts for line in script.lost)
    log_duration(scripts, vocabulary)
    if folder is None:
        return Path(config.output_file)
    rows, good = [script.row() for script in scripts], [script for script in scripts if not script.error]
    wall_s, audio_s = sum(script.wall_s for script in good), sum(script.duration_s for script in good)
    path = write_predictions(config, "tts", rows, vocabulary, wall_s, audio_s)
    truncated = sum(row["truncated"] for row in rows)
    log.info("said %d of %d texts, %d cut off", len(good), len(rows), truncated)
    warned = sum(bool(row["warnings"]) for row in rows)
    summary = {"n": len(rows), "n_failed": len(rows) - len(good), "n_truncated": truncated, "n_with_warnings": warned}
    folder.mark_complete(summary)
    return path


def generated(config: Config, scripts: Sequence[Script], speech_lm: SpeechLM, by_text: bool) -> Iterator[Script]:
    """Draws the codes of all parts in batches of like length; yields each text whose parts are all there."""
    waiting = sorted(
        ((script, number) for script in scripts for number in range(len(script.parts))),
        key=lambda item: len(item[0].parts[item[1]].written),
    )
    for chunk in in_chunks(waiting, 2, config.decoding.batch_size, "synthesize"):
        started = time.perf_counter()
        said = [script.parts[number].said for script, number in chunk]
        keys = [script.key(number, by_text) for script, number in chunk]
        outputs = synthesize_codes(speech_lm, said, config.decoding, keys=keys)
        seconds = (time.perf_counter() - started) / len(chunk)
        for (script, number), output in zip(chunk, outputs, strict=True):
            script.outputs[number] = output
            script.wall_s += seconds
            if len(script.outputs) == len(script.parts):
                yield script


def write_speech(
    config: Config, script: Script, tokenizer: Any, vocabulary: SpeechVocabulary, where: Path, device: str
) -> None:
    """Decodes a text's parts, writes them one behind the other, and notes what looks lost. Frees the codes."""
    rate, path = tokenizer.config.sampling_rate, where / script.audio
    n_samples = 0
    with disk_errors(path), soundfile.SoundFile(path, "w", rate, 1, **audio_format(script.audio)) as file:
        for number, part in enumerate(script.parts):
            output = script.outputs.pop(number)
            waveform = decode(tokenizer, output.codes, device)
            file.write(waveform)
            start, n_samples = n_samples, n_samples + len(waveform)
            script.n_codes += int(output.codes.size)
            script.truncated |= output.truncated
            script.segments.append(
                {
                    "start_s": round(start / rate, 3),
                    "end_s": round(n_samples / rate, 3),
                    "text": part.written,
                    "finish_reason": finish_reason(output.truncated),
                }
            )
            for warning in speech_warnings(part.said, output.codes, output.truncated, waveform, rate, vocabulary):
                script.lost.append(f"{warning}: {part.written!r}")
            if number + 1 < len(script.parts):
                pause = round(rate * config.pause_s * (1.0 if part.ends_sentence else 0.5))
                file.write(np.zeros(pause, np.float32))
                n_samples += pause
    script.duration_s = n_samples / rate


def warn(lines: Iterable[str]) -> None:
    """Warns with the first of the lines."""
    for line in the_first(lines):
        log.warning("%s", line)


def log_duration(scripts: Sequence[Script], vocabulary: SpeechVocabulary) -> None:
    """Says how much speech there is, beside how much the training's rate of speech lets expect."""
    parts = [part for script in scripts for part in script.parts]
    cut = f", in {len(parts)} parts" if len(parts) > len(scripts) else ""
    expected = ""
    if (known := vocabulary.trained_on) is not None:
        seconds = sum(len(part.said) for part in parts) / known.characters_per_s[1]
        expected = f"; about {seconds:.1f} s were expected of {sum(len(part.said) for part in parts)} characters"
    log.info("%.1f s of speech%s%s", sum(script.duration_s for script in scripts), cut, expected)


def audio_format(file: str) -> dict[str, str]:
    """soundfile's format and subtype for a file's ending, 16 bits where the format has them.

    Raises:
        ValueError: the ending names no format that can be written.
    """
    kind = {"aif": "AIFF", "opus": "OGG"}.get(ending := Path(file).suffix[1:].lower(), ending.upper())
    if kind not in soundfile.available_formats() or kind == "RAW":
        raise ValueError(f"output (-o): {file!r} must end in a format's name: .wav, .flac, .ogg, .mp3")
    subtype = "OPUS" if ending == "opus" else "PCM_16"
    return {
        "format": kind,
        "subtype": subtype if soundfile.check_format(kind, subtype) else soundfile.default_subtype(kind),
    }


def finish_reason(truncated: bool) -> str:
    """Why the model stopped: it came to the end, or its budget of tokens did."""
    return "length" if truncated else "stop"
