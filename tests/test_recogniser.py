"""The home-made recogniser: its losses, its folder, and that its training resumes to the same bits."""

from __future__ import annotations

import json
from unittest.mock import MagicMock

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from test_slm_training import Poison
from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoTokenizer

from recipes.commands import train_teacher
from recipes.config import ConfigError, from_values
from recipes.runs.run_folder import RunFolder
from slm.training.checkpoints import SettingsOfThisRun
from tokenizer.data.augmentation import AugmentationConfig
from tokenizer.data.mixing import training_audio
from tokenizer.data.utterances import DataSource
from tokenizer.teacher.recogniser import (
    EOS,
    Recogniser,
    RecogniserConfig,
    character_tokenizer,
    feature_extractor,
    greedy_ctc,
    save_recogniser,
)
from tokenizer.teacher.recogniser_training import TrainingUtterances, greedy_ctc_texts

TINY = RecogniserConfig(hidden_size=64, encoder_layers=1, decoder_layers=1, n_mels=20, window_s=1.0, dropout=0.0)


def labels(*texts: str) -> torch.Tensor:
    encode = character_tokenizer().encode
    rows = [torch.tensor([*encode(text, add_special_tokens=False), EOS]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def test_characters_go_there_and_back():
    tokenizer = character_tokenizer()
    text = "don't stop at six"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.unk_token_id in tokenizer.encode("7", add_special_tokens=False)


def test_greedy_ctc_joins_repeats_and_keeps_doubles_parted_by_a_blank():
    path = torch.tensor([[0, 5, 5, 0, 5, 6, 6, 0]])
    assert greedy_ctc(torch.nn.functional.one_hot(path, 8).float()) == [[5, 5, 6]]


def test_each_loss_moves_its_own_parts():
    torch.manual_seed(0)
    features, target = torch.randn(2, 20, 100), labels("one", "three")
    moved = {}
    for weight in (0.0, 0.5, 1.0):
        model = Recogniser.from_scratch(TINY)
        losses = model(features, target, ctc_weight=weight)
        losses.loss.backward()
        assert torch.isfinite(losses.loss)
        moved[weight] = {
            "head": model.ctc_head.weight.grad.abs().sum() > 0,
            "encoder": model.model.encoder.conv1.weight.grad.abs().sum() > 0,
            "decoder": model.model.decoder.layers[0].fc1.weight.grad is not None,
        }
    assert moved == {
        0.0: {"head": False, "encoder": True, "decoder": True},
        0.5: {"head": True, "encoder": True, "decoder": True},
        1.0: {"head": True, "encoder": True, "decoder": False},
    }


def test_saved_folder_is_a_plain_whisper_with_the_ctc_head_beside(tmp_path):
    torch.manual_seed(0)
    model = Recogniser.from_scratch(TINY).eval()
    save_recogniser(model, tmp_path)
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).eval()
    features = AutoFeatureExtractor.from_pretrained(tmp_path)(
        np.random.default_rng(0).standard_normal(12000), sampling_rate=16000, return_tensors="pt"
    ).input_features
    assert features.shape == (1, 20, 100)
    head = load_file(tmp_path / "ctc_head.safetensors")
    with torch.no_grad():
        hidden = loaded.model.encoder(features).last_hidden_state
        assert torch.allclose(hidden @ head["weight"].T + head["bias"], model.ctc_logits(features), atol=1e-5)
        assert loaded.generate(features, max_new_tokens=5).shape[0] == 1
    assert AutoTokenizer.from_pretrained(tmp_path).decode([6, 7], skip_special_tokens=True)
    assert feature_extractor(model.config).chunk_length == 1


def test_problems_are_told_together():
    with pytest.raises(ValueError, match="hidden_size=100.*ctc_weight=2"):
        RecogniserConfig(hidden_size=100, ctc_weight=2)


def corpus(folder, n: int = 6):
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir()
    rows = []
    for index in range(n):
        soundfile.write(folder / "audio" / f"{index}.wav", 0.1 * rng.standard_normal(8000 + 500 * index), 16000)
        split = "valid" if index == 0 else "train"
        rows.append(
            {"id": str(index), "audio": f"audio/{index}.wav", "text": "One two", "duration": 0.6, "split": split}
        )
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(folder, run_dir, steps=4, **changes):
    return from_values(
        train_teacher.Config,
        {
            "run_dir": str(folder / run_dir),
            "data": [{"path": str(folder / "manifest.jsonl")}],
            "model": {"hidden_size": 64, "encoder_layers": 1, "decoder_layers": 1, "n_mels": 20, "window_s": 1.0},
            "training": {"steps": steps, "batch_size": 2, "save_steps": 2, "validate_steps": 4, "log_steps": 1},
            "precision": "fp32",
            **changes,
        },
    )


def test_resumed_training_equals_uninterrupted_bit_for_bit(tmp_path, monkeypatch):
    corpus(tmp_path)
    whole = load_file(train_teacher.run(config(tmp_path, "whole")) / "model.safetensors")

    class Stop(Exception):
        pass

    from transformers import TrainerCallback

    class StopAfterThree(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise Stop

    real = train_teacher.MetricsCallback
    monkeypatch.setattr(train_teacher, "MetricsCallback", lambda path: StopAfterThree())
    with pytest.raises(Stop):
        train_teacher.run(config(tmp_path, "cut"))
    monkeypatch.setattr(train_teacher, "MetricsCallback", real)
    resumed = load_file(train_teacher.run(config(tmp_path, "cut")) / "model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_steps_that_are_never_finite_stop_the_training(tmp_path, monkeypatch):
    corpus(tmp_path)
    monkeypatch.setattr(train_teacher, "TrainerProgress", lambda name: Poison(range(2, 99)))
    with pytest.raises(FloatingPointError, match="5 steps in a row, to step 6"):
        train_teacher.run(config(tmp_path, "run", steps=9))
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("torn", [False, True])
def test_a_recogniser_to_start_from_that_cannot_be_read_is_an_error(tmp_path, torn):
    """An empty folder, and weights cut short: neither is a start from random weights."""
    corpus(tmp_path)
    (tmp_path / "start").mkdir()
    if torn:
        (tmp_path / "start" / "model.safetensors").write_bytes(b"torn")
        (tmp_path / "start" / "ctc_head.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"init_from=.*start: not a recogniser folder"):
        train_teacher.run(config(tmp_path, "run", init_from=str(tmp_path / "start")))
    assert not (tmp_path / "run" / "model").exists()


def learning_rates(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}


def test_a_complete_run_goes_on_to_more_steps_at_the_longer_schedule(tmp_path):
    """Operational keys differ too. The step after the extension has the longer schedule's rate, not a cosine's end."""
    corpus(tmp_path)
    training = {"batch_size": 2, "save_steps": 2, "validate_steps": 4, "log_steps": 1, "warmup_share": 0.0}
    whole = config(tmp_path, "whole", training={**training, "steps": 6})
    train_teacher.run(whole)
    first = train_teacher.run(config(tmp_path, "grown", training={**training, "steps": 3}))
    before = load_file(first / "model.safetensors")
    free = {"save_steps": 1, "keep_checkpoints": 9, "validate_steps": 5, "num_workers": 1}
    longer = config(tmp_path, "grown", training={**training, **free, "steps": 6})
    after = load_file(train_teacher.run(longer) / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    rates, grown = learning_rates(tmp_path / "whole"), learning_rates(tmp_path / "grown")
    assert list(grown) == [1, 2, 3, 4, 5, 6] and grown[2] < rates[2]
    # the rate that the trainer logs is the one after its step; the step after the resume moved at that of step 3
    assert [grown[step] for step in (4, 5, 6)] == pytest.approx([rates[step] for step in (4, 5, 6)])
    kept = {path.name for path in (tmp_path / "grown/checkpoints").glob("checkpoint-*")}
    assert {f"checkpoint-{step}" for step in (4, 5, 6)} <= kept
    assert json.loads((tmp_path / "grown/complete.json").read_text())["summary"]["steps"] == 6
    with pytest.raises(ConfigError, match="training.steps: was 6, is now 4, .* reached step 6"):
        train_teacher.run(config(tmp_path, "grown", training={**training, "steps": 4}))


def test_the_first_step_after_an_extension_has_the_longer_schedules_rate():
    """A cosine over 3 steps ends at 0: with that rate, which the checkpoint holds, the fourth step would be lost."""
    weight = torch.nn.Parameter(torch.ones(1))
    short, long = torch.optim.SGD([weight], lr=1.0), torch.optim.SGD([weight], lr=1.0)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, n=n: 1 - step / n)
        for optimizer, n in ((short, 3), (long, 6))
    ]
    for _ in range(3):
        short.step()
        schedules[0].step()
    long.load_state_dict(short.state_dict())
    schedules[1].load_state_dict(schedules[0].state_dict())
    assert long.param_groups[0]["lr"] == 0.0
    SettingsOfThisRun().on_train_begin(None, MagicMock(), None, optimizer=long, lr_scheduler=schedules[1])
    assert long.param_groups[0]["lr"] == 0.5 and schedules[1].get_last_lr() == [0.5]


def test_a_batch_is_that_of_the_whole_step(tmp_path, monkeypatch):
    """`batch_size` counts all processes and accumulations, as in train-tokenizer."""
    corpus(tmp_path)
    training = {"steps": 2, "batch_size": 4, "accumulation": 2, "save_steps": 2, "validate_steps": 4, "log_steps": 1}
    settings = config(tmp_path, "run", training=training)
    seen = []
    real = TrainingUtterances.__getitem__
    monkeypatch.setattr(TrainingUtterances, "__getitem__", lambda self, n: (seen.append(n), real(self, n))[1])
    assert train_teacher.plan(settings)["epochs"] == round(2 * 4 / 5, 1)
    train_teacher.run(settings)
    assert sorted(seen) == list(range(8))
    assert train_teacher._training_arguments(settings, RunFolder(settings.run_dir)).per_device_train_batch_size == 2
    with pytest.raises(ConfigError, match="batch_size=4: must divide by accumulation=3"):
        config(tmp_path, "run", training=training | {"accumulation": 3})
    monkeypatch.setenv("WORLD_SIZE", "4")
    for start in (train_teacher.plan, train_teacher.run):
        with pytest.raises(ConfigError, match=r"batch_size=4 .* times 4 process"):
            start(config(tmp_path, "other", training=training))


def test_weighted_sources_get_their_share_and_what_does_not_fit_is_left_out(tmp_path):
    for name, n in (("many", 9), ("few", 3)):
        (tmp_path / name).mkdir()
        corpus(tmp_path / name, n)
    rows = (tmp_path / "few" / "manifest.jsonl").read_text().replace('"id": "', '"id": "few-')
    too_long = {"id": "few-long", "audio": "audio/1.wav", "text": "one", "duration": 9.0, "split": "train"}
    (tmp_path / "few" / "manifest.jsonl").write_text(rows + json.dumps(too_long) + "\n")
    sources = [
        DataSource(path=str(tmp_path / name / "manifest.jsonl"), weight=weight)
        for name, weight in (("many", 0.2), ("few", 0.8))
    ]
    settings = config(tmp_path, "run")
    settings.data = sources
    utterances, texts = train_teacher._training_utterances(settings)
    spelled = {u.id: text for u, text in zip(utterances, texts, strict=True)}
    audio = training_audio(sources, 16_000, 0, keep=lambda u: u.id in spelled)
    items = TrainingUtterances(audio, spelled, AugmentationConfig(), 1000, 1.0, 0)
    drawn = [items.audio.recording(items.audio.key(n))[0].id for n in range(1000)]
    assert sum(name.startswith("few-") for name in drawn) == 800
    assert len(set(drawn)) == 8 + 2 and "few-long" not in drawn
    assert items[3]["labels"][-1] == EOS and len(items[3]["labels"]) == len("one two") + 1


def test_transcripts_are_reduced_to_the_characters():
    assert train_teacher.to_characters("Café No. 7 — it's ‘fine’!", "basic") == "cafe no seven it's fine"


def test_greedy_texts_cover_every_waveform():
    waveforms = [np.zeros(4000, np.float32), np.ones(20000, np.float32)]
    assert len(greedy_ctc_texts(Recogniser.from_scratch(TINY).eval(), waveforms, batch_size=1)) == 2
