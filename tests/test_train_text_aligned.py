"""Training a text-aligned model: its samples, resume, what is refused, the folder and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from slm_tiny import FINGERPRINT, SENTENCES, metadata
from test_slm_training import Poison
from test_text_aligned import ITEMS, SIZES, config_of
from typer.testing import CliRunner

from recipes import cli
from recipes.commands import train_text_aligned as command
from slm.corpus import CodedCorpusWriter
from slm.text_aligned.configuration import TextAlignedError, TextAlignedSizes
from slm.text_aligned.decoding import encode_words
from slm.text_aligned.modeling import (
    TextAlignedModel,
    load_text_aligned_model,
    new_text_aligned_model,
)
from slm.text_aligned.samples import Item, TextAlignedSamples
from slm.text_aligned.training import TextAlignedTraining, train_text_aligned
from slm.training.config import TrainingError


def test_samples_are_drawn_from_seed_and_number_alone() -> None:
    samples = TextAlignedSamples(ITEMS, 100, text_alone=0.5, seed=3)
    drawn = [samples[number] for number in range(16)]
    again = TextAlignedSamples(ITEMS, 100, text_alone=0.5, seed=3)
    assert [again[number] for number in reversed(range(16))] == drawn[::-1]
    assert all({id(item) for item, _ in drawn[start : start + 8]} == set(map(id, ITEMS)) for start in (0, 8))
    assert 0 < sum(with_speech for _, with_speech in drawn) < 16


def test_a_resumed_training_is_an_uninterrupted_one(tmp_path: Path) -> None:
    def train(folder: str, steps: int) -> TextAlignedModel:
        settings = TextAlignedTraining(steps=steps, batch_size=4, learning_rate=1e-3, warmup_steps=0, save_steps=3)
        model = new_text_aligned_model(config_of(dropout=0.1, quantizer_warmup_steps=4), seed=1)
        trainer = train_text_aligned(model, ITEMS, ITEMS[:2], settings, tmp_path / folder, seed=1)
        return trainer.accelerator.unwrap_model(trainer.model)

    whole = train("whole", 6)
    checkpoints = tmp_path / "cut"
    (tmp_path / "whole").rename(checkpoints)
    newest = checkpoints / "checkpoint-6"
    (newest / "model.safetensors").write_bytes(b"torn")  # as a kill leaves it
    resumed = train("cut", 6)
    assert int(resumed.quantizer.n_steps) == 4  # the warm-up was cut at its third step
    for name, one in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], one, atol=1e-5, rtol=1e-4, msg=name)
    assert list(checkpoints.glob("torn-checkpoint-6*"))


def test_steps_that_are_never_finite_stop_the_training(tmp_path: Path) -> None:
    model, settings = new_text_aligned_model(config_of(), seed=0), TextAlignedTraining(steps=9, batch_size=4)
    with pytest.raises(FloatingPointError, match="5 steps in a row, to step 6"):
        train_text_aligned(model, ITEMS, [], settings, tmp_path, callbacks=[Poison(range(2, 99))])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "sizes.heads"),
        ({"value_layer": 4}, "sizes.value_layer: 4 must lie in 0 to speech_layers"),
        ({"word_books": 0}, "sizes.word_books"),
        ({"dropout": 1.0}, "sizes.dropout"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(TextAlignedError, match=message):
        TextAlignedSizes(**changes)


def test_a_training_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(TrainingError, match="training.text_alone"):
        TextAlignedTraining(text_alone=1.5)
    with pytest.raises(TrainingError, match="training.alignment_weight"):
        TextAlignedTraining(alignment_weight=-1)
    with pytest.raises(TrainingError, match="training.quantizer_warmup_steps"):
        TextAlignedTraining(quantizer_warmup_steps=-1)


def test_a_model_folder_is_loaded_again_and_others_are_refused(tmp_path: Path) -> None:
    model = new_text_aligned_model(config_of(), seed=0).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = load_text_aligned_model(tmp_path / "model")
    assert np.array_equal(encode_words(loaded, ITEMS)[0], encode_words(model, ITEMS)[0])
    with pytest.raises(TextAlignedError, match="reads the codes of tokenizer"):
        loaded.config.check_fingerprint("0" * 64, "the corpus")
    with pytest.raises(TextAlignedError, match="has no config.json"):
        load_text_aligned_model(tmp_path)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "qwen2"}), encoding="utf-8")
    with pytest.raises(TextAlignedError, match="no text-aligned model"):
        load_text_aligned_model(tmp_path / "model")


def words_column(item: Item, text: str) -> str:
    spans = (item.spans / 12.5).tolist()
    words = [{"word": word, "start": a, "end": b} for word, (a, b) in zip(text.split(), spans, strict=True)]
    return json.dumps(words)


def write_corpus(folder: Path, aligned: bool = True) -> Path:
    """A corpus whose semantic codes are those of the items, and beside them an acoustic book."""
    writer = CodedCorpusWriter(folder, metadata(columns=["words"] if aligned else []))
    for split in ("train", "valid"):
        rows = []
        for number, item in enumerate(ITEMS):
            text = SENTENCES[number // 2]
            codes = np.stack([item.codes, np.zeros_like(item.codes)])
            rows.append({"id": f"{split}{number}", "text": text, "duration": len(item.codes) / 12.5})
            rows[-1] |= {"audio_codes": codes, "columns": {"words": words_column(item, text)}}
        rows.append(rows[0] | {"id": f"{split}-mute", "text": "..."})
        writer.write_shard(split, 0, 1, rows)
    writer.finish()
    return folder


def sized(sizes: dict) -> list[str]:
    return [f"sizes.{name}={value}" for name, value in sizes.items()]


def test_the_command_trains_and_tells_what_the_words_add(tmp_path: Path) -> None:
    corpus, run_dir = write_corpus(tmp_path / "codes"), tmp_path / "run"
    keys = [f"corpus={corpus}", f"run_dir={run_dir}", "device=cpu", "precision=fp32", *sized(SIZES)]
    keys += ["training.steps=4", "training.batch_size=4", "training.eval_steps=2", "training.alignment_weight=1"]
    planned = CliRunner().invoke(cli.app, ["train-text-aligned", *keys, "--dry-run"])
    assert planned.exit_code == 0 and "words whose frames are known" in planned.output and not run_dir.exists()
    assert CliRunner().invoke(cli.app, ["train-text-aligned", *keys]).exit_code == 0
    model = load_text_aligned_model(run_dir / "model")
    assert model.config.max_frames == max(len(item.codes) for item in ITEMS)
    assert model.config.fingerprint == FINGERPRINT and model.config.word_books == 4
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any("eval_text_alone/loss" in line and "eval_attention_in_word" in line for line in logged)
    complete = json.loads((run_dir / "complete.json").read_text(encoding="utf-8"))
    assert "shuffled/accuracy" in json.dumps(complete)


def test_what_the_command_cannot_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="corpus: not set"):
        command.plan(command.Config(run_dir=str(tmp_path / "run")))
    plain = write_corpus(tmp_path / "codes", aligned=False)
    settings = TextAlignedTraining(alignment_weight=0.5)
    with pytest.raises(ValueError, match="has no column words; make one with `slm align`"):
        command.plan(command.Config(run_dir=str(tmp_path / "run"), corpus=str(plain), training=settings))
    plan = command.plan(command.Config(run_dir=str(tmp_path / "run"), corpus=str(plain)))
    assert plan["words whose frames are known (train)"] == 0
    with pytest.raises(ValueError, match="no utterance with a text and of at most 0.1 s"):
        command.plan(command.Config(run_dir=str(tmp_path / "run"), corpus=str(plain), max_s=0.1))
