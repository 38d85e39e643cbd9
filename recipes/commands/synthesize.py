"""``slm synthesize``: text to speech with a fine-tuned SLM, or what another task answers in speech.

Speaks your own words (``slm synthesize "text" -o out.wav model=RUN/model``), or the texts of a split of a data source
or coded corpus. A text longer than the model's training texts is said sentence by sentence, with a pause between. A
task whose prompt holds speech takes that from the corpus, or encodes the data source's recordings. What the model
cannot say is warned of before it speaks, and what looks lost (truncated, silent, short for its words) after. One sample
per text, drawn from its own random stream; codes become sound by semantic reconstruction (main decoder, book 0) or,
where the model speaks several codebooks, from all of them. Writes ``audio/*.wav``, ``predictions.jsonl`` and
``predictions.json``.

Not here: scores (``slm evaluate``), choice among samples.
"""

from __future__ import annotations

import functools
import hashlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from transformers import PreTrainedTokenizerBase

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError, Problems
from recipes.encoding.encoder import encode_batch
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
from recipes.inference.tasks import prompt_utterance, reference_of
from recipes.runs.files import disk_errors
from recipes.runs.logs import log
from recipes.runs.plugins import plugins_key
from recipes.runs.progress import progress
from recipes.runs.run_folder import ADJUSTABLE
from slm.generation import SpeechLM, SynthesizeOutput, SynthesizeSettings, generate_speech, seconds_allowed
from slm.modeling import describe_llm
from slm.tasks import Task, TaskError
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import prompt_size
from slm.vocabulary import SpeechVocabulary
from tokenizer.data.audio import load_audio
from tokenizer.data.utterances import AudioError, DataSource, Utterance

SINGLE = "text"  # the id of a text that was given by itself
LANGUAGE = "en"  # whose abbreviations end no sentence, where the normaliser names no language
UNKNOWN_LONGEST_TEXT = 200  # characters said in one go, where a model does not tell how long its training's texts were
MAX_WARNINGS = 20  # lines of warnings


