"""TTS with prosody tokens: bins, their ids, what is learnt, that each word gets its three, and what a user may ask."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from slm_scripted import scripted
from slm_tiny import CODES, SENTENCES, tiny_model, tiny_tokenizer

from recipes.commands.synthesize import Config
from recipes.config import ConfigError, from_values
from recipes.inference.long_texts import Part
from recipes.inference.prosody import check_emphasis, check_prosody
from recipes.inference.scripts import Script
from slm.generation import SpeechLM, draw_prosody, generate_speech, stream_speech
from slm.model.speech_rows import extend_with_speech
from slm.prosody import ProsodyBins, ProsodyControl, ProsodyError
from slm.settings import GenerationError, SpeechLimits, SynthesizeSettings
from slm.tasks import TaskError, get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import example_length, make_example, make_prompt
from slm.tasks.tts_aligned import word_ids
from slm.training.config import TrainingConfig
from slm.training.samples import NoiseConfig, SpeechSamples
from slm.training.train import train
from slm.vocabulary import SpeechVocabulary, VocabularyError, add_marks, add_prosody, add_speech

TASK = get_task("tts-prosody")
GREEDY = SynthesizeSettings(temperature=0)
BINS = ProsodyBins(((-0.5, 0.0, 0.5),) * 3)  # four bins, a fifth of words without F0
NAN = float("nan")


def prosody_of_word(word: str, slow: bool = False) -> list[int]:
    return [3 if slow else ord(word[0]) % 3, 4 if word == "f" else ord(word[-1]) % 4, len(word) % 4]


def codes_of_word(word: str, bins: list[int]) -> np.ndarray:
    """(1, F) codes that say a word: the longer its duration bin, the longer."""
    return np.array([[(ord(c) * 5 + bins[1] + 2 * bins[2]) % CODES for c in word[:2] for _ in range(1 + bins[0])]])


def spoken(encode, text: str, slow: bool = False) -> UtteranceTokens:
    bins = [prosody_of_word(word, slow) for word in text.split()]
    codes = [codes_of_word(word, own) for word, own in zip(text.split(), bins, strict=True)]
    words = word_ids(encode, text)
    return UtteranceTokens(np.concatenate(codes, axis=1), encode(text), words=words, prosody=np.array(bins))


def vocabulary_of(tokenizer, books: int = 1) -> SpeechVocabulary:
    vocabulary = add_speech(tokenizer, [CODES, CODES], n_codebooks=books, frame_rate=12.5, marks=TASK.marks)
    return add_prosody(tokenizer, vocabulary, BINS)


def encoder(vocabulary: SpeechVocabulary, tokenizer):
    return lambda text: vocabulary.encode_text(tokenizer, text)


def asked(speech_lm: SpeechLM, text: str, prosody: np.ndarray | None = None) -> UtteranceTokens:
    encode = encoder(speech_lm.vocabulary, speech_lm.text_tokenizer)
    return UtteranceTokens(text=encode(text), words=word_ids(encode, text), prosody=prosody)


def say(speech_lm: SpeechLM, texts: list[UtteranceTokens], settings=GREEDY, keys: list[str] | None = None) -> list:
    return generate_speech(speech_lm, TASK, texts, [SpeechLimits(5.0, 0.1)] * len(texts), settings, keys)


def test_a_stream_writes_the_prosody_first_and_gives_the_codes_of_the_whole_answer(learnt: SpeechLM):
    for text in SENTENCES[2:]:
        for temperature, bins in ((0.0, None), (1.0, None), (0.0, np.full((len(text.split()), 3), 1))):
            one, settings = asked(learnt, text, bins), SynthesizeSettings(temperature=temperature)
            (whole,) = say(learnt, [one], settings, ["a"])
            chunks = list(stream_speech(learnt, TASK, one, SpeechLimits(5.0, 0.1), settings, "a", chunk_s=0.3))
            assert np.array_equal(np.concatenate([chunk.codes for chunk in chunks], axis=1), whole.codes)
            assert chunks[-1].finish_reason == whole.finish_reason and len(chunks) > 2


def test_bins_are_about_equally_frequent_and_words_without_f0_have_their_own():
    values = np.random.default_rng(0).normal(size=(4000, 3))
    values[:100, 1] = NAN
    bins = ProsodyBins.of(values, 8)
    assert bins.n == 8 and bins.sizes == (8, 9, 8) and len(bins.token_names()) == len(set(bins.token_names())) == 25
    cut = bins.cut(values)
    assert (np.bincount(cut[:, 0]) == 500).all() and np.bincount(cut[:, 1])[8] == 100
    assert abs(np.bincount(cut[:, 1])[:8] - 3900 / 8).max() <= 1
    assert (np.diff(cut[np.argsort(values[:, 2]), 2]) >= 0).all()
    assert bins.cut(np.array([[-99.0, 99.0, 0.0]])).tolist()[0][:2] == [0, 7]
    for wrong, message in (
        (lambda: ProsodyBins.of(values, 1), "must be at least 2"),
        (lambda: ProsodyBins.of(np.full((3, 3), NAN), 4), "a value of duration, f0, energy"),
        (lambda: ProsodyBins(((0.0,), (0.0,))), "edges of 2 features"),
        (lambda: ProsodyBins(((1.0, 0.0),) * 3), "must rise"),
    ):
        with pytest.raises(ProsodyError, match=message):
            wrong()


def test_tokens_come_behind_all_others_and_move_none(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    before = add_speech(tokenizer, [CODES], frame_rate=12.5, marks=TASK.marks)
    before.save(tmp_path)
    plain = json.loads((tmp_path / "speech_vocabulary.json").read_text())
    assert "prosody" not in plain  # a model without it is what it was
    after = add_prosody(tokenizer, before, BINS)
    assert {name: after.groups[name] for name in before.groups} == dict(before.groups)
    assert after.size == before.size + 4 + 5 + 4 and after.groups["prosody"].first_id == before.size
    names = tokenizer.convert_ids_to_tokens([int(own[-1]) for own in after.prosody_ids()])
    assert names == ["<|duration_3|>", "<|f0_none|>", "<|energy_3|>"]
    after.save(tmp_path)
    loaded = SpeechVocabulary.load(tmp_path, tokenizer)
    assert loaded == after and loaded.prosody == BINS
    bins = np.array([[0, 4, 3], [2, 1, 0]])
    assert np.array_equal(loaded.prosody_from_ids(loaded.ids_from_prosody(bins)), bins)
    for wrong, message in (
        (lambda: after.ids_from_prosody([[4, 0, 0]]), "outside its feature"),
        (lambda: after.ids_from_prosody([[1, 2]]), r"expected \(W, 3\)"),
        (lambda: before.prosody_ids(), "has no prosody tokens; fine-tune the model on tts-prosody"),
        (lambda: add_prosody(tokenizer, after, BINS), "is taken"),
    ):
        with pytest.raises(VocabularyError, match=message):
            wrong()
    # What a user writes is text.
    assert after.encode_text(tokenizer, "<|duration_3|>").max() < after.first_id


def test_bins_begin_in_order_and_the_rows_of_others_are_what_they_were():
    tokenizer = tiny_tokenizer()
    vocabulary = add_speech(tokenizer, [CODES], marks=TASK.marks)
    plain, model = (tiny_model("llama", len(tokenizer)) for _ in range(2))  # whose head is another table
    extend_with_speech(plain, vocabulary, seed=0)
    larger = add_prosody(tokenizer, vocabulary, BINS)
    extend_with_speech(model, vocabulary, seed=0)
    extend_with_speech(model, larger, seed=0, first_id=vocabulary.size)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(one, get)().weight.detach() for one in (plain, model))
        assert torch.equal(before[: vocabulary.size], after[: vocabulary.size])
        duration, f0, _ = (after[torch.from_numpy(ids)] for ids in larger.prosody_ids())
        steps = torch.cdist(duration, duration)[0]
        assert (steps.diff() > 0).all()  # the further, the less alike
        assert torch.cdist(f0[4:], f0[:4]).min() > steps[1]  # without F0 is no neighbour of a bin


@pytest.mark.parametrize("books", [1, 2])
def test_prosody_stands_between_text_and_speech_and_is_learnt(books: int):
    tokenizer = tiny_tokenizer(chat=True)
    vocabulary = vocabulary_of(tokenizer, books)
    one = spoken(encoder(vocabulary, tokenizer), "bin f at")
    one = UtteranceTokens(np.repeat(one.codes, books, axis=0), one.text, words=one.words, prosody=one.prosody)
    example = make_example(vocabulary, TASK, one)
    prosody, codes = vocabulary.ids_from_prosody(one.prosody), vocabulary.ids_from_codes(one.codes)
    mark = vocabulary.mark_id("<|synthesize-prosody|>")
    prompt = [*vocabulary.before, *one.text, mark, *vocabulary.between]
    answer = [*prosody, vocabulary.speech_id, *codes, vocabulary.speech_end_id, vocabulary.end_id]
    assert example.input_ids.tolist() == [*prompt, *answer]
    labels = [*prosody, -100, *codes, vocabulary.speech_end_id, vocabulary.end_id]
    assert example.labels.tolist() == [-100] * len(prompt) + labels
    assert example_length(vocabulary, TASK, one) == len(example)
    assert make_prompt(vocabulary, TASK, UtteranceTokens(text=one.text)).tolist() == prompt
    samples = SpeechSamples(vocabulary, [one], {"tts-prosody": 1.0}, NoiseConfig(0.5, 0.5))
    drawn = samples.example(0, np.random.default_rng(0))
    assert np.array_equal(drawn.input_ids, example.input_ids) and np.array_equal(drawn.labels, example.labels)
    with pytest.raises(TaskError, match="without prosody"):
        make_example(vocabulary, TASK, UtteranceTokens(one.codes, one.text))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> SpeechLM:
    """A tiny model that knows four sentences by heart, the first two slow too."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("qwen2", len(tokenizer))
    vocabulary = vocabulary_of(tokenizer)
    extend_with_speech(model, vocabulary, seed=0)
    encode = encoder(vocabulary, tokenizer)
    rows = [spoken(encode, text) for text in SENTENCES] + [spoken(encode, text, slow=True) for text in SENTENCES[:2]]
    samples = SpeechSamples(vocabulary, rows, {"tts-prosody": 1.0})
    settings = TrainingConfig(steps=250, tokens_per_step=512, pack_length=128, learning_rate=1e-2)
    train(model, samples, None, settings, tmp_path_factory.mktemp("run"), seed=0, device="cpu", precision="fp32")
    return SpeechLM(model.eval(), tokenizer, vocabulary)


