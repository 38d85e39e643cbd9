"""From an aligned corpus to a model that speaks word by word: the words column, trainings with it, the default task."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from slm_scripted import KNOWN
from slm_tiny import (
    SENTENCES,
    metadata,
    save_llm,
    tiny_model,
    tiny_tokenizer,
    write_corpus,
)
from test_tts_aligned import RATE, TASK, codes_of_word, say, vocabulary_of
from typer.testing import CliRunner

from recipes import cli
from recipes.commands.synthesize import Config
from recipes.config import ConfigError
from recipes.finetuning import config as finetune_config
from recipes.finetuning.corpora import columns_of, open_corpora
from recipes.finetuning.data import make_data
from recipes.finetuning.vocabulary import make_vocabulary
from recipes.finetuning.words import words_of
from recipes.inference import setup
from recipes.inference.tasks import task_name
from recipes.runs.run_folder import RunFolder
from slm.corpus import CodedCorpusWriter
from slm.generation import SpeechLM
from slm.model.modeling import save_slm
from slm.model.speech_rows import extend_with_speech
from slm.settings import SynthesizeSettings
from slm.tasks.sequences import make_example
from tokenizer import load_tokenizer


def column(*words: tuple[str, float, float]) -> str:
    return json.dumps([{"word": word, "start": start, "end": end} for word, start, end in words])


def test_every_frame_is_some_words() -> None:
    read = lambda text: text.lower().replace("-", " ").replace("—", "").replace(".", "").strip()  # noqa: E731
    two = column(("Twenty-one", 0.5, 1.4), ("—", 1.4, 1.5), ("now.", 1.6, 1.9))
    assert words_of(two, "twenty one now", 25, 12.5, read, "u") == [14, 6, 5]
    assert words_of(two, "twenty two now", 25, 12.5, read, "u") is None  # other words than the text
    assert words_of(two, "twenty one now", 2, 12.5, read, "u") is None  # no frame for each
    assert words_of("", "twenty one now", 25, 12.5, read, "u") is None
    at_once = column(("a", 0.0, 0.01), ("b", 0.01, 0.02), ("c", 0.02, 0.03))
    assert words_of(at_once, "a b c", 3, 12.5, read, "u") == [1, 1, 1]
    with pytest.raises(ConfigError, match="u7: its column words is no list of words .*`slm align` writes one"):
        words_of('{"word": 1}', "a", 3, 12.5, read, "u7")


def write_aligned(folder: Path) -> Path:
    """A coded corpus with the column `words`; one train row says another text, one is not aligned."""
    writer = CodedCorpusWriter(folder, metadata(columns=["words"]))
    for split, n in (("train", 6), ("valid", 4), ("test", 4)):
        rows = []
        for i in range(n):
            text, times, start = SENTENCES[i % 4], [], 0
            for word in text.split():
                frames = codes_of_word(word).shape[1]
                times.append((word, start / RATE, (start + frames) / RATE))
                start += frames
            book = np.concatenate([codes_of_word(word) for word in text.split()], axis=1)
            words = {4: column(*times[1:]), 5: ""}.get(i, column(*times))
            row = {"id": f"{split}{i}", "text": text, "speaker": "s", "duration": start / RATE}
            rows.append(row | {"audio_codes": np.repeat(book, 2, axis=0), "columns": {"words": words}})
        writer.write_shard(split, 0, 1, rows)
    writer.finish()
    return folder


def test_from_an_aligned_corpus_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    corpus, llm = write_aligned(tmp_path / "codes"), save_llm(tmp_path / "llm")

    def slm(*words: str, code: int = 0) -> str:
        found = CliRunner().invoke(cli.app, list(words))
        assert found.exit_code == code, found.output
        return " ".join(found.output.split())

    common = ["finetune", f"model={llm}", "precision=fp32", "task_weights={tts-aligned: 1}"]
    training = "training={steps: 250, tokens_per_step: 512, pack_length: 128, learning_rate: 1e-2}"
    told = slm(*common, training, f"corpus={corpus}", "run_dir=slm")
    assert "train: 2 utterances whose column words does not say their text" in told
    speech_lm = SpeechLM.load("slm/model")
    said = say(speech_lm, SENTENCES[:1])[0]
    assert np.array_equal(said.codes, np.concatenate([codes_of_word(w) for w in SENTENCES[0].split()], axis=1))
    # Nobody names the task, nor does the run folder, which knows the model: it may be started again.
    words = ["synthesize", "model=slm/model", f"corpus={corpus}", "tokenizer=embedded-12.5hz", "run_dir=said"]
    monkeypatch.setattr(setup, "speech_tokenizer", lambda config, vocabulary, device: load_tokenizer(config.tokenizer))
    slm(*words)
    assert json.loads(Path("said/predictions.json").read_text())["task"] == "tts-aligned"
    assert "said is complete: skipped" in slm(*words)
    # No word that was learnt is one frame long: most run into such a limit, are drawn again, and are counted.
    for retries, told in ((2, True), (0, False)):
        folder = f"short-{retries}"
        output = slm(*words[:-1], f"run_dir={folder}", "decoding.max_word_s=0.08", f"decoding.word_retries={retries}")
        rows = [json.loads(line) for line in Path(folder, "predictions.jsonl").read_text().splitlines()]
        n = sum(row["n_words_redrawn"] for row in rows)
        assert (n > len(rows)) == told and (n == 0) != told
        assert json.loads(Path(folder, "complete.json").read_text())["summary"]["n_words_redrawn"] == n
        assert (f"{n} words drawn again" in output) == told
    RunFolder("said").check(Config(run_dir="said", model="slm/model", corpus=str(corpus), tokenizer="embedded-12.5hz"))
    refused = slm(*common, f"corpus={corpus}", "run_dir=delayed", "n_codebooks=2", "pattern=delay", code=2)
    assert "pattern: tts-aligned speaks word by word" in refused
    plain = write_corpus(tmp_path / "plain")
    refused = slm(*common, f"corpus={plain}", "run_dir=plain-slm", code=2)
    assert "tts-aligned reads words" in refused and "encode it with data.0.columns=[words]" in refused


def test_beside_other_tasks_what_is_not_aligned_is_left_out_of_this_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two corpora, one with aligned words; and `slm synthesize` says word by word what the model learnt so."""
    monkeypatch.chdir(tmp_path)
    aligned, plain = write_aligned(tmp_path / "codes"), write_corpus(tmp_path / "plain")
    config = finetune_config.Config(
        model=str(save_llm(tmp_path / "llm")),
        corpora=[finetune_config.CorpusSource(str(aligned)), finetune_config.CorpusSource(str(plain))],
        task_weights={"asr": 1.0, "tts": 1.0, "tts-aligned": 1.0},
        speech_rows="noise",
    )
    corpora = open_corpora(config)
    tokenizer = tiny_tokenizer()
    data = make_data(config, corpora, tokenizer, make_vocabulary(config, corpora, tokenizer, None), 2**31)
    n = {name: int((data.train.tasks == i).sum()) for i, name in enumerate(data.train.task_names)}
    assert n == {"asr": corpora.count("train"), "tts": corpora.count("train"), "tts-aligned": 4}
    assert data.vocabulary.trained_on.tasks == ("asr", "tts", "tts-aligned")
    by_word = [i for i, task in enumerate(data.train.tasks) if data.train.task_names[task] == "tts-aligned"]
    for index in by_word:  # each of them has its own words and codes
        utterance = data.train.utterances[data.train.members[index]]
        assert np.array_equal(
            data.train.example(index, None).input_ids, make_example(data.vocabulary, TASK, utterance).input_ids
        )
    # A task by word alone needs a corpus that is aligned.
    alone = dataclasses.replace(config, corpora=config.corpora[1:], task_weights={"asr": 1.0, "tts-aligned": 1.0})
    with pytest.raises(ConfigError, match="tts-aligned reads words"):
        columns_of(alone, open_corpora(alone))


