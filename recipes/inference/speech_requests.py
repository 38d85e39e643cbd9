"""What the model is asked for each part of a text, and how its answers are drawn."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError
from recipes.encoding.encoder import encode_batch
from recipes.inference.long_texts import Part
from recipes.inference.scripts import Request, Script
from recipes.inference.setup import Setup
from recipes.inference.synthesis_config import Config
from recipes.inference.tasks import prompt_utterance, style_of
from recipes.inference.texts_to_say import hear, may_be_cut
from recipes.runs.progress import progress
from slm.generation import SpeechLM, generate_speech
from slm.settings import SpeechLimits, speech_limits, word_limits
from slm.tasks import Task, TaskError
from slm.tasks.sequences import prompt_size
from slm.vocabulary import SpeechVocabulary
from tokenizer.data.audio import load_audio
from tokenizer.data.utterances import AudioError


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
