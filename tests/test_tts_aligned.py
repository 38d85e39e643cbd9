"""Aligned TTS: a word and then its codes; what is learnt of that, and that no word is skipped or said for ever."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from slm_scripted import scripted
from slm_tiny import (
    CODES,
    SENTENCES,
    tiny_model,
    tiny_tokenizer,
)

from recipes.commands.synthesize import Config, refuse_words
from recipes.config import ConfigError
from slm.generation import SpeechLM, SynthesizeOutput, generate_speech, stream_speech
from slm.model.speech_rows import extend_with_speech
from slm.settings import GenerationError, SpeechLimits, SynthesizeSettings, word_limits
from slm.tasks import TaskError, get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import example_length, make_example, make_prompt
from slm.tasks.tts_aligned import word_ids
from slm.training.config import TrainingConfig
from slm.training.samples import NoiseConfig, SpeechSamples
from slm.training.train import train
from slm.vocabulary import SpeechVocabulary, add_marks, add_speech

TASK = get_task("tts-aligned")
GREEDY = SynthesizeSettings(temperature=0)
RATE = 12.5


def codes_of_word(word: str) -> np.ndarray:
    """(1, F) codes that say a word: other words have others, and other lengths."""
    return np.array([[(ord(c) * 5 + k) % CODES for k, c in enumerate(word + "-")]])


def spoken(encode, text: str) -> UtteranceTokens:
    codes = [codes_of_word(word) for word in text.split()]
    frames = [part.shape[1] for part in codes]
    return UtteranceTokens(
        np.concatenate(codes, axis=1), encode(text), words=word_ids(encode, text), word_frames=frames
    )


def asked(encode, text: str) -> UtteranceTokens:
    return UtteranceTokens(text=encode(text), words=word_ids(encode, text))


def vocabulary_of(tokenizer, books: int = 1) -> SpeechVocabulary:
    return add_speech(tokenizer, [CODES, CODES], n_codebooks=books, frame_rate=RATE, marks=TASK.marks)


def test_a_word_stands_in_front_of_its_codes_and_loss_is_on_codes_and_their_ends_alone() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    vocabulary = vocabulary_of(tokenizer)
    one = spoken(lambda text: vocabulary.encode_text(tokenizer, text), "bin blue at")
    example = make_example(vocabulary, TASK, one)
    expected: list[int] = [*vocabulary.before, vocabulary.mark_id("<|synthesize-aligned|>"), *vocabulary.between]
    learnt = [False] * len(expected)
    for ids, word in zip(one.words, ["bin", "blue", "at"], strict=True):
        codes = vocabulary.ids_from_codes(codes_of_word(word))
        expected += [*ids, vocabulary.speech_id, *codes, vocabulary.speech_end_id]
        learnt += [False] * (len(ids) + 1) + [True] * (len(codes) + 1)
    assert example.input_ids.tolist() == [*expected, vocabulary.end_id]
    assert (example.labels != -100).tolist() == [*learnt, False]
    kept = example.labels != -100
    assert np.array_equal(example.labels[kept], example.input_ids[kept])
    assert example_length(vocabulary, TASK, one) == len(example)
    # The prompt is what stands before the first code, and needs no codes to be made.
    prompt = make_prompt(vocabulary, TASK, UtteranceTokens(words=one.words))
    assert np.array_equal(prompt, example.input_ids[: len(prompt)]) and prompt[-1] == vocabulary.speech_id
    assert int(np.argmax(kept)) == len(prompt)


def test_words_alone_are_the_ids_of_the_whole_text() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = vocabulary_of(tokenizer)
    for text in SENTENCES:
        words = word_ids(lambda part: vocabulary.encode_text(tokenizer, part), text)
        assert len(words) == len(text.split())
        assert np.array_equal(np.concatenate(words), vocabulary.encode_text(tokenizer, text))


def test_samples_keep_the_words_and_noise_leaves_them_as_they_are() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = vocabulary_of(tokenizer, books=2)
    encode = lambda text: vocabulary.encode_text(tokenizer, text)  # noqa: E731
    one = spoken(encode, SENTENCES[0])
    two_books = UtteranceTokens(np.repeat(one.codes, 2, axis=0), one.text, words=one.words, word_frames=one.word_frames)
    samples = SpeechSamples(vocabulary, [two_books], {"tts-aligned": 1.0}, NoiseConfig(0.5, 0.5, drop_prompt=0.9))
    plain = make_example(vocabulary, TASK, two_books)
    assert samples.lengths.tolist() == [len(plain)]
    for seed in (None, 0, 1):
        drawn = samples.example(0, None if seed is None else np.random.default_rng(seed))
        assert np.array_equal(drawn.input_ids, plain.input_ids) and np.array_equal(drawn.labels, plain.labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"word_frames": [1, 2]}, "3 words need a number of frames each"),
        ({"word_frames": [4, 0, 8]}, "1 or more"),
        ({"word_frames": [1, 1, 1]}, "the words have 3 frames, the codes 12"),
        ({"words": None}, "an utterance without text"),
    ],
)
def test_words_that_are_not_the_codes_are_refused(changes: dict, message: str) -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = vocabulary_of(tokenizer)
    one = spoken(lambda text: vocabulary.encode_text(tokenizer, text), "bin blue at")
    assert one.codes.shape[1] == 12
    values = {"codes": one.codes, "text": one.text, "words": one.words, "word_frames": one.word_frames}
    with pytest.raises(TaskError, match=message):
        make_example(vocabulary, TASK, UtteranceTokens(**values | changes))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> SpeechLM:
    """A tiny model that knows four sentences by heart."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen2", len(tokenizer))
    vocabulary = vocabulary_of(tokenizer)
    extend_with_speech(model, vocabulary, seed=0)
    samples = SpeechSamples(
        vocabulary,
        [spoken(lambda text: vocabulary.encode_text(tokenizer, text), text) for text in SENTENCES],
        {"tts-aligned": 1.0},
    )
    settings = TrainingConfig(steps=300, tokens_per_step=512, pack_length=128, learning_rate=1e-2)
    train(model, samples, None, settings, tmp_path_factory.mktemp("run"), seed=0, device="cpu", precision="fp32")
    return SpeechLM(model.eval(), tokenizer, vocabulary)


