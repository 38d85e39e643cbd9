"""`slm cipher-corpus`: the made-up language and the column of its translations; `mt`, and zero-shot `st` beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from slm_tiny import CODES, SENTENCES, save_llm, tiny_tokenizer, translation, write_corpus
from typer.testing import CliRunner

from eval.results_file import load_results
from eval.text.translation import can_score_translations
from recipes import cli
from recipes.commands import cipher_corpus
from recipes.commands.cipher_corpus import SYLLABLES, cipher_word, make_lexicon
from recipes.config import ConfigError
from slm.tasks import get_task
from slm.tasks.registry import UtteranceTokens
from slm.tasks.sequences import IGNORE, make_example
from slm.vocabulary import add_speech
from tokenizer.data.manifest import read_source
from tokenizer.data.utterances import DataSource


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = [
        {"id": f"u{n}", "audio": f"u{n}.wav", "text": text, "split": "test" if n == 3 else "train"}
        for n, text in enumerate(["Bin blue, now.", "bin red now", "", "Set blue 2"])
    ]
    path = tmp_path / "data" / "manifest.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_language_has_one_word_for_each_and_no_two_alike() -> None:
    words = [f"word{n}" for n in range(500)] + ["a", "at", "by"]
    words += [a + b for a in SYLLABLES[:8] for b in SYLLABLES[:8]]  # words that the language might have itself
    lexicon = make_lexicon(words, seed=3)
    assert lexicon == make_lexicon(reversed(words), seed=3)
    assert len(set(lexicon.values())) == len(words) == len(lexicon) and not set(lexicon.values()) & set(words)
    other = make_lexicon(words, seed=4)
    assert sum(lexicon[word] == other[word] for word in words) < 5
    for made in lexicon.values():  # pronounceable: consonant and vowel in turn
        assert {made[i : i + 2] for i in range(0, len(made), 2)} <= set(SYLLABLES)
    assert len({len(lexicon[word]) for word in ("at", "word1", "word499")}) > 1
    few = make_lexicon(words[:20], seed=3)  # hardly any word depends on its company
    assert sum(few[word] != lexicon[word] for word in few) <= 1


def test_two_words_that_would_be_one_draw_anew(monkeypatch) -> None:
    monkeypatch.setattr(
        "recipes.commands.cipher_corpus.cipher_word", lambda word, seed, attempt=0: "bado" if not attempt else word * 2
    )
    assert make_lexicon(["y", "x"], 0) == {"x": "bado", "y": "yy"}
    assert cipher_word("x", 0) != cipher_word("x", 0, 1)


def test_a_manifest_gets_the_column_of_translations(tmp_path, manifest) -> None:
    config = cipher_corpus.Config(str(tmp_path / "out"), [DataSource(path=str(manifest))])
    assert cipher_corpus.plan(config)["utterances"] == 3
    path = cipher_corpus.run(config)
    lexicon = json.loads((tmp_path / "out" / "lexicon.json").read_text(encoding="utf-8"))
    assert set(lexicon) == {"bin", "blue", "now", "red", "set", "two"}
    rows = {row["id"]: row for row in lines_of(path)}
    assert set(rows) == {"u0", "u1", "u3"} and rows["u0"]["text"] == "Bin blue, now."
    assert rows["u0"]["translation"] == " ".join(lexicon[word] for word in ("bin", "blue", "now"))
    assert rows["u3"]["translation"].split()[1] == lexicon["blue"]
    (found,) = read_source(DataSource(path=str(path), columns=["translation"]), "test")
    assert found.columns["translation"] == rows["u3"]["translation"]
    assert Path(found.audio).resolve() == (manifest.parent / "u3.wav").resolve()
    before = path.read_bytes()
    assert cipher_corpus.run(config) == path and path.read_bytes() == before
    manifest.write_text(manifest.read_text(encoding="utf-8").replace("red", "green"), encoding="utf-8")
    with pytest.raises(ConfigError, match="other contents of data"):
        cipher_corpus.run(config)


def test_bad_settings_are_refused_with_the_way_out(tmp_path, manifest) -> None:
    with pytest.raises(ValueError, match="columns names translation, the column that this command writes"):
        cipher_corpus.Config(str(tmp_path / "out"), [DataSource(path=str(manifest), columns=["translation"])])
    twice = [DataSource(path=str(manifest))] * 2
    with pytest.raises(ValueError, match="u0"):
        cipher_corpus.plan(cipher_corpus.Config(str(tmp_path / "out"), twice))


def test_mt_asks_as_st_does_with_text_in_place_of_speech() -> None:
    tokenizer, mt, st = tiny_tokenizer(), get_task("mt"), get_task("st")
    vocabulary = add_speech(tokenizer, [CODES], fingerprint="f" * 64, tokenizer="tiny", marks=[*mt.marks])
    utterance = UtteranceTokens(np.array([[0, 7, 3]]), np.array([60, 61]), {"translation": np.array([50, 51])})
    of_text, of_speech = (make_example(vocabulary, task, utterance) for task in (mt, st))
    for example in (of_text, of_speech):
        assert example.labels[example.labels != IGNORE].tolist() == [50, 51, vocabulary.end_id]
    mark = vocabulary.mark_id("<|translate|>")
    assert of_text.input_ids.tolist().count(mark) == of_speech.input_ids.tolist().count(mark) == 1
    assert [60, 61, mark] == of_text.input_ids[of_text.input_ids.tolist().index(60) :][:3].tolist()
    assert not mt.prompt_holds_speech and vocabulary.speech_id not in of_text.input_ids


def test_a_model_of_asr_and_mt_translates_texts_and_may_be_asked_for_st(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "codes", columns=["translation"])
    training = "{steps: 200, tokens_per_step: 512, pack_length: 128, learning_rate: 5e-3}"

    def slm(*words: str) -> None:
        found = CliRunner().invoke(cli.app, list(words))
        assert found.exit_code == 0, found.output

    slm(
        "finetune", "run_dir=slm", "corpus=codes", f"model={save_llm(Path('llm'))}", "task_weights={asr: 1, mt: 1}",
        f"training={training}", "noise={replace: 0, drop: 0}", "precision=fp32",
    )  # fmt: skip
    for task in ("mt", "st"):
        slm("generate", f"task={task}", "model=slm/model", "corpus=codes", f"run_dir={task}")
        said = lines_of(Path(task, "predictions.jsonl"))
        assert [line["reference"] for line in said] == [translation(text) for text in SENTENCES]
        if task == "mt":
            assert [line["hypothesis"] for line in said] == [translation(text) for text in SENTENCES]
    slm("evaluate", "predictions=[mt, st]", "run_dir=scores", "bootstrap_samples=50")
    of_text, of_speech = load_results("scores").rows
    assert (of_text.name, of_text.wer, of_speech.name) == ("SLM mt", 0.0, "SLM st")
    if can_score_translations():
        assert of_text.translation.bleu == 100.0 and of_speech.translation is not None
