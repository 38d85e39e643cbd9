"""How a task is asked for beside its marks: wordings, language tags, the share of a prompt that is continued."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from slm_tiny import CODES, SENTENCES, metadata, save_llm, tiny_tokenizer, tokens_of, utterances, write_corpus

from recipes.commands import finetune, transcribe
from recipes.config import ConfigError, from_values
from slm.corpus import CodedCorpusWriter
from slm.generation import SpeechLM, transcribe_codes
from slm.model.modeling import describe_llm
from slm.tasks import TaskError, get_task
from slm.tasks.continuation import CONTINUE, split_codes
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import make_example, make_prompt
from slm.tasks.styles import PromptsConfig, PromptStyles, language_mark, trained_wording, wording_ids
from slm.trained_on import TrainedOn
from slm.training.samples import NoiseConfig, SpeechSamples
from slm.vocabulary import add_speech

SAID = "Write down what is said."
QUICK = {"steps": 150, "tokens_per_step": 512, "pack_length": 128, "learning_rate": 5e-3}


def finetuned(tmp_path: Path, corpus: Path, **values: object) -> Path:
    """The folder of the tiny LLM, fine-tuned for ASR by the recipe unless told otherwise."""
    common = {"run_dir": str(tmp_path / "run"), "corpus": str(corpus), "model": str(save_llm(tmp_path / "llm"))}
    common |= {"task_weights": {"asr": 1.0}, "noise": {"replace": 0.0, "drop": 0.0}, "training": QUICK}
    return finetune.run(from_values(finetune.Config, common | {"precision": "fp32"} | values))


def transcribed(model: Path, corpus: Path, run_dir: Path, **values: object) -> list[dict]:
    """The lines of predictions for a corpus's test split."""
    values = {"model": str(model), "corpus": str(corpus), "run_dir": str(run_dir)} | values
    path = transcribe.run(from_values(transcribe.Config, values))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_task_without_a_choice_draws_nothing() -> None:
    """The noise of a task that is asked for by its marks alone is what it would be without any style."""
    tokenizer = tiny_tokenizer()
    vocabulary = add_speech(tokenizer, [CODES])
    rows, noise = tokens_of(vocabulary, tokenizer, utterances()), NoiseConfig(replace=0.3, drop=0.3)
    words = [wording_ids(vocabulary, tokenizer, wording) for wording in ("Say:", "Read aloud:")]
    styles = PromptStyles({"tts": words})
    samples = SpeechSamples(vocabulary, rows, {"asr": 1.0, "tts": 1.0}, noise, styles=styles)
    for index in np.flatnonzero(samples.tasks == 0):
        rng = np.random.default_rng(index)
        change = lambda codes, rng=rng: noise.apply(codes, vocabulary.codebook_sizes, rng)  # noqa: E731
        expected = make_example(vocabulary, get_task("asr"), samples.utterances[samples.members[index]], change)
        found = samples.example(index, np.random.default_rng(index))
        assert np.array_equal(found.input_ids, expected.input_ids)
        assert np.array_equal(found.labels, expected.labels)


def test_wordings_are_drawn_and_the_first_is_measured() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = add_speech(tokenizer, [CODES])
    words = [wording_ids(vocabulary, tokenizer, wording) for wording in (SAID, "", "Transcribe.")]
    rows = tokens_of(vocabulary, tokenizer, utterances(1))
    samples = SpeechSamples(vocabulary, rows, {"asr": 1.0}, styles=PromptStyles({"asr": words}))
    plain = SpeechSamples(vocabulary, rows, {"asr": 1.0}).example(0, None)
    before = len(vocabulary.before)
    with_wording = [np.concatenate([plain.input_ids[:before], ids, plain.input_ids[before:]]) for ids in words]
    counts: Counter[int] = Counter()
    for seed in range(60):
        example = samples.example(0, np.random.default_rng(seed))
        (number,) = [n for n, ids in enumerate(with_wording) if np.array_equal(ids, example.input_ids)]
        assert (example.labels != -100).sum() == (plain.labels != -100).sum()
        counts[number] += 1
    assert set(counts) == {0, 1, 2}
    assert np.array_equal(samples.example(0, None).input_ids, with_wording[0])
    assert samples.lengths[0] == max(map(len, with_wording))
    assert np.array_equal(make_prompt(vocabulary, get_task("asr"), samples.asked(get_task("asr"), 0)),
                          with_wording[0][: -(plain.labels != -100).sum()])  # fmt: skip