def say(speech_lm: SpeechLM, texts: list[str], settings: SynthesizeSettings = GREEDY) -> list:
    encode = lambda text: speech_lm.vocabulary.encode_text(speech_lm.text_tokenizer, text)  # noqa: E731
    limits = [word_limits(speech_lm.vocabulary, settings)] * len(texts)
    return generate_speech(speech_lm, TASK, [asked(encode, text) for text in texts], limits, settings, texts)


def test_a_tiny_model_says_the_words_in_their_order(learnt: SpeechLM) -> None:
    for text, said in zip(SENTENCES, say(learnt, SENTENCES), strict=True):
        assert said.finish_reason == "stop"
        expected = np.concatenate([codes_of_word(word) for word in text.split()], axis=1)
        assert np.array_equal(said.codes, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_is_its_singles(learnt: SpeechLM, temperature: float) -> None:
    """Texts of other numbers of words, some unlike what was learnt, so that rows leave the batch one by one."""
    texts = [SENTENCES[0], "now two f", "soon", "place red at nine again please now"]
    settings = SynthesizeSettings(temperature=temperature)
    together = say(learnt, texts, settings)
    alone = [say(learnt, [text], settings)[0] for text in texts]
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one.codes, other.codes) and one.finish_reason == other.finish_reason


def stream(speech_lm: SpeechLM, text: str, settings: SynthesizeSettings, chunk_s: float) -> list[SynthesizeOutput]:
    encode = lambda text: speech_lm.vocabulary.encode_text(speech_lm.text_tokenizer, text)  # noqa: E731
    limits = word_limits(speech_lm.vocabulary, settings)
    return list(stream_speech(speech_lm, TASK, asked(encode, text), limits, settings, text, chunk_s))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_gives_the_codes_of_the_whole_answer(learnt: SpeechLM, temperature: float) -> None:
    """Word after word, a long word in parts; the last chunk tells why the answer ended."""
    settings = SynthesizeSettings(temperature=temperature)
    for text in (SENTENCES[0], "now", "place red at nine again please now"):
        (whole,) = say(learnt, [text], settings)
        chunks = stream(learnt, text, settings, chunk_s=0.1)
        assert np.array_equal(np.concatenate([chunk.codes for chunk in chunks], axis=1), whole.codes)
        assert [chunk.finish_reason for chunk in chunks[:-1]] == ["going"] * (len(chunks) - 1)
        # A word that may be drawn again comes whole; a greedy one is the same each time, and comes in parts.
        assert chunks[-1].finish_reason == whole.finish_reason and len(chunks) >= len(text.split()) + (not temperature)


def with_marks(speech_lm: SpeechLM) -> SpeechLM:
    vocabulary = add_marks(speech_lm.text_tokenizer, speech_lm.vocabulary, TASK.marks)
    extend_with_speech(speech_lm.model, vocabulary, seed=0, first_id=speech_lm.vocabulary.size)
    return SpeechLM(speech_lm.model, speech_lm.text_tokenizer, vocabulary)


