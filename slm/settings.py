"""How answers are decoded, and what follows for one of them: how long it may be, must be, and may repeat itself.

A model tells what its training's utterances were like (`trained_on`); what lies outside that is given a limit here. A
model that was saved without those facts gets limits that are wide for any speech.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from slm.decoding.row_rules import RowLimits
from slm.tasks import Task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import prompt_size
from slm.vocabulary import SpeechVocabulary

# Of a text that the model does not know the rate of: about four times what reading takes.
UNKNOWN_SECONDS_PER_CHARACTER, UNKNOWN_MIN_SECONDS = 0.25, 4.0
TOKENS_PER_TOKEN = 2  # of text allowed for each text token of a prompt
SECONDS_PER_SECOND = 2.0  # of speech allowed for each second of speech in a prompt
# Beside the 1 % of the training's utterances that were the slowest for their text; the slowest of three coded corpora
# of 1,574 utterances each took 1.2 times as long as that.
SLOWEST = 1.5
# Beside the 1 % that were the fastest: what is said in half of that has lost words.
FASTEST = 0.5
# Beside the longest loop of the training's codes, which is silence. A hold, a laugh or a line of pauses stays below.
LOOP_HEADROOM, LEAST_LOOP_S, UNKNOWN_LOOP_S = 1.5, 1.5, 3.0
LEAST_LOOP_TOKENS, UNKNOWN_LOOP_TOKENS = 24, 48


class GenerationError(ValueError):
    """Settings or inputs that nothing can be generated from; the message says which."""


@dataclass
class TranscribeSettings:
    """How text is decoded: greedily, with a beam, or drawn."""

    batch_size: int = field(default=32, metadata={"help": "utterances decoded together, at most"})
    batch_seconds: float = field(
        default=480.0, metadata={"help": "seconds of speech decoded together, padding included, at most"}
    )
    num_beams: int = field(default=1, metadata={"help": "beams; 1 is greedy"})
    n_best: int = field(default=1, metadata={"help": "answers of each utterance, the likeliest; at most num_beams"})
    temperature: float = field(default=0.0, metadata={"help": "draw the text at this temperature; 0 does not draw"})
    top_k: int = field(default=0, metadata={"help": "draw from the k likeliest tokens; 0: all"})
    top_p: float = field(default=1.0, metadata={"help": "draw from the likeliest tokens that make up this share"})
    seed: int = field(default=0, metadata={"help": "seed of the draws"})
    tokens_per_s: float = field(
        default=25.0,
        metadata={
            "help": f"text tokens allowed per second of a prompt's speech; {TOKENS_PER_TOKEN} per text token there"
        },
    )
    min_tokens: int = field(default=24, metadata={"help": "text tokens allowed to however short a prompt"})
    loop_tokens: int | None = field(
        default=None,
        metadata={
            "help": "text that repeats itself for more than so many tokens, four times or more, is cut off as a loop; "
            f"null: {LOOP_HEADROOM:g} times the longest of the training's texts, at least {LEAST_LOOP_TOKENS} "
            f"({UNKNOWN_LOOP_TOKENS} where the model does not tell); 0: never"
        },
    )

    def __post_init__(self) -> None:
        settings = (self.batch_size, self.batch_seconds, self.num_beams, self.tokens_per_s, self.min_tokens)
        if min(settings) <= 0:
            raise GenerationError(
                "transcribing: batch_size, batch_seconds, num_beams, tokens_per_s and min_tokens must be positive"
            )
        _check_sampling("transcribing", self.temperature, self.top_k, self.top_p)
        if not 1 <= self.n_best <= self.num_beams:
            raise GenerationError(
                f"transcribing: n_best {self.n_best} must be 1 to num_beams ({self.num_beams}), which finds them"
            )
        if self.temperature and self.num_beams > 1:
            raise GenerationError("transcribing: draw (temperature) or search with a beam (num_beams), not both")
        if (self.loop_tokens or 0) < 0:
            raise GenerationError("transcribing: loop_tokens must be 0 (no guard), more, or null")


@dataclass
class SynthesizeSettings:
    """How speech tokens are drawn. Each text has a random stream of its own, from the seed and its key."""

    batch_size: int = field(default=32, metadata={"help": "texts decoded together"})
    temperature: float = field(default=0.8, metadata={"help": "0 is greedy"})
    top_k: int = field(default=50, metadata={"help": "draw from the k likeliest codes; 0: all"})
    top_p: float = field(default=1.0, metadata={"help": "draw from the likeliest codes that make up this share"})
    seed: int = field(default=0, metadata={"help": "seed of the draws"})
    guidance: float = field(
        default=1.0,
        metadata={
            "help": "classifier-free guidance: how far scores are moved from those without a prompt, 1.5 to 3, say; "
            "1 is none and takes half the time. The model must have learnt it (noise.drop_prompt of `slm finetune`)"
        },
    )
    multi_token: int = field(
        default=1,
        metadata={
            "help": "tokens that a forward pass of the model gives at most, by its multi-token heads "
            "(training.multi_token of `slm finetune`); the next pass verifies them, so that the codes are those of 1"
        },
    )
    multi_token_verify: bool = field(
        default=True,
        metadata={
            "help": "with multi_token: false takes all that the heads propose unseen, so many tokens a pass: faster, "
            "and other codes"
        },
    )
    retries: int = field(
        default=0,
        metadata={
            "help": "times that an answer which the model did not end is drawn anew, with the next seed; counted"
        },
    )
    seconds_per_character: float | None = field(
        default=None,
        metadata={
            "help": f"speech allowed per character of text; null: {SLOWEST:g} times what the slowest of the training's "
            f"speech took, or {UNKNOWN_SECONDS_PER_CHARACTER} where the model does not tell"
        },
    )
    min_seconds: float | None = field(
        default=None,
        metadata={
            "help": "speech allowed beside that to however short a prompt; null: as much as to the training's shortest "
            f"texts, or {UNKNOWN_MIN_SECONDS:g} where the model does not tell; speech in a prompt allows "
            f"{SECONDS_PER_SECOND:g} times its length beside"
        },
    )
    min_seconds_per_character: float | None = field(
        default=None,
        metadata={
            "help": "speech per character of text before which the model may not end; null: "
            f"{FASTEST:g} of what the fastest of the training's speech took, or 0 where the model does not tell"
        },
    )
    max_word_s: float = field(
        default=2.0,
        metadata={
            "help": "speech allowed per word where the text is given word by word (task=tts-aligned), the pause behind "
            "it included; the next word is given then. No limit of the whole text is read there"
        },
    )
    word_retries: int = field(
        default=5,
        metadata={
            "help": "times that a word which ran into its limit or a loop is drawn again (task=tts-aligned); counted. "
            "It is silence behind the word, as a rule. Not where temperature is 0"
        },
    )
    loop_s: float | None = field(
        default=None,
        metadata={
            "help": "codes that repeat themselves for longer than so many seconds, four times or more, are cut off as "
            f"a loop; null: {LOOP_HEADROOM:g} times the longest of the training's speech, at least {LEAST_LOOP_S:g} "
            f"({UNKNOWN_LOOP_S:g} where the model does not tell); 0: never"
        },
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise GenerationError("synthesising: batch_size must be at least 1")
        _check_sampling("synthesising", self.temperature, self.top_k, self.top_p)
        for name in ("seconds_per_character", "min_seconds_per_character", "loop_s"):
            if (getattr(self, name) or 0) < 0:
                raise GenerationError(f"synthesising: {name} must be 0, more, or null")
        if self.multi_token < 1:
            raise GenerationError(f"synthesising: multi_token {self.multi_token} must be at least 1")
        if self.multi_token > 1 and self.guidance > 1:
            raise GenerationError(
                "synthesising: multi_token: not with guidance, whose scores are of two prompts; drop one"
            )
        if not self.multi_token_verify and self.multi_token == 1:
            raise GenerationError("synthesising: multi_token_verify: nothing is proposed; set multi_token to 2 or more")
        if self.guidance < 1:
            raise GenerationError("synthesising: guidance must be 1 (none) or more")
        if self.min_seconds is not None and self.min_seconds <= 0:
            raise GenerationError("synthesising: min_seconds must be above 0, or null")
        if self.max_word_s <= 0:
            raise GenerationError(f"synthesising: max_word_s {self.max_word_s:g} must be above 0")
        if self.word_retries < 0:
            raise GenerationError(f"synthesising: word_retries {self.word_retries} must be 0 or more")
        if self.retries < 0 or (self.retries and not self.temperature):
            raise GenerationError(
                f"synthesising: retries {self.retries} must be 0 or more, and need a temperature: a greedy answer is "
                "the same each time"
            )


def _check_sampling(what: str, temperature: float, top_k: int, top_p: float) -> None:
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise GenerationError(
            f"{what}: temperature {temperature:g} and top_k {top_k} must be 0 or more, top_p {top_p:g} above 0 and at "
            "most 1"
        )


@dataclass(frozen=True)
class SpeechLimits:
    """Seconds of speech that may come of a prompt, and that must come before it may end."""

    most_s: float
    least_s: float = 0.0

    def rows(self, vocabulary: SpeechVocabulary) -> RowLimits:
        """The same in ids: whole frames, one at least, and never more due than allowed."""
        n = vocabulary.ids_per_frame
        most = max(1, math.ceil(self.most_s * vocabulary.frame_rate))
        return RowLimits(most * n, min(most, int(self.least_s * vocabulary.frame_rate)) * n)


def speech_limits(
    vocabulary: SpeechVocabulary,
    text: str,
    settings: SynthesizeSettings,
    speech_s: float = 0.0,
    is_said: bool = True,
) -> SpeechLimits:
    """How long the speech may be that comes of a prompt, and how long it must be, by the training's rate of speech.

    A text that is shorter than the training's shortest is allowed what those were: there is silence around each.

    Args:
        vocabulary: Of the model.
        text: The text in the prompt.
        settings: Decoding.
        speech_s: Seconds of speech in the prompt.
        is_said: Whether the answer says this text, and all of it: else nothing follows for its least length.
    """
    known = vocabulary.trained_on
    measured = known is not None and known.shortest_text is not None
    characters, base, per_character = len(text), settings.min_seconds, settings.seconds_per_character
    if base is None:
        base = 0.0 if measured and text else UNKNOWN_MIN_SECONDS
        characters = max(characters, known.shortest_text) if measured and text else characters
    if per_character is None:
        # Folders without `shortest_text` are of models that were made with these limits: their answers stay the same.
        slowest = SLOWEST if measured else 2.0
        per_character = slowest / known.characters_per_s[0] if known else UNKNOWN_SECONDS_PER_CHARACTER
    least = settings.min_seconds_per_character
    if least is None:
        least = FASTEST / known.characters_per_s[2] if measured else 0.0
    most_s = base + per_character * characters + SECONDS_PER_SECOND * speech_s
    return SpeechLimits(most_s, least * len(text) if is_said else 0.0)


def word_limits(vocabulary: SpeechVocabulary, settings: SynthesizeSettings) -> SpeechLimits:
    """How long the speech of each word of a task by word may be: at least a frame, so that none is skipped."""
    return SpeechLimits(settings.max_word_s, 1.5 / vocabulary.frame_rate)  # rounded down to whole frames


def tokens_allowed(
    vocabulary: SpeechVocabulary, task: Task, utterance: UtteranceTokens, settings: TranscribeSettings
) -> int:
    """The most text tokens that may come of a prompt before the answer counts as cut off.

    Raises:
        TaskError: The utterance lacks a part of the prompt.
    """
    frames, tokens = prompt_size(task, utterance)
    seconds = frames / vocabulary.frame_rate
    return settings.min_tokens + math.ceil(seconds * settings.tokens_per_s) + TOKENS_PER_TOKEN * tokens


def speech_loop_s(vocabulary: SpeechVocabulary, unknown_s: float = UNKNOWN_LOOP_S) -> float:
    """Seconds that codes may repeat themselves: 1.5 times the most of any in the training, or `unknown_s`."""
    known = vocabulary.trained_on
    if known is None or known.longest_loop_s is None:
        return unknown_s
    return max(LEAST_LOOP_S, LOOP_HEADROOM * known.longest_loop_s)


def speech_loop_limit(vocabulary: SpeechVocabulary, settings: SynthesizeSettings) -> int | None:
    """Frames that a loop must be longer than to end an answer; None for no guard."""
    seconds = speech_loop_s(vocabulary) if settings.loop_s is None else settings.loop_s
    return math.ceil(seconds * vocabulary.frame_rate) if seconds else None


def text_loop_limit(vocabulary: SpeechVocabulary, settings: TranscribeSettings) -> int | None:
    """Tokens that a loop must be longer than to end an answer; None for no guard."""
    if settings.loop_tokens is not None:
        return settings.loop_tokens or None
    known = vocabulary.trained_on
    if known is None or known.longest_text_loop is None:
        return UNKNOWN_LOOP_TOKENS
    return max(LEAST_LOOP_TOKENS, math.ceil(LOOP_HEADROOM * known.longest_text_loop))
