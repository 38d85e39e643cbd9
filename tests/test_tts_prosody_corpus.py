"""From a corpus of measured words to a model that writes prosody, and a user's wish on its way to the predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from slm_tiny import SENTENCES, metadata, save_llm, write_corpus
from test_tts_prosody import NAN, codes_of_word, prosody_of_word
from typer.testing import CliRunner

from recipes import cli
from recipes.config import ConfigError
from recipes.finetuning.prosody import bins_of, prosody_of
from slm.corpus import CodedCorpusWriter
from slm.generation import SpeechLM


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