def test_no_word_is_skipped_and_none_is_said_for_ever() -> None:
    """A model that would end at once says each word for a frame; one that never ends, each for its limit."""
    texts = ["bin blue at", "now"]
    eager = with_marks(scripted(lambda prompt, answer: None))
    end = eager.vocabulary.speech_end_id
    first = eager.vocabulary.offsets[0]
    eager = with_marks(scripted(lambda prompt, answer: end))
    for text, said in zip(texts, say(eager, texts), strict=True):
        assert said.codes.shape[1] == len(text.split()) and said.finish_reason == "stop"
    endless = with_marks(scripted(lambda prompt, answer: int(first + (7 * len(answer) + len(answer) ** 2) % CODES)))
    settings = SynthesizeSettings(temperature=0, max_word_s=0.4, loop_s=0)
    for text, said in zip(texts, say(endless, texts, settings), strict=True):
        assert said.codes.shape[1] == 5 * len(text.split()) and said.finish_reason == "length"
    # One word alone that does not end: the others are said all the same.
    given = []

    def once(prompt: list[int], answer: list[int]) -> int:
        given.append(prompt)
        return int(first + len(answer) % CODES) if prompt.count(end) == 1 or not answer else end

    said = say(with_marks(scripted(once)), ["bin blue at"], settings)[0]
    assert said.codes.shape[1] == 1 + 5 + 1 and said.finish_reason == "length"
    assert {prompt.count(end) for prompt in given} == {0, 1, 2}
    chunks = stream(with_marks(scripted(once)), "bin blue at", settings, chunk_s=0.2)
    assert np.array_equal(np.concatenate([chunk.codes for chunk in chunks], axis=1), said.codes)
    # The word of five frames comes in parts of two.
    assert [chunk.codes.shape[1] for chunk in chunks if chunk.codes.shape[1]] == [1, 2, 2, 1, 1]
    assert chunks[-1].finish_reason == "length"


@pytest.mark.parametrize("retries", [0, 1, 2])
def test_a_word_that_runs_on_is_drawn_again_and_counted(retries: int) -> None:
    """The second word runs into its limit twice and ends the third time; the others are drawn once."""
    model = with_marks(scripted(lambda prompt, answer: None))
    end, first = model.vocabulary.speech_end_id, int(model.vocabulary.offsets[0])

    def draws_of(speak: Callable[[SpeechLM, SynthesizeSettings], list[SynthesizeOutput]]) -> list[SynthesizeOutput]:
        begun = []

        def script(prompt: list[int], answer: list[int]) -> int:
            if prompt.count(end) == 1 and not answer:
                begun.append(prompt)
            endless = prompt.count(end) == 1 and len(begun) < 3
            return first + len(answer) % CODES if endless or not answer else end

        settings = SynthesizeSettings(temperature=1.0, max_word_s=0.4, loop_s=0, word_retries=retries)
        chunks = speak(with_marks(scripted(script)), settings)
        assert len(begun) == 1 + retries
        return chunks

    (said,) = draws_of(lambda model, settings: say(model, ["bin blue at"], settings))
    assert said.finish_reason == ("stop" if retries == 2 else "length") and said.n_words_redrawn == (retries > 0)
    assert [word.draws for word in said.words] == [1, 1 + retries, 1] and said.attempts == 1
    assert [word.n_frames for word in said.words] == [1, 1 if retries == 2 else 5, 1]
    chunks = draws_of(lambda model, settings: stream(model, "bin blue at", settings, chunk_s=0.1))
    assert np.array_equal(np.concatenate([chunk.codes for chunk in chunks], axis=1), said.codes)
    assert chunks[-1].finish_reason == said.finish_reason


def test_scores_that_are_not_finite_end_the_text_at_their_word() -> None:
    speech_lm = with_marks(scripted(lambda prompt, answer: None))
    end, first = speech_lm.vocabulary.speech_end_id, int(speech_lm.vocabulary.offsets[0])

    def script(prompt: list[int], answer: list[int]) -> int | float:
        return float("nan") if prompt.count(end) == 1 else end if answer else first

    bad = say(with_marks(scripted(script)), ["bin blue at"])[0]
    assert bad.finish_reason == "non_finite" and bad.codes.shape[1] == 1
    chunks = stream(with_marks(scripted(script)), "bin blue at", GREEDY, chunk_s=0.5)
    assert sum(chunk.codes.shape[1] for chunk in chunks) == 1 and chunks[-1].finish_reason == "non_finite"


def test_what_it_cannot_do_is_refused(learnt: SpeechLM) -> None:
    with pytest.raises(GenerationError, match="guidance: tts-aligned gives its words"):
        say(learnt, ["bin"], SynthesizeSettings(guidance=2.0))
    with pytest.raises(GenerationError, match="word_retries -1 must be 0 or more"):
        SynthesizeSettings(word_retries=-1)
    with pytest.raises(GenerationError, match="max_word_s 0 must be above 0"):
        SynthesizeSettings(max_word_s=0)
    encode = lambda text: learnt.vocabulary.encode_text(learnt.text_tokenizer, text)  # noqa: E731
    with pytest.raises(GenerationError, match="guidance: tts-aligned gives its words"):
        next(stream_speech(learnt, TASK, asked(encode, "bin"), SpeechLimits(1.0), SynthesizeSettings(guidance=2.0)))
    with pytest.raises(ConfigError, match="decoding.guidance: tts-aligned"):
        refuse_words(TASK, Config(text="bin", decoding=SynthesizeSettings(guidance=2.0)))
