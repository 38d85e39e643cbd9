"""``slm synthesize``: text to speech with a fine-tuned SLM, or what another task answers in speech.

Speaks your own words (``slm synthesize "text" -o out.wav model=RUN/model``), or the texts of a split of a data source
or coded corpus. A text longer than the model's training texts is said sentence by sentence, with a pause between. A
task whose prompt holds speech takes that from the corpus, or encodes the data source's recordings. What the model
cannot say is warned of before it speaks, and what looks lost (cut off, silent, short for its words) after. One sample
per text, drawn from its own random stream, and again where the model did not end it, if ``decoding.retries`` asks for
it; codes become sound by semantic reconstruction (main decoder, book 0) or, where the model speaks several codebooks,
from all of them. With ``acoustic=FOLDER --voice ref.wav`` a second stage (``slm train-acoustic``) fills the books that
the model does not speak, in that recording's voice. Writes ``audio/*.wav``, ``predictions.jsonl`` and
``predictions.json``.

`torchrun --nproc_per_node N -m recipes.cli synthesize ...` starts N processes, each with its own part of the texts; a
run that was killed goes on where it was. Either way the result is that of one process.

Not here: scores (``slm evaluate``), choice among samples by a judge.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError, Problems
from recipes.encoding.encoder import encode_batch
from recipes.inference.acoustic import acoustic_voice
from recipes.inference.batches import (
    Outcome,
    Times,
    begin_together,
    forget_batches,
    join_processes,
    make_batches,
    work_through,
)
from recipes.inference.keys import language_key, model_key, wording_key
from recipes.inference.long_texts import Part, cut_text
from recipes.inference.predictions import (
    NON_FINITE_SCORES,
    begun,
    finished,
    log_faults,
    log_speed,
    summary_of,
    write_predictions,
)
from recipes.inference.prosody import check_emphasis, check_prosody, with_prosody
from recipes.inference.scripts import SINGLE, Request, Script, file_name, joined, write_speech
from recipes.inference.setup import (
    Setup,
    check_inputs,
    check_setup,
    corpus_rows,
    decoding_tokenizer,
    require_input,
    source_utterances,
    tell_default_model,
)
from recipes.inference.speech_checks import unsayable
from recipes.inference.speech_files import audio_format, decoded
from recipes.inference.streaming import write_stream
from recipes.inference.tasks import prompt_utterance, reference_of, style_of, warn_of_no_language
from recipes.runs.files import disk_errors
from recipes.runs.logs import log
from recipes.runs.plugins import plugins_key
from recipes.runs.progress import progress
from recipes.runs.run_folder import ADJUSTABLE, RunFolder
from slm.acoustic.pieces import AcousticDecoding
from slm.generation import SpeechLM, generate_speech
from slm.modeling import describe_llm, resolve_model
from slm.multi_token import predicted_tokens
from slm.prosody import ProsodyControl
from slm.settings import SpeechLimits, SynthesizeSettings, speech_limits, word_limits
from slm.tasks import Task, TaskError
from slm.tasks.continuation import split_codes
from slm.tasks.sequences import prompt_size
from slm.vocabulary import SpeechVocabulary
from tokenizer.data.audio import load_audio, open_audio
from tokenizer.data.utterances import AudioError, DataSource, Utterance

LANGUAGE = "en"  # whose abbreviations end no sentence, where the normaliser names no language
UNKNOWN_LONGEST_TEXT = 200  # characters said in one go, where a model does not tell how long its training's texts were
MAX_WARNINGS = 20  # lines of warnings
NOT_LEARNT = "what guidance moves away from is a guess; `slm finetune ... noise.drop_prompt=0.1` teaches it"


@dataclass
class Config:
    """What is said with what."""

    run_dir: str = field(default="", metadata={"help": "where audio and predictions go; may be empty with a text"})
    model: str = model_key()
    task: str = field(default="tts", metadata={"help": "what is asked of the model: a task that answers in speech"})
    text: str = field(default="", metadata={"help": "what to say"})
    files: list[str] = field(
        default_factory=list,
        metadata={"help": "or recordings, for a task whose prompt is speech alone, such as continuation"},
    )
    output: str = field(
        default="",
        metadata={
            "help": "the file for a single answer without run_dir; its ending names the format (wav, flac, ogg, mp3); "
            "empty: out.wav",
            **ADJUSTABLE,
        },
    )
    data: DataSource | None = field(default=None, metadata={"help": "or a data source, e.g. data.path=manifest.jsonl"})
    corpus: str | None = field(default=None, metadata={"help": "or a coded corpus: the run_dir of `slm encode`"})
    split: str = field(default="test", metadata={"help": "split of the data source or corpus"})
    limit: int | None = field(default=None, metadata={"help": "only the first N texts"})
    join: int = field(
        default=1,
        metadata={
            "help": "so many texts of data or corpus in a row are said as one: longer than those of the training, to "
            "see whether words are lost; what is left over is left out. Such a text is not cut unless max_characters "
            "is set. `slm evaluate` scores it without data"
        },
    )
    tokenizer: str = field(default="", metadata={"help": "speech tokenizer; empty: the one the model was trained with"})
    decoding: SynthesizeSettings = field(default_factory=SynthesizeSettings, metadata={"help": "how codes are drawn"})
    prosody: ProsodyControl = field(
        default_factory=ProsodyControl,
        metadata={"help": "of task=tts-prosody: what is asked beside the prosody that the model writes by itself"},
    )
    acoustic: str = field(
        default="",
        metadata={"help": "acoustic stage (RUN_DIR/model of `slm train-acoustic`) that fills the codebooks left out"},
    )
    voice: str = field(default="", metadata={"help": "with acoustic: a recording of the voice to speak in (--voice)"})
    acoustic_decoding: AcousticDecoding = field(
        default_factory=AcousticDecoding, metadata={"help": "how the acoustic stage draws"}
    )
    wording: str | None = wording_key()
    language: str = language_key()
    prompt_share: float = field(
        default=0.5,
        metadata={
            "help": "of a task that continues speech: the share of each utterance of data or corpus that it hears; "
            "the length of the rest stands beside the answer's. Of `files` it hears all"
        },
    )
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
    stream: bool = field(
        default=False,
        metadata={"help": "write the sound of a single text while its codes still come, sentence after sentence"},
    )
    weights: str = field(default="fp32", metadata={"help": "how the model is held: fp32, bf16, fp16"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    plugins: list[str] = plugins_key()

    # Of finished folders.
    former_defaults = {"decoding.seconds_per_character": 0.25, "decoding.min_seconds": 4.0}

    def __post_init__(self) -> None:
        check_inputs(self, "text", "files")
        if len(self.files) > 1 and not self.run_dir:
            raise ValueError("run_dir: needed with several files; that is where their answers go")
        if self.join < 1 or (self.join > 1 and not (self.data or self.corpus)):
            raise ValueError(f"join: {self.join} must be at least 1, and above 1 there must be data or corpus")
        if not 0 < self.prompt_share < 1:
            raise ValueError(f"prompt_share: {self.prompt_share:g} must be above 0 and below 1")
        if self.max_characters is not None and self.max_characters < 1:
            raise ValueError(f"max_characters: {self.max_characters} must be at least 1, or null")
        if self.pause_s < 0:
            raise ValueError(f"pause_s: {self.pause_s:g} must be 0 or more")
        audio_format(self.output_file)
        if bool(self.acoustic) != bool(self.voice):
            given, missing = ("voice", "acoustic") if self.voice else ("acoustic", "voice")
            example = "acoustic=runs/acoustic/model (`slm train-acoustic` makes it)"
            raise ValueError(f"{given}: needs {missing} too, such as {example if self.voice else 'voice=speaker.wav'}")
        if self.acoustic and self.stream:
            raise ValueError("stream: not with acoustic, which fills the codebooks of whole sentences")
        if self.stream and self.decoding.multi_token > 1:
            raise ValueError("stream: gives a token a pass so far; leave decoding.multi_token at 1")
        if self.stream and (self.run_dir or self.files or self.data or self.corpus or self.decoding.retries):
            raise ValueError("stream: for a single text, without run_dir, files, data, corpus and decoding.retries")
        if self.output and self.run_dir:
            raise ValueError(
                f"output (-o): {self.output!r} would be ignored with run_dir, where audio goes to "
                f"{self.run_dir}/audio; give one of the two"
            )

    @property
    def output_file(self) -> str:
        """Where the audio of a single answer goes."""
        return self.output or "out.wav"

    @property
    def own_inputs(self) -> list[str | Path]:
        """What it is asked to answer where neither a data source nor a corpus is given."""
        return [Path(path) for path in self.files] or [self.text]


def read_inputs(config: Config, task: Task, vocabulary: SpeechVocabulary) -> Iterator[Script]:
    """Everything to say, not cut yet, and its recording not encoded."""
    if config.corpus:
        for row in corpus_rows(config, vocabulary):
            reference = reference_of(task, row["text"], row["columns"])
            script = Script(row["id"], row["text"], reference, row["columns"])
            if task.prompt_holds_speech:
                hear(script, row["audio_codes"], config, task, vocabulary)
            yield script
    elif config.data:
        for utterance in source_utterances(config):
            reference = reference_of(task, utterance.text, utterance.columns)
            recording = utterance if task.prompt_holds_speech else None
            yield Script(utterance.id, utterance.text, reference, utterance.columns, recording=recording)
    elif config.files:
        for path in config.files:
            yield Script(path, "", "", recording=Utterance(path, path))
    else:
        yield Script(SINGLE, config.text, reference_of(task, config.text, {}))


def hear(script: Script, codes: np.ndarray, config: Config, task: Task, vocabulary: SpeechVocabulary) -> None:
    """Puts the speech of its prompt (K, F) into a script: all of it, or what is to be continued."""
    script.codes = codes
    if task.continues and not config.files:
        script.codes, rest = split_codes(codes, config.prompt_share)
        script.expected_s = rest.shape[1] / vocabulary.frame_rate


def longest_text(config: Config, vocabulary: SpeechVocabulary) -> int:
    """Characters that are said in one go."""
    if config.max_characters is not None:
        return config.max_characters
    if config.join > 1:
        return sys.maxsize
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
    found = read_inputs(config, task, vocabulary)
    for script in joined(found, config.join) if config.join > 1 else found:
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
    if not scripts:
        raise ConfigError(f"join: there are fewer than {config.join} texts; lower it")
    if config.text and scripts[0].error:
        raise ConfigError(f"text: {scripts[0].error}")
    check_emphasis(config.prosody, scripts, normalise)
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
    files = "" if task.prompt_holds_text else "files=[FILE], "
    raise ConfigError(
        f"task: a prompt of {task.name} holds speech, which TEXT has not; give {files}data.path=... or corpus=..."
    )


def refuse_files(task: Task) -> None:
    """Raises ConfigError: a recording by itself has no text."""
    text = "" if task.prompt_holds_speech else '"TEXT", '
    raise ConfigError(
        f"task: a prompt of {task.name} holds a text, which FILE has not; give {text}data.path=... or corpus=..."
    )


def refuse_join(task: Task) -> None:
    """Raises ConfigError: what is more than a text cannot be put together."""
    if not may_be_cut(task):
        raise ConfigError(f"join: a prompt of {task.name} holds more than a text; leave join out")


def refuse_words(task: Task, config: Config) -> None:
    """Raises ConfigError where a task by word is asked for what it cannot do."""
    if config.decoding.guidance > 1:
        raise ConfigError(f"decoding.guidance: {task.name} gives its words in the answer; leave guidance at 1")
    if config.stream:
        raise ConfigError(f"stream: {task.name} is not streamed; leave stream out")


def require_heads(config: Config) -> None:
    """Raises ConfigError where the model proposes fewer tokens a pass than are asked for."""
    asked, there = config.decoding.multi_token, predicted_tokens(resolve_model(config.model))
    if asked > there:
        raise ConfigError(
            f"decoding.multi_token: {asked}, and {config.model} predicts {there} a pass; set it to {there}, or train "
            f"a model with training.multi_token.tokens={asked} (`slm finetune`)"
        )


def prepare(config: Config, with_files: bool = False) -> Setup:
    """Raises all that would stop a synthesis, together; `with_files`: and each file that is missing or empty."""
    problems = Problems("slm synthesize")
    problems.attempt(require_input, config, config.text or config.files, '"TEXT" (for speech in the prompt: files)')
    setup = check_setup(problems, config, "speech", decoding_tokenizer)
    if setup is not None and setup.task.prompt_holds_speech and config.text:
        problems.attempt(refuse_text, setup.task)
    if setup is not None and setup.task.prompt_holds_text and config.files:
        problems.attempt(refuse_files, setup.task)
    if setup is not None and config.decoding.multi_token > 1:
        problems.attempt(require_heads, config)
    if setup is not None and setup.task.by_word:
        problems.attempt(refuse_words, setup.task, config)
    if setup is not None:
        problems.attempt(check_prosody, setup.task, config.prosody, config.decoding.guidance, config.stream)
    if setup is not None and config.join > 1:
        problems.attempt(refuse_join, setup.task)
    if config.acoustic and setup is not None and setup.tokenizer is not None:
        parts = (config, setup.vocabulary, setup.tokenizer, setup.device)
        setup.acoustic = problems.attempt(acoustic_voice, *parts)
    for path in config.files if with_files else ():
        problems.attempt(open_audio, Utterance(path, path))
    problems.raise_all()
    return setup


def plan(config: Config) -> dict[str, object]:
    """What would be said; raises all that would stop it, together."""
    setup = prepare(config, with_files=True)
    task, vocabulary, tokenizer = setup.task, setup.vocabulary, setup.tokenizer
    scripts = read_scripts(config, task, vocabulary, describe_llm(config.model).tokenizer)
    parts = [part for script in scripts for part in script.parts]
    limits = [limits_of(config, task, script, part, vocabulary) for script in scripts for part in script.parts]
    # Of a task by word they are each word's.
    budget = sum(
        one.most_s * (len(part.said.split()) if task.by_word else 1) for one, part in zip(limits, parts, strict=True)
    )
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
    """Synthesize, or go on where a killed run stopped; returns predictions.jsonl, or the audio file without run_dir.

    Raises:
        ConfigError, DataError, CorpusError: something cannot be used; the message says what to do.
        ProcessError: another process failed; the message is its own.
    """
    if (done := finished(config, config.own_inputs)) is not None:
        return done
    processes = join_processes(config)
    setup = prepare(config)
    folder = begin_together(lambda: begun(config, config.own_inputs), config, processes)
    speech_lm = SpeechLM.load(config.model, setup.device, config.weights)
    scripts = read_scripts(config, setup.task, setup.vocabulary, speech_lm.text_tokenizer)
    if processes.is_main:
        tell_default_model(config)
        warn_of_no_language(config, style_of(config, setup.task, setup.vocabulary))
        warn(f"{one.place}{line}" for one in scripts for line in [*one.unsayable, *filter(None, [one.error])])
        known = setup.vocabulary.trained_on
        if config.decoding.guidance > 1 and not (known and known.bare_prompts):
            log.warning("decoding.guidance: %s has not learnt to speak without a prompt: %s", config.model, NOT_LEARNT)
    unfit = {number for number, script in enumerate(scripts) if script.error}  # told by now
    for script in scripts:
        script.audio = f"audio/{file_name(script.id)}" if folder else config.output_file
    where = folder.folder if folder else Path()
    with disk_errors(where / scripts[0].audio):
        (where / scripts[0].audio).parent.mkdir(parents=True, exist_ok=True)
    if config.stream:
        return stream(config, setup, speech_lm, scripts[0])
    batches = make_batches(
        [(prompt_s(script, setup.vocabulary), len(script.text)) for script in scripts],
        [max(1, len(script.parts)) for script in scripts],
        config.decoding.batch_size,
    )

    def work(numbers: Sequence[int]) -> Outcome:
        return say_scripts(config, setup, speech_lm, {number: scripts[number] for number in numbers}, where)

    def write() -> Path:
        rows = [row for _, row in sorted(outcome.rows.items())]
        for number, (script, row) in enumerate(zip(scripts, rows, strict=True)):
            script.lost, script.duration_s = row["warnings"][len(script.unsayable) :], row["duration_s"]
            script.lost += [row["error"]] if row["error"] and number not in unfit else []
        warn(f"{script.place}{line}" for script in scripts for line in script.lost)
        log_duration(scripts, setup.vocabulary)
        if folder is None and scripts[0].error:
            raise ConfigError(f"{'text' if config.text else 'files'}: {scripts[0].error}")
        return write_result(config, setup, rows, outcome.times, folder, processes.count)

    outcome = work_through(batches, work, folder, processes, "synthesize")
    return processes.together(lambda: write() if processes.is_main else None)[0]


def stream(config: Config, setup: Setup, speech_lm: SpeechLM, script: Script) -> Path:
    """Says one text into its file as it comes, and tells when the first sound was there."""
    requests, decoding = make_requests(config, setup.task, [script], speech_lm), config.decoding
    started = time.perf_counter()
    first_s = write_stream(
        script, requests, setup.task, speech_lm, setup.tokenizer, setup.device, decoding, config.pause_s
    )
    warn(script.lost)
    log_duration([script], setup.vocabulary)
    log.info("first sound after %.2f s, the last after %.2f s", first_s, time.perf_counter() - started)
    return Path(config.output_file)


def write_result(
    config: Config, setup: Setup, rows: list[dict[str, Any]], times: Times, folder: RunFolder | None, n_processes: int
) -> Path:
    """Writes the predictions where there is a run folder, and says how it went."""
    audio_s = sum(row["duration_s"] for row in rows if row["error"] is None)
    if folder is None:
        log_speed(times, audio_s)
        return Path(config.output_file)
    path = write_predictions(config, setup.task, rows, setup.vocabulary, times, audio_s, n_processes)
    summary = summary_of(rows) | {"n_with_warnings": sum(bool(row["warnings"]) for row in rows)}
    summary["n_retried"] = sum(row["attempts"] > 1 for row in rows)
    log.info(
        "said %d of %d texts, %d cut off%s",
        summary["n"] - summary["n_failed"],
        summary["n"],
        summary["n_truncated"],
        f", {summary['n_retried']} drawn more than once" if config.decoding.retries else "",
    )
    log_faults(rows)
    log_speed(times, audio_s)
    folder.mark_complete(summary)
    forget_batches(folder)
    return path


def say_scripts(
    config: Config, setup: Setup, speech_lm: SpeechLM, scripts: Mapping[int, Script], where: Path
) -> Outcome:
    """Draws the codes of some texts, decodes and writes them; they are given by their numbers."""
    vocabulary, tokenizer, device = setup.vocabulary, setup.tokenizer, setup.device
    started = time.perf_counter()
    encode_recordings(config, setup, scripts.values())
    encoded = time.perf_counter()
    requests = make_requests(config, setup.task, scripts.values(), speech_lm)
    if setup.task.answer_holds_prosody:
        requests = with_prosody(config, requests, speech_lm, setup.task, by_text=not config.run_dir)
    draw(config, setup.task, requests, speech_lm, by_text=not config.run_dir)
    drawn = time.perf_counter()
    for script in scripts.values():
        if any(output.finish_reason == "non_finite" for output in script.outputs.values()):
            script.fail(NON_FINITE_SCORES, "non_finite")
    sayable = [script for script in scripts.values() if script.parts]
    parts = [(script, number) for script in sayable for number in range(len(script.parts))]
    codes = (script.outputs[number].codes for script, number in parts)
    if setup.acoustic is not None:
        codes = setup.acoustic.filled(codes, [script.key(number, not config.run_dir) for script, number in parts])
    waveforms = decoded(tokenizer, codes, device)
    for script in sayable:
        write_speech(script, waveforms, tokenizer.config.sampling_rate, vocabulary, where, config.pause_s)
    n_tokens = sum(script.n_codes for script in sayable)
    times = Times(encoded - started, drawn - encoded, time.perf_counter() - drawn, n_tokens)
    for script in scripts.values():
        script.wall_s = (times.encode_s + times.generate_s + times.decode_s) / len(scripts)
        script.codes = None
    return Outcome({number: script.row(setup.task) for number, script in scripts.items()}, times)


def prompt_s(script: Script, vocabulary: SpeechVocabulary) -> float:
    """Seconds of speech in a prompt; of a recording that is not encoded yet, as its source says."""
    if script.codes is not None:
        return script.codes.shape[1] / vocabulary.frame_rate
    return script.recording.duration or 0.0 if script.recording is not None else 0.0


def encode_recordings(config: Config, setup: Setup, scripts: Iterable[Script]) -> None:
    """Puts the codes of each recording into its script; of one that cannot be used the error."""
    tokenizer, vocabulary = setup.tokenizer, setup.vocabulary
    for script in scripts:
        if script.recording is None or not script.parts:
            continue
        try:
            waveform = load_audio(script.recording, tokenizer.config.sampling_rate)
            codes = encode_batch(tokenizer, [waveform], vocabulary.precision, setup.device)[0]
            hear(script, codes, config, setup.task, vocabulary)
        except AudioError as error:
            script.fail(str(error))


def limits_of(config: Config, task: Task, script: Script, part: Part, vocabulary: SpeechVocabulary) -> SpeechLimits:
    """How long the speech of a part may be and must be; of a task by word that of each word."""
    if task.by_word:
        return word_limits(vocabulary, config.decoding)
    text, is_said = "", may_be_cut(task)
    if task.prompt_holds_text:
        columns = (script.columns.get(name, "") for name in task.columns)
        text = part.said if is_said else " ".join([script.text, *columns])
    return speech_limits(vocabulary, text, config.decoding, prompt_s(script, vocabulary), is_said)


def make_requests(config: Config, task: Task, scripts: Iterable[Script], speech_lm: SpeechLM) -> list[Request]:
    """What the model is asked, the shortest first.

    A text that lacks what its prompt is made of gets the error that says so.

    Raises:
        ConfigError: that is the only one, given by itself.
    """
    vocabulary = speech_lm.vocabulary
    normalise = get_normaliser(vocabulary.normaliser_of_prompts)
    encode = functools.partial(vocabulary.encode_text, speech_lm.text_tokenizer)
    style = style_of(config, task, vocabulary, speech_lm.text_tokenizer)
    requests: list[Request] = []
    for script in scripts:
        columns = {name: normalise(script.columns.get(name, "")) for name in task.columns}
        try:
            for number, part in enumerate(script.parts):
                text = part.said if may_be_cut(task) else normalise(script.text)
                utterance = prompt_utterance(task, script.codes, text, columns, encode)
                utterance = dataclasses.replace(utterance, **style.of(script.columns))
                limits = limits_of(config, task, script, part, vocabulary)
                requests.append(Request(script, number, utterance, limits))
        except TaskError as error:
            if config.text:
                raise ConfigError(f"text: {error}") from error
            script.fail(str(error))
    return sorted(
        requests, key=lambda one: (prompt_size(task, one.utterance)[0], len(one.script.parts[one.number].written))
    )


def draw(config: Config, task: Task, requests: Sequence[Request], speech_lm: SpeechLM, by_text: bool) -> None:
    """Draws the codes of all parts, in batches of like length, into their scripts."""
    size = 2 * config.decoding.batch_size
    slices = [requests[start : start + size] for start in range(0, len(requests), size)]
    # A long text is one utterance, and its parts are what takes the time.
    for some in progress(slices, "sentences", len(slices)) if len(slices) > 1 else slices:
        outputs = generate_speech(
            speech_lm,
            task,
            [one.utterance for one in some],
            [one.limits for one in some],
            config.decoding,
            [one.script.key(one.number, by_text) for one in some],
        )
        for one, output in zip(some, outputs, strict=True):
            one.script.outputs[one.number] = output
            one.script.attempts = max(one.script.attempts, output.attempts)


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
