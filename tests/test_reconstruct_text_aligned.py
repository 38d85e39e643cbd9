"""The command that rebuilds speech from text and word codes: its files, its ways, its resume, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from slm_tiny import save_llm

from eval.systems import says_texts
from eval.text.normalisers import get_normaliser
from recipes.commands import encode_text_aligned as encode
from recipes.commands import finetune
from recipes.commands import reconstruct_text_aligned as command
from recipes.config import ConfigError
from recipes.finetuning.words import words_of
from recipes.runs.inputs import digest
from recipes.runs.run_folder import RunFolder
from recipes.scoring.predictions import predicted_system, read_predictions
from recipes.text_aligned import written
from slm.corpus import CodedCorpus, CodedCorpusWriter, CorpusMetadata
from slm.generation import SynthesizeOutput
from slm.text_aligned.configuration import TextAlignedConfig, TextAlignedError
from slm.text_aligned.modeling import TextAlignedModel, new_text_aligned_model
from slm.training.config import TrainingConfig
from tokenizer import load_tokenizer

TEXTS = ["bin blue at f two now", "Soon!", "lay red by a nine please", "place green with k one again please now"]
RATE = 12.5
WAYS = ("own", "none", "shuffled")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> tuple[Path, Path]:
    """A coded corpus of the tiny tokenizer and a model of random weights that reads it."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = load_tokenizer(str(tiny_tokenizer))
    fingerprint, sizes = tokenizer.fingerprint("fp32"), list(tokenizer.config.codebook_sizes)
    facts = CorpusMetadata(fingerprint, sizes, RATE, tokenizer.config.sampling_rate, str(tiny_tokenizer))
    writer = CodedCorpusWriter(folder / "codes", facts)
    rng = np.random.default_rng(0)
    rows = []
    for number, text in enumerate(TEXTS):
        codes = rng.integers(0, min(sizes), (len(sizes), 6 + number))
        rows.append({"id": f"u/{number}", "text": text, "duration": codes.shape[1] / RATE, "audio_codes": codes})
    rows.append(rows[0] | {"id": "long", "audio_codes": rng.integers(0, min(sizes), (len(sizes), 30))})
    for split in ("train", "test"):
        writer.write_shard(split, 0, 1, rows)
    writer.finish()
    config = TextAlignedConfig(
        sizes[0], RATE, tokenizer.config.sampling_rate, fingerprint, tokenizer=str(tiny_tokenizer), max_frames=12,
        max_bytes=48, hidden_size=32, heads=2, intermediate_size=64, text_layers=1, speech_layers=1, decoder_layers=1,
        word_codebook_size=16,
    )  # fmt: skip
    model = new_text_aligned_model(config, seed=0)
    model.save_pretrained(folder / "model")
    return folder / "codes", folder / "model"


def config_of(parts: tuple[Path, Path], folder: Path, **changes: object) -> command.Config:
    return command.Config(str(folder), str(parts[1]), str(parts[0]), device="cpu", **changes)


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_rebuilt_is_predictions_that_evaluate_reads(parts: tuple[Path, Path], tmp_path: Path) -> None:
    rows = lines_of(command.run(config_of(parts, tmp_path / "own")))
    assert [row["id"] for row in rows] == [f"u/{number}" for number in range(4)]  # what is too long is left out
    for row, text in zip(rows, TEXTS, strict=True):
        assert row["text"] == text and np.asarray(row["word_codes"]).shape == (4, len(text.split()))
        audio, rate = soundfile.read(tmp_path / "own" / row["audio"])
        assert len(audio) == pytest.approx(row["n_codes"] / RATE * rate, abs=1)
        assert row["truncated"] == ("length" in row["faults"])
    predictions = read_predictions(str(tmp_path / "own"))
    assert predictions.answers == "speech" and predictions.column == "text"
    sidecar = predictions.sidecar
    n_words, seconds = sum(len(text.split()) for text in TEXTS), sum(6 + number for number in range(4)) / RATE
    assert sidecar["bits_per_s"] == pytest.approx(n_words / seconds * 4 * 4, abs=0.1)
    system, notes = predicted_system(predictions, [row["id"] for row in rows], 16_000)
    assert system.kind == "slm-text-aligned" and not notes
    assert system.facts["tokens_per_second"] == pytest.approx(n_words / seconds, abs=0.01)


def test_the_ways_differ_in_their_words_and_are_told_apart(parts: tuple[Path, Path], tmp_path: Path) -> None:
    found = {way: lines_of(command.run(config_of(parts, tmp_path / way, word_codes=way))) for way in WAYS}
    assert all(row["word_codes"] is None for row in found["none"])
    own, dealt = ([column for row in found[way] for column in zip(*row["word_codes"])] for way in ("own", "shuffled"))  # noqa: B905
    assert own != dealt and sorted(own) == sorted(dealt)
    labels = {read_predictions(str(tmp_path / way)).model for way in WAYS}
    assert len(labels) == 3
    fewer = lines_of(command.run(config_of(parts, tmp_path / "fewer", books=2)))
    assert [row["word_codes"] for row in fewer] == [row["word_codes"][:2] for row in found["own"]]


