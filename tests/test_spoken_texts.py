"""Texts on their way to speech: cut into sentences; what cannot be said, and what looks lost, is told."""

from __future__ import annotations

import numpy as np
import pytest
from slm_tiny import tiny_tokenizer

from eval.text.normalisers import get_normaliser, normalise_basic
from recipes.inference.long_texts import cut_text
from recipes.inference.speech_checks import is_silent, longest_pause_s, speech_warnings, unsayable
from slm.decoding.loops import longest_loop
from slm.generation import SynthesizeOutput
from slm.trained_on import TrainedOn
from slm.vocabulary import SpeechVocabulary

ENGLISH = TrainedOn(" abcdefghijklmnopqrstuvwxyz'", longest_text=60, longest_s=4.0, characters_per_s=(10, 14, 20))
LONG = """Dr. Smith paid $3.50 on Jan. 5, i.e. yesterday: not 1,000,000 but 7. "Really?" she asked. He left... Then,
after a while, he came back (with a friend) and never, never went away again, no matter what anybody said or did!

A heading
The U.S. Army paid Mr. Jones 2.5 percent. *** Version 2.0.1 is out, see www.example.com; an enormous word
is aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa and after it come many words without any comma
"""


def voice(trained_on: TrainedOn | None = ENGLISH) -> SpeechVocabulary:
    return SpeechVocabulary((8,), first_id=300, end_id=2, normaliser="basic", trained_on=trained_on)


def test_a_text_is_cut_into_sentences_and_no_word_is_lost() -> None:
    parts = cut_text(LONG, normalise_basic, 60)
    assert " ".join(part.said for part in parts) == normalise_basic(LONG)
    assert all(part.said and (len(part.said) <= 60 or len(part.said.split()) == 1) for part in parts)
    written = [part.written for part in parts]
    for sentence in (
        '"Really?" she asked.',
        "He left...",
        "A heading",
        "The U.S. Army paid Mr. Jones 2.5 percent.",
    ):
        assert sentence in written and parts[written.index(sentence)].ends_sentence
    assert parts[0].written == "Dr. Smith paid $3.50 on Jan. 5," and not parts[0].ends_sentence


@pytest.mark.parametrize("text", [LONG, LONG * 5], ids=["some lines", "2,000 characters"])
@pytest.mark.parametrize("longest", [20, 61, 500])
def test_no_word_is_lost_whatever_the_length(text: str, longest: int) -> None:
    parts = cut_text(text, normalise_basic, longest)
    assert " ".join(part.said for part in parts) == normalise_basic(text)
    assert text == LONG or len(text) > 2000
    assert all(len(part.said) <= longest or len(part.written.split()) == 1 for part in parts)


def test_a_text_that_fits_stays_whole_and_an_empty_one_has_no_part() -> None:
    (part,) = cut_text("One. Two,\nthree.", normalise_basic, 20)
    assert part.said == "one two three" and part.written == "One. Two,\nthree."
    assert cut_text(" ?! ***\n", normalise_basic, 20) == cut_text("", normalise_basic, 20) == []


def test_the_pieces_of_a_long_sentence_last_no_longer_than_the_training_did() -> None:
    """The longest texts were those of its fast readers, and the model may speak as its slow ones do."""
    slow_and_fast = TrainedOn("a", longest_text=60, longest_s=3.0, characters_per_s=(5, 10, 20))
    assert slow_and_fast.longest_piece == 30 and ENGLISH.longest_piece == 56
    assert TrainedOn("a", longest_text=60, longest_s=9.0, characters_per_s=(5, 10, 20)).longest_piece == 60
    fits, long = (
        "one two three four five six seven eight nine",
        "ten eleven twelve thirteen fourteen fifteen sixteen seven",
    )
    parts = [part.said for part in cut_text(f"{fits}. {long} eight.", normalise_basic, 60, longest_piece=30)]
    assert parts[0] == fits and max(map(len, parts[1:])) <= 30 and " ".join(parts[1:]) == f"{long} eight"


def test_no_word_is_left_over_where_words_do_not_fill_the_parts() -> None:
    commands = (
        "lay green by g zero please, lay green in f zero now, lay green in l six please, lay green in z five again, "
    )
    commands += "lay green with a zero please, lay red by e nine again, lay red by l zero now, lay red by r five soon, "
    text = normalise_basic(commands + "lay red by y eight now, lay red in q seven soon")
    lengths = [len(part.said) for part in cut_text(text, normalise_basic, 62)]
    assert len(lengths) == 5 and min(lengths) > 40 and max(lengths) <= 62  # not 60, 58, 61, 60, 4


