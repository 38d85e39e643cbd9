"""What an SLM cannot say of a text, known before it speaks; and what of it looks lost, afterwards.

Shapes: n books that the SLM speaks, F code frames, S samples; codes (n, F), waveforms (S,).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

import numpy as np
from transformers import PreTrainedTokenizerBase

from slm.decoding.loops import longest_loop, longest_run
from slm.generation import SynthesizeOutput
from slm.settings import LEAST_LOOP_S, speech_loop_s
from slm.vocabulary import SpeechVocabulary

_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]]+\]")
# Beside the training's slowest and fastest utterances (1 % of which lie outside): so much more is out of the ordinary.
LEEWAY, LEEWAY_S = 1.15, 1.0
SILENT_PEAK = 10 ** (-50 / 20)
QUIET_BELOW = 10 ** (-40 / 20)  # of the loudest frame: a pause
LONGEST_PAUSE_S = 1.5
FRAME_S = 0.02
FULL_SCALE_SHARE = 0.1  # of the samples: loud speech has a few in a thousand there, a broken decoder most


def unsayable(
    text: str,
    normalise: Callable[[str], str],
    vocabulary: SpeechVocabulary,
    text_tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """What of a text the model cannot be expected to say as it was written, in one line each.

    Characters that its training's texts never had, where the model tells those; else only those that its text tokenizer
    does not know. Symbols that the normaliser leaves out, punctuation aside. And what looks like a mark (`<...>`,
    `[...]`), whose name is read as a word.
    """
    said, warnings = normalise(text), []
    if vocabulary.trained_on is not None:
        unmet = vocabulary.trained_on.unmet(said)
        if unmet:
            warnings.append(f"not in the training's texts, so that what comes of it is chance: {' '.join(unmet)}")
    elif unknown := _unknown(said, text_tokenizer):
        warnings.append(f"unknown to the model's text tokenizer, and not said: {' '.join(unknown)}")
    if dropped := _dropped(text, normalise):
        warnings.append(f"left out by the normaliser {vocabulary.normaliser_of_prompts!r}: {' '.join(dropped)}")
    if marks := [mark for mark in dict.fromkeys(_MARK.findall(text)) if normalise(mark)]:
        warnings.append(f"read as words, since the model knows no marks in a text: {' '.join(marks)}")
    return warnings


def _unknown(said: str, text_tokenizer: PreTrainedTokenizerBase) -> list[str]:
    unknown_id = text_tokenizer.unk_token_id
    if unknown_id is None:
        return []
    characters = (character for character in dict.fromkeys(said) if not character.isspace())
    return [c for c in characters if unknown_id in text_tokenizer(c, add_special_tokens=False)["input_ids"]]


def _dropped(text: str, normalise: Callable[[str], str]) -> list[str]:
    """Symbols and digits whose word is the same without them. "$5" keeps its dollar, a lone "$" does not."""
    found: dict[str, None] = {}
    for word in text.split():
        for character in dict.fromkeys(word):
            # P and Z are punctuation and spaces, Sk marks such as a backtick; M changes the letter before it.
            if (category := unicodedata.category(character))[0] not in "SNCL" or category in ("Sk", "Cf"):
                continue
            if normalise(word) == normalise(word.replace(character, "")):
                found[character] = None
    return list(found)


def is_silent(waveform: np.ndarray) -> bool:
    """Whether nothing is to be heard in a waveform (S,): it is empty, constant or below -50 dBFS."""
    return not len(waveform) or float(np.ptp(waveform)) / 2 < SILENT_PEAK


def speech_warnings(
    said: str,
    output: SynthesizeOutput,
    waveform: np.ndarray,
    sampling_rate: int,
    vocabulary: SpeechVocabulary,
) -> list[str]:
    """What suggests that a text was not said, or not said once, in one line each; none where all looks well.

    Args:
        said: the text, normalised; empty where nobody knows it, and then the rate of speech cannot be judged.
        output: what the model drew for it.
        waveform: (S,) what became of the codes.
        sampling_rate: Hz.
        vocabulary: of the model; without its `trained_on` the rate of speech cannot be judged.
    """
    seconds, warnings = len(waveform) / sampling_rate, []
    if output.finish_reason == "length":
        warnings.append(
            f"cut off after {seconds:.1f} s, its budget (decoding.min_seconds and seconds_per_character raise it)"
        )
    elif output.finish_reason == "loop":
        warnings.append(f"cut off after {seconds:.1f} s, in a loop (decoding.loop_s says what is one)")
    if is_silent(waveform):
        return [*warnings, f"{seconds:.1f} s of silence"]
    if (share := float(np.mean(np.abs(waveform) >= 1))) > FULL_SCALE_SHARE:
        warnings.append(f"{100 * share:.0f} % of its samples are at full scale: distorted")
    if (pause_s := longest_pause_s(waveform, sampling_rate)) > LONGEST_PAUSE_S:
        warnings.append(f"{pause_s:.1f} s of silence in it")
    elif output.finish_reason != "loop":
        loop_s = longest_loop(output.codes) / vocabulary.frame_rate
        if loop_s > speech_loop_s(vocabulary, LEAST_LOOP_S):
            warnings.append(f"the same sounds again and again for {loop_s:.1f} s")
    if said and (known := vocabulary.trained_on) is not None:
        slow, usual, fast = known.characters_per_s
        expected_s = len(said) / usual
        if seconds < len(said) / fast / LEEWAY:
            warnings.append(f"{seconds:.1f} s where about {expected_s:.1f} s were expected: words look lost")
        elif seconds > len(said) / slow * LEEWAY + LEEWAY_S and not output.truncated:
            warnings.append(f"{seconds:.1f} s where about {expected_s:.1f} s were expected: something looks said twice")
    return warnings


def longest_pause_s(waveform: np.ndarray, sampling_rate: int) -> float:
    """Seconds of the longest stretch of a waveform (S,) that is 40 dB below its loudest 20 ms, or constant."""
    size = max(1, round(FRAME_S * sampling_rate))
    frames = waveform[: len(waveform) // size * size].reshape(-1, size)
    levels = frames.std(axis=1, dtype=np.float64)  # around each frame's mean
    return longest_run(levels < QUIET_BELOW * levels.max(initial=0.0)) * size / sampling_rate