def test_a_killed_run_goes_on_to_the_same_speech(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"decoding": command.RebuildSettings(temperature=1.0, batch_size=2)}
    whole = command.run(config_of(parts, tmp_path / "whole", **settings))
    work, calls = command.rebuild_batch, []

    def once(*arguments: object) -> object:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return work(*arguments)

    monkeypatch.setattr(command, "rebuild_batch", once)
    with pytest.raises(KeyboardInterrupt):
        command.run(config_of(parts, tmp_path / "cut", **settings))
    assert not RunFolder(tmp_path / "cut").complete
    calls.clear()
    resumed = command.run(config_of(parts, tmp_path / "cut", **settings))
    assert lines_of(resumed) == lines_of(whole)
    for row in lines_of(whole):
        assert (tmp_path / "whole" / row["audio"]).read_bytes() == (tmp_path / "cut" / row["audio"]).read_bytes()
    assert command.run(config_of(parts, tmp_path / "cut", **settings)) == resumed  # complete: skipped


def test_samples_that_are_not_finite_fail_their_utterance_alone(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = command.decoded

    def broken(*arguments: object) -> Iterator[np.ndarray]:
        for number, waveform in enumerate(decoded(*arguments)):
            yield np.full_like(waveform, np.nan) if number == 1 else waveform

    monkeypatch.setattr(command, "decoded", broken)
    rows = lines_of(command.run(config_of(parts, tmp_path / "run")))
    assert [row["error"] is None for row in rows] == [True, False, True, True]
    assert rows[1]["audio"] is None and rows[1]["faults"][-1] == "non_finite"
    assert len(list((tmp_path / "run" / "audio").iterdir())) == 3
    assert read_predictions(str(tmp_path / "run")).sidecar["n_failed"] == 1


def test_what_cannot_be_rebuilt_is_named(parts: tuple[Path, Path], tmp_path: Path) -> None:
    assert command.plan(config_of(parts, tmp_path / "run"))["utterances"] == 4
    with pytest.raises(ValueError, match="model: not set(.|\n)*corpus: not set"):
        command.plan(command.Config(str(tmp_path / "run")))
    with pytest.raises(ValueError, match="books: 5 must be 1 to 4"):
        command.plan(config_of(parts, tmp_path / "run", books=5))
    with pytest.raises(TextAlignedError, match="has fingerprint"):
        command.plan(config_of(parts, tmp_path / "run", tokenizer="embedded-25hz"))


@pytest.fixture(scope="module")
def word_corpus(parts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "codes"
    return encode.run(encode.Config(str(folder), str(parts[1]), str(parts[0]), batch_size=3, device="cpu"))


def test_a_corpus_of_word_codes_has_a_frame_per_word(
    parts: tuple[Path, Path], word_corpus: Path, tmp_path: Path
) -> None:
    corpus = CodedCorpus.open(word_corpus)
    facts = corpus.metadata
    assert facts.codebook_sizes == [16] * 4 and facts.fingerprint == digest(parts[1]) and facts.columns == ["words"]
    n_words, seconds = sum(len(text.split()) for text in TEXTS), sum(6 + number for number in range(4)) / RATE
    assert facts.frame_rate == pytest.approx(n_words / seconds, abs=1e-3)
    rows = list(corpus.rows("test"))
    rebuilt = lines_of(command.run(config_of(parts, tmp_path / "own")))
    assert [row["audio_codes"].tolist() for row in rows] == [row["word_codes"] for row in rebuilt]
    normalise = get_normaliser("basic")
    for row in rows:  # each word is one frame to the task that goes word by word
        n_frames = row["audio_codes"].shape[1]
        frames = words_of(
            row["columns"]["words"], normalise(row["text"]), n_frames, facts.frame_rate, normalise, row["id"]
        )
        assert frames == [1] * n_frames


def test_an_slm_writes_word_codes_and_they_become_speech(
    parts: tuple[Path, Path], word_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = save_llm(tmp_path / "llm")
    settings = finetune.Config(
        run_dir=str(tmp_path / "slm"), model=str(llm), corpus=str(word_corpus), task_weights={"tts-aligned": 1.0},
        n_codebooks=4, device="cpu", precision="fp32",
        training=TrainingConfig(steps=2, tokens_per_step=256, pack_length=128),
    )  # fmt: skip
    model = finetune.run(settings)
    asked = {"word_codes": "slm", "speech_lm": str(model)}
    rows = lines_of(command.run(config_of(parts, tmp_path / "said", **asked)))
    assert [np.asarray(row["word_codes"]).shape for row in rows] == [(4, len(text.split())) for text in TEXTS]
    assert all((tmp_path / "said" / row["audio"]).is_file() for row in rows)
    predictions = read_predictions(str(tmp_path / "said"))
    system, _ = predicted_system(predictions, [row["id"] for row in rows], 16_000)
    assert says_texts(system.kind) and {row["task"] for row in rows} == {predictions.sidecar["task"]}
    with pytest.raises(ValueError, match="speech_lm: not set"):
        command.plan(config_of(parts, tmp_path / "none", word_codes="slm"))
    with pytest.raises(ValueError, match="speech_lm: would not be asked"):
        config_of(parts, tmp_path / "none", speech_lm=str(model))
    other = tmp_path / "other"
    new_text_aligned_model(TextAlignedModel.config_class.from_pretrained(parts[1]), seed=1).save_pretrained(other)
    with pytest.raises(ValueError, match="fingerprint"):
        command.plan(config_of((parts[0], other), tmp_path / "none", **asked))
    unsaid = SynthesizeOutput(np.zeros((4, 0), dtype=np.int64), "non_finite")
    monkeypatch.setattr(written, "generate_speech", lambda model, task, spoken, *a: [unsaid] * len(spoken))
    with pytest.raises(ConfigError, match="speech_lm: its scores are not finite for 4 of 4 texts, such as 'u/0'"):
        command.run(config_of(parts, tmp_path / "broken", **asked))
