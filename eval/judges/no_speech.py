"""What counts as no speech, as a named rule that stands in a judge's protocol.

Recognisers were trained on speech and write words where there is none: Whisper tiny.en reads four seconds of digital
silence as "you", repeats itself after a long tail, and spends a minute on dots where the tail is faint noise. Rule
`v2`, in this order:

1. Level. A frame of 25 ms is active where it is louder than -60 dBFS and than 40 dB under the loudest one, its mean
   (DC) taken away; active frames count in runs of 80 ms and more, which a click is not. A clip without such a run is
   not read: its transcript is empty. What lies more than half a second before the first run or behind the last is not
   read either.
2. Probability, of Whisper alone and with the thresholds of its own decoding (arXiv 2212.04356, section 4.5): empty
   where `<|nospeech|>` has more than 0.6 and the text's mean log probability is under -1.
3. Repetition. Decoding stops where the last 24 tokens or more are one phrase over and over, four times at least; the
   phrase is kept once. Of a tokenizer whose tokens are characters it takes 120. A text that zlib shrinks by more than
   2.4 (the same section) keeps each phrase once that follows itself four times or more: numbers read digit by digit
   shrink as much, and hold no such phrase.

Rule `v1` counted characters as tokens, and kept every repeated phrase once.

Levels are relative but for the floor: appended zeros change no verdict, nor does a gain while the loudest frame lies
above -20 dBFS. Under that the floor takes over, and of recordings far below their natural level soft words are lost.

Shapes: F frames, B clips, S samples, L text tokens, V vocabulary.
"""

from __future__ import annotations

import zlib
from typing import Any, Literal

import numpy as np
import torch
from transformers import StoppingCriteria

NoSpeechRule = Literal["v2", "off"]

FLOOR_DBFS, BELOW_LOUDEST_DB = -60.0, 40.0
FRAME_S, HOP_S = 0.025, 0.010
SHORTEST_RUN_S, MARGIN_S = 0.08, 0.5
_BLOCK_FRAMES = 6000  # a minute at a time: the sums of hours in double precision would take many times the recording
NO_SPEECH_PROBABILITY, MEAN_LOG_PROBABILITY = 0.6, -1.0
COMPRESSION_RATIO = 2.4
REPEATED_TOKENS, REPEATED_TIMES, LONGEST_PHRASE = 24, 4, 12
CHARACTERS_A_TOKEN = 5  # of Whisper's English tokens, the space included


def active_part(audio: np.ndarray, sampling_rate: int) -> np.ndarray | None:
    """The part of a waveform (S,) to be read, with its margins; None where there is no speech by level."""
    frame, hop = round(FRAME_S * sampling_rate), round(HOP_S * sampling_rate)
    padded = np.pad(audio, (0, max(0, frame - len(audio))))
    levels = _frame_levels(padded, frame, hop)
    threshold = max(10 ** (FLOOR_DBFS / 20), levels.max() * 10 ** (-BELOW_LOUDEST_DB / 20))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], levels > threshold, [0]])))
    starts, ends = edges[::2], edges[1::2]
    runs = np.flatnonzero((ends - starts) * hop >= round(SHORTEST_RUN_S * sampling_rate))
    if not len(runs):
        return None
    margin = round(MARGIN_S * sampling_rate)
    start, end = starts[runs[0]] * hop - margin, (ends[runs[-1]] - 1) * hop + frame + margin
    return audio[max(0, start) : end]


def _frame_levels(audio: np.ndarray, frame: int, hop: int) -> np.ndarray:
    """RMS of each frame of a waveform (S,), around the frame's own mean."""
    starts = np.arange(0, len(audio) - frame + 1, hop)
    blocks = (starts[first : first + _BLOCK_FRAMES] for first in range(0, len(starts), _BLOCK_FRAMES))
    return np.concatenate([_levels(audio[block[0] : block[-1] + frame], block - block[0], frame) for block in blocks])


def _levels(audio: np.ndarray, starts: np.ndarray, frame: int) -> np.ndarray:
    """RMS of the frames that begin at ``starts``, by running sums in double precision."""
    audio = audio.astype(np.float64)
    sums, squares = (np.concatenate([[0.0], np.cumsum(values)]) for values in (audio, np.square(audio)))
    mean, power = ((s[starts + frame] - s[starts]) / frame for s in (sums, squares))
    return np.sqrt(np.maximum(power - mean**2, 0.0))


