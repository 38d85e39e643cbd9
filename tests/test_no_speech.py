"""The rule for what is no speech: on waveforms made here, and with Whisper where its folder is at hand."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from eval.judges.config import JudgeConfig, JudgeError
from eval.judges.judge import Judge, check_judge, load_judge
from eval.judges.no_speech import (
    CHARACTERS_A_TOKEN,
    StopAtRepetition,
    active_part,
    is_no_speech,
    repeated_tail,
    without_repeated_tail,
    without_repetition,
)

RATE = 16_000
PROJECT = Path(__file__).resolve().parents[1]
MODELS = PROJECT / "runs" / "models"
DATA = PROJECT.parent / "shared" / "data"


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def noise(seconds: float, dbfs: float, seed: int = 0) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return (10 ** (dbfs / 20) * samples).astype(np.float32)


def click() -> np.ndarray:
    samples = silence(3)
    samples[RATE] = 0.9
    return samples


def voice(seconds: float = 1.5, level: float = 0.1) -> np.ndarray:
    """Syllables of a buzz: 0.2 s on, 0.1 s off."""
    time_s = np.arange(round(seconds * RATE)) / RATE
    buzz = np.sign(np.sin(2 * np.pi * 110 * time_s)) * (time_s % 0.3 < 0.2)
    return (level * buzz).astype(np.float32)


NOTHING = {
    "silence": silence(4),
    "DC": silence(4) + 0.3,
    "click": click(),
    "faint noise": noise(4, -70),
    "one sample": np.ones(1, np.float32),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_is_no_speech_by_level_is_never_read(name):
    def read(pieces):
        raise AssertionError("was read")

    judge = Judge({"name": "j"}, RATE, 30.0, 4, 240.0, read, "v2")
    assert judge.transcribe([NOTHING[name]], RATE) == [""]


@pytest.mark.parametrize("gain", [1.0, 0.02, 5.0])
@pytest.mark.parametrize("tail", [silence(60), noise(60, -75), silence(60) + 0.05], ids=["zeros", "faint noise", "DC"])
def test_tails_and_gain_leave_what_is_read(gain, tail):
    """Half a second around the speech at most, whatever follows and precedes it."""
    alone = active_part(gain * voice(), RATE)
    assert np.array_equal(alone, gain * voice())
    both = active_part(gain * np.concatenate([tail, voice(), tail]).astype(np.float32), RATE)
    assert len(voice()) <= len(both) <= len(voice()) + 1.1 * RATE
    middle = active_part(np.concatenate([silence(0.3), gain * voice(), silence(0.3)]), RATE)
    assert len(middle) == len(voice()) + round(0.6 * RATE)  # a recording's own margins stay


def test_a_minute_of_noise_at_minus_70_dbfs_behind_speech_is_not_read():
    both = active_part(np.concatenate([voice(), noise(60, -70)]), RATE)
    assert len(voice()) <= len(both) <= len(voice()) + 1.1 * RATE


def test_the_rule_off_reads_everything():
    judge = Judge({"name": "j"}, RATE, 30.0, 4, 240.0, lambda pieces: ["word"] * len(pieces))
    assert judge.transcribe(list(NOTHING.values()), RATE) == ["word"] * len(NOTHING)


def test_repetition_in_texts():
    spoken = "no no no, said the man, and then he went on and on"
    assert without_repetition(spoken) == spoken
    assert without_repetition("the end " + "of the road " * 40) == "the end of the road"
    assert without_repetition("you " * 60).split() == ["you"]
    assert without_repetition("") == ""
    digits = "zero one two three four five six seven eight nine".split()
    number = " ".join(np.random.default_rng(3).choice(digits, 90))
    assert len(number) / len(zlib.compress(number.encode())) > 2.4  # shrinks as a loop does
    assert without_repetition(number) == number
    assert without_repetition(f"{number} and so on and so on and so on and so on") == f"{number} and so on"


def test_a_decoder_that_repeats_itself_is_stopped_row_by_row():
    start, phrase = [7, 8, 9], [1, 2, 3]
    looping, speaking = start + phrase * 8, list(range(27))
    assert repeated_tail(looping) == 3 and repeated_tail(speaking) == 0
    assert repeated_tail(start + phrase * 7) == 0  # 21 tokens: not yet
    assert repeated_tail([5] * 23) == 0 and repeated_tail([5] * 24) == 1
    assert without_repeated_tail(looping) == start + phrase
    assert without_repeated_tail(looping + [1]) == start + phrase
    assert without_repeated_tail(speaking) == speaking
    # Of a tokenizer of characters 24 are five words, which a speaker may well repeat.
    repeated = [ord(letter) for letter in "call zero zero zero zero zero zero "]
    assert repeated_tail(repeated) and not repeated_tail(repeated, CHARACTERS_A_TOKEN)
    assert repeated_tail([ord(letter) for letter in "and so on " * 12], CHARACTERS_A_TOKEN) == 10
    stops = StopAtRepetition()(torch.tensor([looping, speaking]), None)
    assert stops.tolist() == [True, False]


def test_whispers_own_thresholds():
    assert is_no_speech(0.7, -1.2)
    assert not is_no_speech(0.7, -0.5) and not is_no_speech(0.5, -2.0)


def test_an_unknown_rule_is_refused():
    with pytest.raises(JudgeError, match="no_speech must be one of v2, off"):
        JudgeConfig(no_speech="v1")


def whisper(name: str) -> str:
    if not (MODELS / name / "model.safetensors").is_file():
        pytest.skip(f"{MODELS / name} is not there: a transformers folder of that Whisper")
    return str(MODELS / name)


@pytest.fixture(scope="module")
def spoken() -> tuple[np.ndarray, str]:
    manifest = DATA / "kathleen-arctic" / "manifest.jsonl"
    if not manifest.is_file():
        pytest.skip(f"{manifest} is not there")
    rows = map(json.loads, manifest.read_text().splitlines())
    row = next(row for row in rows if row["split"] == "test")
    samples, rate = soundfile.read(manifest.parent / row["audio"], dtype="float32")
    assert rate == RATE
    return samples, row["text"]


def test_whisper_tiny_writes_nothing_where_nothing_is_said(spoken):
    judge = load_judge(JudgeConfig(name=whisper("whisper-tiny.en")))
    speech = spoken[0]
    clips = [*NOTHING.values(), noise(4, -40), noise(4, -20)]
    assert judge.transcribe(clips, RATE) == [""] * len(clips)
    alone, *tailed = judge.transcribe(
        [speech, np.concatenate([speech, silence(60)]), np.concatenate([silence(60), speech, noise(60, -75)])], RATE
    )
    words = len(alone.split())
    assert words > 5 and all(abs(len(text.split()) - words) <= 1 for text in tailed)
    off = load_judge(JudgeConfig(name=whisper("whisper-tiny.en"), no_speech="off"))
    assert off.transcribe([silence(4)], RATE) != [""]  # what the rule is for


def test_a_multilingual_whispers_language_stands_in_its_identity():
    name = whisper("whisper-base")
    told = [check_judge(JudgeConfig(name=name, language=language)) for language in (None, "de", "auto")]
    assert [(one["language"], one["task"]) for one in told] == [(code, "transcribe") for code in ("en", "de", "auto")]
    with pytest.raises(JudgeError, match="language=xx is not one of its"):
        check_judge(JudgeConfig(name=name, language="xx"))
    english = check_judge(JudgeConfig(name=whisper("whisper-tiny.en")))
    assert english["language"] is None and "task" not in english
    with pytest.raises(JudgeError, match="knows one language"):
        check_judge(JudgeConfig(name=whisper("whisper-tiny.en"), language="de"))


def test_batching_changes_nothing_with_whispers_probabilities(spoken):
    speech = spoken[0]
    clips = [speech, noise(3, -25), speech[: 2 * RATE], noise(2, -30, seed=1)]
    name = whisper("whisper-tiny.en")
    together, alone = (load_judge(JudgeConfig(name=name, batch_size=n)).transcribe(clips, RATE) for n in (4, 1))
    assert together == alone and alone[1] == alone[3] == "" and alone[0] and alone[2]


def test_levels_of_a_long_recording_take_no_more_than_the_recording() -> None:
    recording = np.tile(np.concatenate([silence(30.0), voice(), silence(29.0)]).astype(np.float32), 5)
    tracemalloc.start()
    part = active_part(recording, RATE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < recording.nbytes + 64 * RATE * 50  # beside it a minute in doubles, a few times
    # Frames at the seams of the blocks count as others do: what is left out is the silence at both ends.
    assert len(part) / RATE == pytest.approx(5 * 60.5 - (30.0 - 0.5) - (29.1 - 0.5), abs=0.05)