def test_a_tiny_model_writes_the_prosody_and_then_says_it(learnt: SpeechLM):
    texts = [asked(learnt, text) for text in SENTENCES[2:]]
    written = draw_prosody(learnt, TASK, texts, GREEDY)
    for text, bins, said in zip(SENTENCES[2:], written, say(learnt, texts), strict=True):
        expected = spoken(encoder(learnt.vocabulary, learnt.text_tokenizer), text)
        assert np.array_equal(bins, expected.prosody)
        assert said.finish_reason == "stop" and np.array_equal(said.codes, expected.codes)


def test_prosody_that_is_given_is_what_is_said(learnt: SpeechLM):
    encode = encoder(learnt.vocabulary, learnt.text_tokenizer)
    both = [spoken(encode, SENTENCES[0], slow) for slow in (False, True)]
    said = say(learnt, [asked(learnt, SENTENCES[0], one.prosody) for one in both])
    for one, other in zip(both, said, strict=True):
        assert np.array_equal(one.codes, other.codes)
    assert said[1].codes.shape[1] > 1.3 * said[0].codes.shape[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_is_its_singles(learnt: SpeechLM, temperature: float):
    """Texts of other numbers of words, some unlike what was learnt: rows are padded and leave the batch one by one."""
    texts = [SENTENCES[0], "now two f", "soon", "place red at nine again please now"]
    settings = SynthesizeSettings(temperature=temperature)
    every = [asked(learnt, text) for text in texts]
    for one, other, bins, text in zip(
        say(learnt, every, settings, texts),
        [say(learnt, [one], settings, [text])[0] for one, text in zip(every, texts, strict=True)],
        draw_prosody(learnt, TASK, every, settings, texts),
        texts,
        strict=True,
    ):
        alone = draw_prosody(learnt, TASK, [asked(learnt, text)], settings, [text])[0]
        assert np.array_equal(bins, alone) and bins.shape == (len(text.split()), 3)
        assert np.array_equal(one.codes, other.codes) and one.finish_reason == other.finish_reason
        # To give what it writes itself changes nothing.
        assert np.array_equal(say(learnt, [asked(learnt, text, alone)], settings, [text])[0].codes, one.codes)


def with_prosody_tokens(speech_lm: SpeechLM) -> SpeechLM:
    tokenizer = speech_lm.text_tokenizer
    vocabulary = add_prosody(tokenizer, add_marks(tokenizer, speech_lm.vocabulary, TASK.marks), BINS)
    extend_with_speech(speech_lm.model, vocabulary, seed=0, first_id=speech_lm.vocabulary.size)
    return SpeechLM(speech_lm.model, tokenizer, vocabulary)


def test_each_word_gets_its_three_tokens_in_their_order_whatever_the_model_wants():
    texts = ["bin blue at", "now"]
    for wish in ("speech_id", "speech_end_id", "end_id"):
        speech_lm = scripted(lambda prompt, answer: None)
        wanted = getattr(speech_lm.vocabulary, wish)
        speech_lm = with_prosody_tokens(scripted(lambda prompt, answer, wanted=wanted: wanted))
        written = draw_prosody(speech_lm, TASK, [asked(speech_lm, text) for text in texts], GREEDY)
        for text, bins in zip(texts, written, strict=True):
            assert bins.shape == (len(text.split()), 3) and bins.min() >= 0 and (bins < BINS.sizes).all()
    seen = []

    def note(prompt: list[int], answer: list[int]) -> None:
        seen.append(prompt)

    speech_lm = with_prosody_tokens(scripted(note))
    said = say(speech_lm, [asked(speech_lm, "now", np.array([[1, 4, 2]]))])[0]
    ids = speech_lm.vocabulary.ids_from_prosody([[1, 4, 2]]).tolist()
    assert seen[0][-4:] == [*ids, speech_lm.vocabulary.speech_id] and said.codes.shape[1] >= 1


def test_scores_that_are_not_finite_are_told_and_spoil_no_other():
    good = with_prosody_tokens(scripted(lambda prompt, answer: None))
    alone = say(good, [asked(good, "bin blue")])[0]
    broken = asked(good, "now soon").text.tolist()
    speech_lm = with_prosody_tokens(scripted(lambda prompt, answer: float("nan") if broken[0] in prompt else None))
    bad, fine = say(speech_lm, [asked(speech_lm, "now soon"), asked(speech_lm, "bin blue")])
    assert bad.finish_reason == "non_finite" and bad.codes.shape == (1, 0)
    assert fine.finish_reason == alone.finish_reason and np.array_equal(fine.codes, alone.codes)


def test_what_a_user_asks_is_added_within_the_range():
    written = np.array([[0, 1, 2], [7, 8, 7], [3, 3, 3]])
    words = ["a", "b", "a"]

    def applied(emphasised: list[str] = (), **wish) -> list[list[int]]:
        return ProsodyControl(**wish).apply(written, words, 8, emphasised).tolist()

    assert applied() == written.tolist() and not ProsodyControl().asks
    assert applied(speed=2) == applied(speed="fast") == [[0, 1, 2], [5, 8, 7], [1, 3, 3]]
    assert applied(speed="slow") == [[2, 1, 2], [7, 8, 7], [5, 3, 3]]
    assert applied(["a"], emphasis=["A"]) == [[2, 3, 4], [7, 8, 7], [5, 5, 5]]  # both of them
    assert applied(["b"], emphasis=["b"], emphasis_bins=1, speed=1) == [[0, 1, 2], [7, 8, 7], [2, 3, 3]]
    assert from_values(Config, {"text": "x", "prosody": {"speed": "fast", "emphasis": ["x"]}}).prosody.faster == 2
    for wrong in ({"speed": "quick"}, {"emphasis_bins": 0}, {"speed": 1.5}):
        with pytest.raises(ConfigError, match="prosody"):
            from_values(Config, {"text": "x", "prosody": wrong})


def test_what_cannot_be_asked_is_refused(learnt: SpeechLM):
    scripts = [Script("u", "Bin blue.", "Bin blue.", parts=[Part("Bin blue.", "bin blue")])]
    check_emphasis(ProsodyControl(emphasis=["Blue"]), scripts, str.lower)
    with pytest.raises(ConfigError, match=r"'red' is no word of what is said \(bin blue\)"):
        check_emphasis(ProsodyControl(emphasis=["red"]), scripts, str.lower)
    with pytest.raises(ConfigError, match="'bin blue' is not one word"):
        check_emphasis(ProsodyControl(emphasis=["bin blue"]), scripts, str.lower)
    with pytest.raises(ConfigError, match="prosody: tts writes no prosody .* task=tts-prosody"):
        check_prosody(get_task("tts"), ProsodyControl(speed=1), 1.0)
    check_prosody(get_task("tts"), ProsodyControl(), 2.0)
    with pytest.raises(ConfigError, match="decoding.guidance: an answer"):
        check_prosody(TASK, ProsodyControl(), 2.0)
    with pytest.raises(GenerationError, match="tts-prosody begins with prosody"):
        say(learnt, [asked(learnt, "bin")], SynthesizeSettings(guidance=2.0))
    with pytest.raises(GenerationError, match="tts-prosody begins with prosody"):
        next(stream_speech(learnt, TASK, asked(learnt, "bin"), SpeechLimits(1.0), SynthesizeSettings(guidance=2.0)))
    with pytest.raises(TaskError, match="an utterance without words"):
        say(learnt, [UtteranceTokens(text=asked(learnt, "bin").text)])