@dataclass
class Config:
    """What is said with what."""

    run_dir: str = field(default="", metadata={"help": "where audio and predictions go; may be empty with a text"})
    model: str = field(default="", metadata={"help": "folder of a fine-tuned model (RUN_DIR/model of `slm finetune`)"})
    task: str = field(default="tts", metadata={"help": "what is asked of the model: a task that answers in speech"})
    text: str = field(default="", metadata={"help": "what to say"})
    output: str = field(
        default="",
        metadata={
            "help": "the file for a text without run_dir, its ending names the format (wav, flac, ogg, mp3); empty: "
            "out.wav",
            **ADJUSTABLE,
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
    plugins: list[str] = plugins_key()

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
    """One text on its way to speech, and what became of it.

    `reference` is what its speech should say, `parts` are that as it is said. `codes` (K, F) or the `recording` are the
    speech of its prompt, where there is any.
    """

    id: str
    text: str
    reference: str
    columns: Mapping[str, str] = field(default_factory=dict)
    codes: np.ndarray | None = None
    recording: Utterance | None = None
    parts: list[Part] = field(default_factory=list)
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

    def fail(self, error: str) -> None:
        """It is not said, for this reason."""
        self.parts, self.error = [], error

    def row(self, task: Task) -> dict[str, Any]:
        """Its line of predictions.jsonl; ``segments`` where it was cut."""
        row = {
            "id": self.id,
            "task": task.name,
            "text": self.reference,
            "audio": None if self.error else self.audio,
            "n_codes": self.n_codes,
            "truncated": self.truncated,
            "finish_reason": None if self.error else finish_reason(self.truncated),
            "warnings": self.unsayable + self.lost,
            "error": self.error,
            "wall_s": round(self.wall_s, 4),
        }
        return row | ({"segments": self.segments} if len(self.segments) > 1 else {})


def read_inputs(config: Config, task: Task, vocabulary: SpeechVocabulary) -> Iterator[Script]:
    """Everything to say, not cut yet, and its recording not encoded."""
    if config.corpus:
        for row in corpus_rows(config, vocabulary):
            reference = reference_of(task, row["text"], row["columns"])
            codes = row["audio_codes"] if task.prompt_holds_speech else None
            yield Script(row["id"], row["text"], reference, row["columns"], codes)
    elif config.data:
        for utterance in source_utterances(config):
            reference = reference_of(task, utterance.text, utterance.columns)
            recording = utterance if task.prompt_holds_speech else None
            yield Script(utterance.id, utterance.text, reference, utterance.columns, recording=recording)
    else:
        yield Script(SINGLE, config.text, reference_of(task, config.text, {}))


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


def may_be_cut(task: Task) -> bool:
    """Whether a long text may be asked part by part: it is all that the prompt holds."""
    return task.prompt_holds_text and not task.prompt_holds_speech and not task.columns


def read_scripts(
    config: Config, task: Task, vocabulary: SpeechVocabulary, text_tokenizer: PreTrainedTokenizerBase
) -> list[Script]:
    """Everything to say, cut into parts where it may be, with what the model cannot say of it.

    Raises:
        ConfigError: `strict`, and there is such a thing; or the only text holds nothing to say.
    """
    normalise, longest = get_normaliser(vocabulary.normaliser_of_prompts), longest_text(config, vocabulary)
    language = vocabulary.normaliser_of_prompts.partition(":")[2]
    language = LANGUAGE if language in ("", "any") else language
    scripts: list[Script] = []
    for script in read_inputs(config, task, vocabulary):
        if may_be_cut(task):
            script.parts = cut_text(script.text, normalise, longest, language)
        else:
            script.parts = [Part(script.reference, normalise(script.reference))]
        if not script.parts:
            holds = f"{script.text!r} holds no word after the normaliser {vocabulary.normaliser_of_prompts!r}"
            script.error = f"nothing to say: {holds}"
        if task.prompt_holds_text:
            script.unsayable = unsayable(script.text, normalise, vocabulary, text_tokenizer)
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


def refuse_text(task: Task) -> None:
    """Raises ConfigError: a text by itself has no speech."""
    raise ConfigError(
        f"task: a prompt of {task.name} holds speech, which TEXT has not; give data.path=... or corpus=..."
    )


def prepare(config: Config) -> Setup:
    """Raises all that would stop a synthesis, together."""
    problems = Problems("slm synthesize")
    problems.attempt(require_input, config, config.text, '"TEXT"')
    setup = check_setup(problems, config, "speech", decoding_tokenizer)
    if setup is not None and setup.task.prompt_holds_speech and config.text:
        problems.attempt(refuse_text, setup.task)
    problems.raise_all()
    return setup


def plan(config: Config) -> dict[str, object]:
    """What would be said; raises all that would stop it, together."""
    setup = prepare(config)
    task, vocabulary, tokenizer = setup.task, setup.vocabulary, setup.tokenizer
    scripts = read_scripts(config, task, vocabulary, describe_llm(config.model).tokenizer)
    parts = [part for script in scripts for part in script.parts]
    budget = sum(allowed_s(config, task, script, part, vocabulary) for script in scripts for part in script.parts)
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
    task, vocabulary, tokenizer, device = setup.task, setup.vocabulary, setup.tokenizer, setup.device
    folder = begun(config, [config.text])
    speech_lm = SpeechLM.load(config.model, device, config.weights)
    scripts = read_scripts(config, task, vocabulary, speech_lm.text_tokenizer)
    encode_recordings(scripts, tokenizer, vocabulary.precision, device)
    requests = make_requests(config, task, scripts, speech_lm)
    warn(f"{script.place}{line}" for script in scripts for line in [*script.unsayable, *filter(None, [script.error])])
    for script in scripts:
        script.audio = f"audio/{file_name(script.id)}" if folder else config.output_file
    where = folder.folder if folder else Path()
    with disk_errors(where / scripts[0].audio):
        (where / scripts[0].audio).parent.mkdir(parents=True, exist_ok=True)
    for script in generated(config, task, requests, speech_lm, by_text=folder is None):
        started = time.perf_counter()
        write_speech(config, script, tokenizer, vocabulary, where, device)
        script.wall_s += time.perf_counter() - started
    warn(f"{script.place}{line}" for script in scripts for line in script.lost)
    log_duration(scripts, vocabulary)
    if folder is None:
        return Path(config.output_file)
    rows, good = [script.row(task) for script in scripts], [script for script in scripts if not script.error]
    wall_s, audio_s = sum(script.wall_s for script in good), sum(script.duration_s for script in good)
    path = write_predictions(config, task, rows, vocabulary, wall_s, audio_s)
    truncated = sum(row["truncated"] for row in rows)
    log.info("said %d of %d texts, %d cut off", len(good), len(rows), truncated)
    warned = sum(bool(row["warnings"]) for row in rows)
    summary = {"n": len(rows), "n_failed": len(rows) - len(good), "n_truncated": truncated, "n_with_warnings": warned}
    folder.mark_complete(summary)
    return path


def encode_recordings(scripts: Sequence[Script], tokenizer: Any, precision: str, device: str) -> None:
    """Puts the codes of each recording into its script; of one that cannot be used the error."""
    todo = [script for script in scripts if script.recording is not None and script.parts]
    for script in progress(todo, "encode", len(todo)) if todo else ():
        try:
            waveform = load_audio(script.recording, tokenizer.config.sampling_rate)
            script.codes = encode_batch(tokenizer, [waveform], precision, device)[0]
        except AudioError as error:
            script.fail(str(error))


def allowed_s(config: Config, task: Task, script: Script, part: Part, vocabulary: SpeechVocabulary) -> float:
    """The most seconds of speech for a part; a recording that is not encoded yet counts as its source says."""
    text, speech_s = "", 0.0
    if task.prompt_holds_text:
        columns = (script.columns.get(name, "") for name in task.columns)
        text = part.said if may_be_cut(task) else " ".join([script.text, *columns])
    if script.codes is not None:
        speech_s = script.codes.shape[1] / vocabulary.frame_rate
    elif script.recording is not None:
        speech_s = script.recording.duration or 0.0
    return seconds_allowed(vocabulary, text, config.decoding, speech_s)


@dataclass(frozen=True)
class Request:
    """One part of a text, what its prompt is made of, and the seconds that its answer may last."""

    script: Script
    number: int
    utterance: UtteranceTokens
    seconds: float


def make_requests(config: Config, task: Task, scripts: Sequence[Script], speech_lm: SpeechLM) -> list[Request]:
    """What the model is asked, the shortest first.

    A text that lacks what its prompt is made of gets the error that says so.

    Raises:
        ConfigError: that is the only one, given by itself.
    """
    vocabulary = speech_lm.vocabulary
    normalise = get_normaliser(vocabulary.normaliser_of_prompts)
    encode = functools.partial(vocabulary.encode_text, speech_lm.text_tokenizer)
    requests: list[Request] = []
    for script in scripts:
        columns = {name: normalise(script.columns.get(name, "")) for name in task.columns}
        try:
            for number, part in enumerate(script.parts):
                text = part.said if may_be_cut(task) else normalise(script.text)
                utterance = prompt_utterance(task, script.codes, text, columns, encode)
                seconds = allowed_s(config, task, script, part, vocabulary)
                requests.append(Request(script, number, utterance, seconds))
        except TaskError as error:
            if config.text:
                raise ConfigError(f"text: {error}") from error
            script.fail(str(error))
    return sorted(
        requests, key=lambda one: (prompt_size(task, one.utterance)[0], len(one.script.parts[one.number].written))
    )


def generated(
    config: Config, task: Task, requests: Sequence[Request], speech_lm: SpeechLM, by_text: bool
) -> Iterator[Script]:
    """Draws the codes of all parts in batches of like length; yields each text whose parts are all there."""
    for chunk in in_chunks(requests, 2, config.decoding.batch_size, "synthesize"):
        started = time.perf_counter()
        outputs = generate_speech(
            speech_lm,
            task,
            [one.utterance for one in chunk],
            [one.seconds for one in chunk],
            config.decoding,
            [one.script.key(one.number, by_text) for one in chunk],
        )
        seconds = (time.perf_counter() - started) / len(chunk)
        for one, output in zip(chunk, outputs, strict=True):
            script = one.script
            script.outputs[one.number] = output
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
    expected, characters = "", sum(len(part.said) for part in parts)
    if characters and (known := vocabulary.trained_on) is not None:
        seconds = characters / known.characters_per_s[1]
        expected = f"; about {seconds:.1f} s were expected of {characters} characters"
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
