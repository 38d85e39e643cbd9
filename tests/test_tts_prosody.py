"""TTS with prosody tokens: bins, their ids, what is learnt, that each word gets its three, and what a user may ask."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from slm_scripted import scripted
from slm_tiny import CODES, SENTENCES, metadata, save_llm, tiny_model, tiny_tokenizer, write_corpus
from typer.testing import CliRunner

from recipes import cli
from recipes.commands.synthesize import Config
from recipes.config import ConfigError, from_values
from recipes.finetuning.prosody import bins_of, prosody_of
from recipes.inference.long_texts import Part
from recipes.inference.prosody import check_emphasis, check_prosody
from recipes.inference.scripts import Script
from slm.corpus import CodedCorpusWriter
from slm.generation import SpeechLM, draw_prosody, generate_speech, stream_speech
from slm.prosody import ProsodyBins, ProsodyControl, ProsodyError
from slm.settings import GenerationError, SpeechLimits, SynthesizeSettings
from slm.speech_rows import extend_with_speech
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


def column(*words: tuple[str, float, float | None, float]) -> str:
    return json.dumps([dict(zip(("word", "duration", "f0", "energy"), word, strict=True)) for word in words])


def test_the_column_gives_each_word_of_the_normalised_text_its_values():
    read = lambda text: text.lower().replace("-", " ").replace(".", "").strip()  # noqa: E731
    two = column(("Twenty-one", 0.1, None, 2), ("...", 9, 9, 9), ("now.", 0.3, 1, -2))
    found = prosody_of(two, "twenty one now", read, "u")
    assert np.array_equal(found, [[0.1, NAN, 2], [0.1, NAN, 2], [0.3, 1, -2]], equal_nan=True)
    assert prosody_of(two, "twenty two now", read, "u") is None and prosody_of("", "now", read, "u") is None
    for wrong in ('{"word": 1}', column(("now", NAN, 1, 1)), '[{"word": "now"}]'):
        with pytest.raises(ConfigError, match="u7: its column prosody is no list .*`slm measure-prosody` writes one"):
            prosody_of(wrong, "now", read, "u7")
    assert bins_of([two, ""], 2, "corpus").edges[1] == (5.0,)
    with pytest.raises(ConfigError, match="corpus: no utterance of its train split has prosody"):
        bins_of([""], 2, "corpus")


def write_measured(folder: Path, n_test_shift: float = 0.0) -> Path:
    """A coded corpus with the column `prosody`; one train row says another text, one is not measured."""
    writer = CodedCorpusWriter(folder, metadata(columns=["prosody"]))
    for split, n in (("train", 6), ("valid", 4), ("test", 4)):
        rows = []
        for i in range(n):
            words, text = SENTENCES[i % 4].split(), SENTENCES[i % 4]
            bins = [prosody_of_word(word) for word in words]
            shift = n_test_shift if split == "test" else 0.0
            values = [
                (word, own[0] - 1.5 + shift, None if own[1] == 4 else own[1] - 1.5, own[2] - 1.5)
                for word, own in zip(words, bins, strict=True)
            ]
            book = np.concatenate([codes_of_word(*pair) for pair in zip(words, bins, strict=True)], axis=1)
            prosody = {4: column(*values[1:]), 5: ""}.get(i, column(*values))
            row = {"id": f"{split}{i}", "text": text, "speaker": "s", "duration": book.shape[1] / 12.5}
            rows.append(row | {"audio_codes": np.repeat(book, 2, axis=0), "columns": {"prosody": prosody}})
        writer.write_shard(split, 0, 1, rows)
    writer.finish()
    return folder


def test_from_a_measured_corpus_to_a_model_that_keeps_its_bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    corpus, llm = write_measured(tmp_path / "codes"), save_llm(tmp_path / "llm")

    def slm(*words: str, code: int = 0) -> str:
        found = CliRunner().invoke(cli.app, list(words))
        assert found.exit_code == code, found.output
        return " ".join(found.output.split())

    common = ["finetune", "precision=fp32", "task_weights={tts-prosody: 1}", "prosody_bins=3"]
    training = "training={steps: 3, tokens_per_step: 512, pack_length: 160}"
    told = slm(*common, training, f"model={llm}", f"corpus={corpus}", "run_dir=slm")
    assert "train: 2 utterances whose column prosody does not say their text" in told
    bins = SpeechLM.load("slm/model").vocabulary.prosody
    assert bins.n == 3
    # The test split has no say in where bins are cut, and a model that has some keeps them.
    other = write_measured(tmp_path / "other", n_test_shift=9.0)
    slm(*common, training, f"model={llm}", f"corpus={other}", "run_dir=other-slm")
    assert SpeechLM.load("other-slm/model").vocabulary.prosody == bins
    slm(*common, training, "model=slm/model", f"corpus={other}", "run_dir=again")
    assert SpeechLM.load("again/model").vocabulary.prosody == bins
    refused = slm(*common[:3], "model=slm/model", f"corpus={corpus}", "run_dir=more", "prosody_bins=5", code=2)
    assert "prosody_bins: the model slm/model was made with 3, not 5" in refused
    delayed = [*common, f"model={llm}", f"corpus={corpus}", "run_dir=delayed", "n_codebooks=2", "pattern=delay"]
    assert "pattern: tts-prosody writes prosody" in slm(*delayed, code=2)
    plain = [*common, f"model={llm}", f"corpus={write_corpus(tmp_path / 'plain')}", "run_dir=plain-slm"]
    refused = slm(*plain, code=2)
    assert "tts-prosody reads prosody" in refused and "encode it with data.0.columns=[prosody]" in refused


def test_a_user_s_wish_goes_from_the_command_line_into_the_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Path, make_corpus: Callable[..., Path]
):
    monkeypatch.chdir(tmp_path)
    manifest = make_corpus(3)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        words = [(word, 0.1 * i, None if i else 0.5, 0.2) for i, word in enumerate(["text", row["id"][-1]])]
        row["prosody"] = json.loads(column(*words))
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def slm(*words: str, code: int = 0) -> str:
        found = CliRunner().invoke(cli.app, list(words))
        assert found.exit_code == code, found.output
        return " ".join(found.output.split())

    source = f"data=[{{path: {manifest}, columns: [prosody]}}]"
    slm("encode", "run_dir=codes", f"tokenizer={tiny_tokenizer}", source, "precision=fp32", "num_workers=0")
    learn = "training={steps: 2, tokens_per_step: 512, pack_length: 128}"
    tasks = "task_weights={tts-prosody: 1, tts: 1}"
    slm("finetune", "run_dir=slm", "corpus=codes", f"model={save_llm(Path('llm'))}", tasks, learn, "precision=fp32")
    say = ["synthesize", "task=tts-prosody", "model=slm/model", "corpus=codes", "split=train"]
    say += ["decoding.min_seconds=0.5", "decoding.seconds_per_character=0.01"]
    slm(*say, "run_dir=plain")
    slm(*say, "run_dir=asked", "prosody.speed=+2", "prosody.emphasis=[Text]", "prosody.emphasis_bins=1")

    def lines(run: str) -> list[dict]:
        return [json.loads(line) for line in (Path(run) / "predictions.jsonl").read_text().splitlines()]

    for number, plain, wish in zip(("zero", "one", "two"), lines("plain"), lines("asked"), strict=True):
        assert [one["word"] for one in plain["prosody"]] == ["text", number]
        for own, other in zip(plain["prosody"], wish["prosody"], strict=True):
            raised = own["word"] == "text"
            assert other["duration"] == min(7, max(0, own["duration"] - 2 + raised))
            assert other["energy"] == min(7, own["energy"] + raised)
            assert other["f0"] is None if own["f0"] is None else other["f0"] == min(7, own["f0"] + raised)
    facts = json.loads(Path("asked/predictions.json").read_text())
    assert facts["prosody"] == {"speed": 2, "emphasis": ["Text"], "emphasis_bins": 1}
    text = ["synthesize", "text one", "model=slm/model", "prosody.emphasis=[blue]"]
    assert "'blue' is no word of what is said (one text)" in slm(*text, "task=tts-prosody", code=2)
    assert "prosody: tts writes no prosody" in slm(*text, code=2)
    slm("generate", "task=tts-prosody", "text one", "model=slm/model", "-o", "a.wav", "options.prosody={speed: slow}")


def test_the_shipped_configuration_is_of_this_task(tmp_path: Path):
    corpus = write_measured(tmp_path / "codes")
    words = ["finetune", "--config", "baselines/prosodylm", f"corpus={corpus}", f"run_dir={tmp_path / 'run'}"]
    found = CliRunner().invoke(cli.app, [*words, "speech_rows=noise", "--dry-run"])
    assert found.exit_code == 0, found.output