def without_repetition(text: str) -> str:
    """The text, with each phrase that follows itself four times kept once, where zlib shrinks it by more than 2.4."""
    data = text.strip().encode()
    if not data or len(data) / len(zlib.compress(data)) <= COMPRESSION_RATIO:
        return text
    words = text.split()
    for length in range(1, LONGEST_PHRASE + 1):
        kept: list[str] = []
        start = 0
        while start < len(words):
            phrase, end = words[start : start + length], start + length
            while words[end : end + length] == phrase:
                end += length
            if len(phrase) == length and end - start >= REPEATED_TIMES * length:
                kept += phrase
                start = end
            else:
                kept.append(words[start])
                start += 1
        words = kept
    return " ".join(words)


def repeated_tail(tokens: list[int], scale: int = 1) -> int:
    """Length of the phrase that a decoder has fallen into repeating at the end of its tokens; 0: none.

    Args:
        tokens: what it has written.
        scale: how many of its tokens make one of Whisper's: CHARACTERS_A_TOKEN where they are characters.
    """
    for length in range(1, scale * LONGEST_PHRASE + 1):
        span = max(scale * REPEATED_TOKENS, REPEATED_TIMES * length)
        tail = tokens[-span:]
        if len(tail) == span and tail[length:] == tail[:-length]:
            return length
    return 0


def without_repeated_tail(tokens: list[int], scale: int = 1) -> list[int]:
    """The tokens with the phrase that they end in kept once."""
    length = repeated_tail(tokens, scale)
    if not length:
        return tokens
    end = len(tokens)
    while end > length and tokens[end - 1] == tokens[end - 1 - length]:
        end -= 1
    return tokens[:end]


class StopAtRepetition(StoppingCriteria):
    """Ends each row of `generate` that repeats itself, whatever the others do."""

    def __init__(self, scale: int = 1) -> None:
        self.scale = scale

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """(B,) bool of token ids (B, L)."""
        longest = self.scale * max(REPEATED_TOKENS, REPEATED_TIMES * LONGEST_PHRASE)
        found = [repeated_tail(row, self.scale) > 0 for row in input_ids[:, -longest:].tolist()]
        return torch.tensor(found, device=input_ids.device)


class WhisperConfidence:
    """How sure a Whisper model is that there is speech at all, and of a text that it wrote.

    Args:
        model: WhisperForConditionalGeneration with the special tokens of the published ones.
    """

    def __init__(self, model: Any) -> None:
        self.model, self._encoded = model, None
        settings = model.generation_config
        self.start = settings.decoder_start_token_id
        self.no_timestamps: int = settings.no_timestamps_token_id
        self.no_speech = self.no_timestamps - 1
        model.get_encoder().register_forward_hook(self._keep)

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        self._encoded = output.last_hidden_state

    def __call__(self, answers: list[list[int]], prompt: list[list[int]]) -> list[tuple[float, float]]:
        """Of the clips that the model read last.

        Args:
            answers: the text tokens of each clip, without an end.
            prompt: those between start and text: language and task, where the model has them.

        Returns:
            For each clip, the probability of no speech and the mean log probability of its text and end.
        """
        eos = self.model.generation_config.eos_token_id
        rows = [[self.start, *p, self.no_timestamps, *a, eos] for p, a in zip(prompt, answers, strict=True)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [eos] * (longest - len(row)) for row in rows], device=self._encoded.device)
        logits = self.model(encoder_outputs=(self._encoded,), decoder_input_ids=ids[:, :-1]).logits.float()  # (B, L, V)
        no_speech = logits[:, 0].softmax(-1)[:, self.no_speech]
        log_probabilities = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
        found = []
        for row, (answer, given) in enumerate(zip(answers, prompt, strict=True)):
            first = 1 + len(given)  # what the token <|notimestamps|> predicts
            mean = log_probabilities[row, first : first + len(answer) + 1].mean()
            found.append((float(no_speech[row]), float(mean)))
        return found


def is_no_speech(no_speech_probability: float, mean_log_probability: float) -> bool:
    """Whether a Whisper's transcript is dropped."""
    return no_speech_probability > NO_SPEECH_PROBABILITY and mean_log_probability < MEAN_LOG_PROBABILITY