def test_words_left_over_are_shared_out_and_scripts_without_spaces_are_cut() -> None:
    lengths = [len(part.said) for part in cut_text(" ".join(["word"] * 13), normalise_basic, 30)]
    assert sum(lengths) == 13 * 5 - len(lengths) and min(lengths) > max(lengths) / 2  # not 29, 29, 4
    chinese = "北京很大你好" * 20 + "。" + "你好，" * 10
    parts = cut_text(chinese, get_normaliser("basic:any"), 30)
    assert "".join(part.said for part in parts).replace(" ", "") == chinese.replace("。", "").replace("，", "")
    assert all(len(part.said) <= 30 for part in parts)


def test_what_cannot_be_said_is_told() -> None:
    told = unsayable("Grüße, 北京 3 <|speech|> [laugh] $5 🙂", normalise_basic, voice(), tiny_tokenizer())
    assert len(told) == 3
    assert told[0].endswith(": ü ß 北 京") and told[1].endswith("'basic': < | > 🙂")
    assert told[2].endswith(": <|speech|> [laugh]")
    assert unsayable("It's 3 o'clock - \"yes\"; 100% (one)...", normalise_basic, voice(), tiny_tokenizer()) == []
    # A model that does not tell its training's characters: a tokenizer of bytes knows them all.
    assert unsayable("北京", normalise_basic, voice(None), tiny_tokenizer()) == []


SAID = "set white at b four now"  # 23 characters: 1.64 s at 14 in a second, 1.15 s at 20, 2.3 s at 10


def signs(seconds: float, codes: np.ndarray | None = None, reason: str = "stop", gain: float = 0.3) -> list[str]:
    rng = np.random.default_rng(0)
    waveform = gain * rng.standard_normal(round(seconds * 16000)).clip(-1, 1)
    codes = rng.integers(0, 8, (1, round(seconds * 12.5))) if codes is None else codes
    return speech_warnings(SAID, SynthesizeOutput(codes, reason), waveform, 16000, voice())


def test_what_looks_lost_is_told() -> None:
    for well in (1.1, 1.6, 2.3, 3.0):
        assert signs(well) == []
    assert "1.6 s were expected: words look lost" in signs(0.8)[0]
    assert "said twice" in signs(4.0)[0]
    assert signs(2.0, reason="length")[0].startswith("cut off after 2.0 s, its budget")
    assert signs(2.0, reason="loop")[0].startswith("cut off after 2.0 s, in a loop")
    assert signs(2.0, gain=1e-4) == ["2.0 s of silence"]
    looped = np.tile(np.arange(4), 8)[None]
    assert signs(2.56, looped) == ["the same sounds again and again for 2.6 s"]


def test_what_a_broken_decoder_gives_is_told() -> None:
    """A constant, one between two words, and samples that are all at full scale: a file looks well with each."""
    rng = np.random.default_rng(0)
    output = SynthesizeOutput(rng.integers(0, 8, (1, 20)), "stop")
    sound = 0.2 * rng.standard_normal(12800)

    def told(waveform: np.ndarray) -> list[str]:
        return speech_warnings(SAID, output, waveform.astype(np.float32), 16000, voice())

    assert told(np.full(25600, 0.4)) == ["1.6 s of silence"]
    assert told(np.concatenate([sound[:4000], np.full(30000, 0.4), sound[:4000]]))[0].endswith(" s of silence in it")
    (distorted,) = told((40 * np.concatenate([sound, sound])).clip(-1, 1))
    assert distorted.endswith(" % of its samples are at full scale: distorted") and distorted.startswith("9")
    loud = (2 * np.concatenate([sound, sound])).clip(-1, 1)
    assert 0.01 < np.mean(np.abs(loud) >= 1) < 0.1 and told(loud) == []
    assert is_silent(np.zeros(0)) and is_silent(np.full(99, -0.7)) and not is_silent(sound)


def test_pauses_and_loops_are_measured() -> None:
    rng = np.random.default_rng(0)
    sound = rng.standard_normal(16000)
    assert longest_pause_s(np.concatenate([sound, np.zeros(24000), sound]), 16000) == pytest.approx(1.5, abs=0.04)
    assert longest_pause_s(sound, 16000) == 0
    tail = rng.integers(100, 200, 20)
    assert longest_loop(np.concatenate([np.tile([1, 2, 3], 5), tail])[None]) == 15
    assert longest_loop(np.concatenate([np.tile([1, 2, 3], 3), tail])[None]) == 0
    assert longest_loop(np.zeros((1, 1), int)) == 0