def test_a_chat_template_stands_around_wording_and_tag() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    vocabulary = add_speech(tokenizer, [CODES], marks=["<|de|>"])
    utterance = UtteranceTokens(
        codes=np.array([[1, 2]]), wording=wording_ids(vocabulary, tokenizer, SAID), language="<|de|>"
    )
    text = tokenizer.decode(make_prompt(vocabulary, get_task("asr"), utterance))
    assert text == (
        f"<|bos|>user\n{SAID}\n<|speech|><|speech_0_1|><|speech_0_2|><|/speech|><|transcribe|><|de|><|eos|>\n"
        "<|bos|>assistant\n"
    )
    bare = tokenizer.decode(make_prompt(vocabulary, get_task("asr"), utterance, bare=True))
    assert bare == "<|bos|>user\n<|transcribe|><|de|><|eos|>\n<|bos|>assistant\n"


def test_a_continuation_is_cut_at_a_drawn_share() -> None:
    tokenizer = tiny_tokenizer()
    task = get_task("continuation")
    vocabulary = add_speech(tokenizer, [CODES, CODES], n_codebooks=2, marks=task.marks)
    rows = tokens_of(vocabulary, tokenizer, utterances(1))
    samples = SpeechSamples(vocabulary, rows, {"continuation": 1.0}, styles=PromptStyles(share=(0.25, 0.75)))
    frames, cuts = rows[0].codes.shape[1], set()
    for seed in range(40):
        example = samples.example(0, np.random.default_rng(seed))
        assert len(example) == samples.lengths[0]
        names = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
        first = names.index("<|/speech|>") - names.index("<|speech|>") - 1
        assert names[names.index(CONTINUE) + 1] == "<|speech|>" and first % 2 == 0
        codes = [i for i, name in zip(example.input_ids, names, strict=True) if name.startswith("<|speech_")]
        assert np.array_equal(vocabulary.codes_from_ids(codes), rows[0].codes)
        assert (example.labels != -100).sum() == 2 * frames - first + 2  # the end of speech, and of the answer
        cuts.add(first // 2)
    assert cuts == set(range(round(frames * 0.25), round(frames * 0.75) + 1))
    middle = tokenizer.convert_ids_to_tokens(samples.example(0, None).input_ids.tolist())
    assert middle.index("<|/speech|>") - middle.index("<|speech|>") - 1 == 2 * round(frames / 2)
    # What is to be continued is all there is: nothing of it is held back.
    whole = make_prompt(vocabulary, task, UtteranceTokens(codes=rows[0].codes))
    assert (whole >= vocabulary.offsets[0]).sum() - 1 == 2 * frames  # the mark of the task lies behind the codes


@pytest.mark.parametrize(
    ("frames", "share", "first"), [(1, 0.5, 1), (2, 0.01, 1), (2, 0.99, 1), (9, 0.5, 4), (9, 1, 9)]
)
def test_both_parts_of_a_cut_get_a_frame_where_there_are_two(frames: int, share: float, first: int) -> None:
    before, after = split_codes(np.arange(frames)[None], share)
    assert before.shape[1] == first and np.concatenate([before, after], axis=1).tolist() == [list(range(frames))]


def test_a_model_keeps_its_wordings_and_is_asked_in_the_first(tmp_path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    model = finetuned(tmp_path, corpus, prompts={"wordings": {"asr": [SAID, ""]}}, eval_transcripts=2)
    assert describe_llm(str(model)).vocabulary.trained_on.wordings == (("asr", (SAID, "")),)
    asked: list[str] = []
    tokenizer = describe_llm(str(model)).tokenizer

    def spy(speech_lm, task, prompts, *rest):
        asked.extend(tokenizer.decode(make_prompt(speech_lm.vocabulary, task, one)) for one in prompts)
        return generate(speech_lm, task, prompts, *rest)

    generate = transcribe.generate_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transcribe, "generate_text", spy)
        for name, wording, begins in (("first", None, SAID), ("marks", "", "<|speech|>"), ("other", "Hm?", "Hm?")):
            asked.clear()
            lines = transcribed(model, corpus, tmp_path / name, wording=wording)
            assert all(text.removeprefix("<|bos|>").startswith(begins) for text in asked) and len(asked) == 4
            if wording != "Hm?":  # which it has never met
                assert [line["hypothesis"] for line in lines] == SENTENCES
    speech_lm, codes = SpeechLM.load(model), [row["audio_codes"] for row in utterances(4, seed=2)]
    with pytest.MonkeyPatch.context() as patch:
        spied = "slm.generation.text.make_prompt"
        patch.setattr(spied, lambda *given: asked.append(given[2].wording) or make_prompt(*given))
        asked.clear()
        assert [output.text for output in transcribe_codes(speech_lm, codes)] == SENTENCES
        assert [tokenizer.decode(wording) for wording in asked] == [f"{SAID}\n"] * 4
    wording = trained_wording(speech_lm.vocabulary, tokenizer, get_task("asr"))
    assert tokenizer.decode(wording) == f"{SAID}\n"
    assert trained_wording(speech_lm.vocabulary, tokenizer, get_task("tts")) is None
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["eval_asr_wer"] for row in metrics if "eval_asr_wer" in row][-1] == 0.0


