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

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.config import ConfigError, Problems
from recipes.inference.acoustic import acoustic_voice
from recipes.inference.batches import (
    Outcome,
    Times,
    answers_together,
    begin_together,
    forget_batches,
    join_processes,
    make_batches,
    work_through,
)
from recipes.inference.named_files import check_named_files
from recipes.inference.predictions import (
    NON_FINITE_SCORES,
    begun,
    finished,
    log_faults,
    log_speed,
    refuse_unless_one_was_usable,
    refuse_unusable_files,
    summary_of,
    write_predictions,
)
from recipes.inference.prosody import check_prosody, with_prosody
from recipes.inference.scripts import Script, file_name, write_speech
from recipes.inference.setup import (
    Setup,
    check_setup,
    decoding_tokenizer,
    require_input,
    tell_default_model,
)
from recipes.inference.speech_files import decoded
from recipes.inference.speech_requests import draw, encode_recordings, limits_of, make_requests, prompt_s
from recipes.inference.streaming import write_stream
from recipes.inference.synthesis_config import Config
from recipes.inference.tasks import style_of, warn_of_no_language
from recipes.inference.texts_to_say import may_be_cut, read_scripts
from recipes.runs.files import disk_errors
from recipes.runs.logs import log, the_first
from recipes.runs.run_folder import RunFolder
from slm.generation import SpeechLM
from slm.model.modeling import describe_llm, resolve_model
from slm.model.multi_token import predicted_tokens
from slm.tasks import Task
from slm.vocabulary import SpeechVocabulary

NOT_LEARNT = "what guidance moves away from is a guess; `slm finetune ... noise.drop_prompt=0.1` teaches it"


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


def require_heads(config: Config) -> None:
    """Raises ConfigError where the model proposes fewer tokens a pass than are asked for."""
    asked, there = config.decoding.multi_token, predicted_tokens(resolve_model(config.model))
    if asked > there:
        raise ConfigError(
            f"decoding.multi_token: {asked}, and {config.model} predicts {there} a pass; set it to {there}, or train "
            f"a model with training.multi_token.tokens={asked} (`slm finetune`)"
        )


def prepare(config: Config, with_files: bool = False) -> Setup:
    """Raises all that would stop a synthesis, together; `with_files`: and each file that cannot be used."""
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
        problems.attempt(check_prosody, setup.task, config.prosody, config.decoding.guidance)
    if setup is not None and config.join > 1:
        problems.attempt(refuse_join, setup.task)
    if config.acoustic and setup is not None and setup.tokenizer is not None:
        parts = (config, setup.vocabulary, setup.tokenizer, setup.device)
        setup.acoustic = problems.attempt(acoustic_voice, *parts)
    problems.attempt(check_named_files, config.files if with_files else ())
    problems.raise_all()
    return setup


def plan(config: Config) -> dict[str, object]:
    """What would be said; raises all that would stop it, together."""
    setup = prepare(config, with_files=True)
    task, vocabulary = setup.task, setup.vocabulary
    scripts = read_scripts(config, task, vocabulary, describe_llm(config.model).tokenizer)
    parts = [part for script in scripts for part in script.parts]
    limits = [limits_of(config, task, script, part, vocabulary) for script in scripts for part in script.parts]
    # Of a task by word they are each word's.
    budget = sum(
        one.most_s * (len(part.said.split()) if task.by_word else 1) for one, part in zip(limits, parts, strict=True)
    )
    facts: dict[str, object] = {
        "model": config.model,
        "task": task.name,
        "speech tokenizer": config.tokenizer or vocabulary.tokenizer,
        "texts": len(scripts),
        "parts they are cut into": len(parts),
    }
    if (known := vocabulary.trained_on) is not None:
        facts["seconds of speech (about)"] = round(sum(len(part.said) for part in parts) / known.characters_per_s[1], 1)
    return facts | {
        "speech tokens at most": int(budget * vocabulary.frame_rate * vocabulary.n_codebooks),
        "cannot be said": the_first(f"{s.place}{line}" for s in scripts for line in s.unsayable) or "nothing",
        "sampling rate (Hz)": setup.decoder.config.sampling_rate,
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
    first = where / scripts[0].audio
    with disk_errors(first):
        first.parent.mkdir(parents=True, exist_ok=True)
    if first.is_dir() or not os.access(first.parent, os.W_OK):  # before the model speaks
        raise ConfigError(f"{first} cannot be written: a folder has that name, or you may not write there")
    if config.stream:
        return stream(config, setup, speech_lm, scripts[0])
    sizes = [max(1, len(script.parts)) for script in scripts]
    batches = make_batches(
        [(prompt_s(script, setup.vocabulary), len(script.text)) for script in scripts],
        sizes,
        answers_together(sum(sizes), config.decoding.batch_size),
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
    started, decoding = time.perf_counter(), config.decoding
    requests = make_requests(config, setup.task, [script], speech_lm)
    if setup.task.answer_holds_prosody:
        requests = with_prosody(config, requests, speech_lm, setup.task, by_text=True)
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
    summary["n_words_redrawn"] = sum(row.get("n_words_redrawn", 0) for row in rows)
    log.info(
        "said %d of %d texts, %d cut off%s",
        summary["n"] - summary["n_failed"],
        summary["n"],
        summary["n_truncated"],
        (f", {summary['n_retried']} drawn more than once" if config.decoding.retries else "")
        + (f", {summary['n_words_redrawn']} words drawn again" if summary["n_words_redrawn"] else ""),
    )
    log_faults(rows)
    log_speed(times, audio_s)
    refuse_unless_one_was_usable(rows, folder, path)
    folder.mark_complete(summary)
    forget_batches(folder)
    refuse_unusable_files(config, rows, f"the others are in {folder.folder}")
    return path


def say_scripts(
    config: Config, setup: Setup, speech_lm: SpeechLM, scripts: Mapping[int, Script], where: Path
) -> Outcome:
    """Draws the codes of some texts, decodes and writes them; they are given by their numbers."""
    vocabulary, decoder, device = setup.vocabulary, setup.decoder, setup.device
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
    waveforms = decoded(decoder, codes, device)
    for script in sayable:
        write_speech(script, waveforms, decoder.config.sampling_rate, vocabulary, where, config.pause_s)
    n_tokens = sum(script.n_codes for script in sayable)
    times = Times(encoded - started, drawn - encoded, time.perf_counter() - drawn, n_tokens)
    for script in scripts.values():
        script.wall_s = (times.encode_s + times.generate_s + times.decode_s) / len(scripts)
        script.codes = None
    return Outcome({number: script.row(setup.task) for number, script in scripts.items()}, times)


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