@pytest.mark.parametrize(
    ("tasks", "changes", "expected"),
    [
        (("asr", "tts", "tts-aligned"), {}, "tts-aligned"),
        (("asr", "tts"), {}, "tts"),
        ((), {}, "tts"),  # of a model that does not tell its tasks
        (("tts", "tts-aligned"), {"stream": True}, "tts-aligned"),
        (("tts", "tts-aligned"), {"decoding": SynthesizeSettings(guidance=2.0)}, "tts"),
        (("tts", "tts-aligned"), {"task": "tts"}, "tts"),
    ],
)
def test_who_names_no_task_gets_the_one_that_the_model_learnt(
    tmp_path: Path, tasks: tuple[str, ...], changes: dict, expected: str
) -> None:
    tokenizer = tiny_tokenizer()
    known = dataclasses.replace(KNOWN, tasks=tasks)
    vocabulary = dataclasses.replace(vocabulary_of(tokenizer), trained_on=known)
    model = tiny_model("qwen2", len(tokenizer))
    extend_with_speech(model, vocabulary, seed=0)
    save_slm(model, tokenizer, vocabulary, tmp_path / "model")
    assert task_name(Config(text="bin", model=str(tmp_path / "model"), **changes)) == expected


def test_a_model_that_is_not_there_is_told_with_all_else() -> None:
    assert task_name(Config(text="bin", model="nowhere")) == "tts"


def test_the_shipped_configuration_is_of_this_task(tmp_path: Path) -> None:
    corpus = write_aligned(tmp_path / "codes")
    words = ["finetune", "--config", "baselines/tts-aligned", f"corpus={corpus}", f"run_dir={tmp_path / 'run'}"]
    found = CliRunner().invoke(cli.app, [*words, "speech_rows=noise", "--dry-run"])
    assert found.exit_code == 0, found.output