def two_languages(folder: Path) -> Path:
    """Each utterance twice, the same speech: translated into `de` its words turn round, into `fr` the first stays."""
    columns = ["translation", "into"]
    writer = CodedCorpusWriter(folder, metadata(columns=columns))
    for split in ("train", "valid", "test"):
        rows = []
        for row in utterances(4):
            words = row["text"].split()
            for language, text in (("de", " ".join(words[::-1])), ("fr", words[0])):
                filled = {"translation": text, "into": language}
                rows.append(row | {"id": f"{row['id']}-{language}", "columns": filled})
        writer.write_shard(split, 0, 1, rows)
    writer.finish()
    return folder


def test_the_tag_of_a_language_decides_what_is_written(tmp_path, caplog) -> None:
    corpus = two_languages(tmp_path / "corpus")
    values = {"task_weights": {"st": 1.0}, "prompts": {"languages": {"st": "into"}}}
    model = finetuned(tmp_path, corpus, **values)
    vocabulary = describe_llm(str(model)).vocabulary
    assert vocabulary.token_names()[-3:] == ["<|translate|>", "<|de|>", "<|fr|>"]
    lines = transcribed(model, corpus, tmp_path / "own", task="st")
    assert [line["hypothesis"] for line in lines] == [line["reference"] for line in lines] and len(lines) == 8
    lines = transcribed(model, corpus, tmp_path / "fr", task="st", language="fr")
    assert [line["hypothesis"] for line in lines] == [text.split()[0] for text in SENTENCES for _ in range(2)]
    assert "tag of a language" not in caplog.text
    plain = write_corpus(tmp_path / "plain", columns=["translation"])
    transcribed(model, plain, tmp_path / "none", task="st")
    assert "st was trained with the tag of a language, which nothing says here: give language=" in caplog.text
    with pytest.raises(ConfigError, match=r"language 'nl': the model has no <\|nl\|>; fine-tune it"):
        transcribed(model, corpus, tmp_path / "nl", task="st", language="nl")


def test_mistakes_are_told_with_the_way_out(tmp_path) -> None:
    corpus = write_corpus(tmp_path / "corpus", columns=["translation"])
    common = {"corpus": str(corpus), "model": str(save_llm(tmp_path / "llm")), "run_dir": str(tmp_path / "run")}

    def refused(**prompts: object) -> str:
        with pytest.raises(ConfigError) as error:
            finetune.plan(from_values(finetune.Config, common | {"prompts": prompts}))
        return str(error.value)

    assert "prompts.wordings: st is not trained; set its task_weights" in refused(wordings={"st": ["Translate."]})
    assert "prompts.wordings.asr: give at least one" in refused(wordings={"asr": []})
    assert "prompts.share: 0.8 and 0.2 must be above 0 and below 1" in refused(share=[0.8, 0.2])
    found = refused(languages={"asr": "language"})
    assert "prompts.languages: asr reads language, and corpus" in found and "data.0.columns=[language]" in found
    found = refused(languages={"asr": "translation"})
    assert "'green with k" in found or "is no code of a language; write it as de, yue or pt-BR" in found
    with pytest.raises(TaskError, match="'Deutsch' is no code of a language"):
        language_mark("Deutsch")
    assert [language_mark(code) for code in ("de", "yue", "pt-BR")] == ["<|de|>", "<|yue|>", "<|pt-BR|>"]


def test_what_a_model_was_asked_outlives_a_save() -> None:
    facts = TrainedOn("ab", 5, 1.0, (1.0, 2.0, 3.0), wordings=(("asr", (SAID, "")),), languages=(("asr", "language"),))
    assert TrainedOn(**json.loads(json.dumps(dataclasses.asdict(facts)))) == facts
    assert PromptsConfig().share == PromptStyles().share
