"""What a training step leaves behind: revived entries in the averages, skipped steps, whole and torn checkpoints."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from test_codec_training import config, metrics

import tokenizer.training.checkpoints as state_files
from recipes.commands import train_tokenizer
from recipes.tokenizer_training.data import make_crops
from recipes.tokenizer_training.networks import new_state
from recipes.tokenizer_training.objective import make_objective
from tokenizer.data.augmentation import AugmentationConfig
from tokenizer.data.crops import CropConfig, TrainingCrops
from tokenizer.data.mixing import training_audio
from tokenizer.data.utterances import DataSource
from tokenizer.teacher.distillation import pool_to_frames
from tokenizer.training.checkpoints import load_latest_state, save_state
from tokenizer.training.discriminator import Discriminator, DiscriminatorConfig
from tokenizer.training.state import TrainState
from tokenizer.training.step import train_step


def begun(make_corpus, tmp_path, **changes):
    """A state, its objective and a batch, without a teacher."""
    settings = config(make_corpus(), tmp_path / "run", None, **changes)
    accelerator = Accelerator(cpu=True)
    state, crops = new_state(settings, accelerator), make_crops(settings)
    batch = {name: torch.stack([crops[i][name] for i in range(2)]) for name in crops[0]}
    objective = make_objective(settings, accelerator)
    return state, lambda: train_step(state, [batch], objective, settings.training, accelerator)


@pytest.mark.parametrize("changes", [{}, {"freeze": ["quantizer"]}, {"model": {"semantic_quantizer": "fsq"}}])
def test_an_entry_is_revived_in_the_averaged_weights_too(make_corpus, tmp_path, changes):
    if "model" in changes:
        changes = {"model": {"semantic_quantizer": "fsq", "fsq_levels": [8, 4]}}
    training = {"ema_decay": 0.999, "steps": 10, "warmup_steps": 0}
    state, step = begun(make_corpus, tmp_path, training=training, discriminator={"enabled": False}, **changes)
    for state.step in range(2):
        step()
    books, means = state.model.quantizer.books, state.ema.module.quantizer.books
    for book in books:
        book.usage.fill_(0.9)
        book.usage[:5] = 0.0
    state.step = 2
    revived = step()["revived"]
    if changes.get("freeze"):
        assert revived == 0
        return
    found = 0
    for book, mean in list(zip(books, means, strict=True))["model" in changes :]:
        # Averaged weights lag behind those of all other entries.
        rows = (mean.codebook.weight == book.codebook.weight).all(dim=1)
        found += int(rows.sum())
    assert found == revived > 0


def test_each_side_leaves_out_its_own_steps_and_those_of_the_discriminators_are_counted(
    make_corpus, tmp_path, monkeypatch
):
    state, step = begun(make_corpus, tmp_path)
    state.step = 1  # the discriminators' first
    sides = {"generator": state.model.decoder, "discriminator": state.discriminator}

    def moved() -> set[str]:
        before = {n: [p.clone() for p in side.parameters()] for n, side in sides.items()}
        figures.append(step())
        return {n for n, side in sides.items()
                if any(not torch.equal(a, b) for a, b in zip(before[n], side.parameters(), strict=True))}  # fmt: skip

    figures = []
    assert moved() == set(sides) and "discriminator_skipped" not in figures[0]
    with monkeypatch.context() as patch:
        real = train_step.__globals__["codec_losses"]
        patch.setitem(train_step.__globals__, "codec_losses", lambda *a: {n: v * np.nan for n, v in real(*a).items()})
        assert moved() == {"discriminator"} and not np.isfinite(figures[1]["loss/total"])
    judged = train_step.__globals__["discriminator_loss"]
    monkeypatch.setitem(train_step.__globals__, "discriminator_loss", lambda *a: judged(*a) * np.nan)
    assert moved() == {"generator"} and figures[2]["discriminator_skipped"] == 1.0

    settings = config(make_corpus(name="again"), tmp_path / "whole", None)
    train_tokenizer.run(settings)
    summary = json.loads((tmp_path / "whole/complete.json").read_text())["summary"]
    assert summary["skipped_discriminator_steps"] == 3 and summary["non_finite_steps"] == 0
    counts = [row["health/skipped_discriminator_steps"] for row in metrics(tmp_path / "whole") if "loss/mel" in row]
    assert counts == [0, 1, 2, 3]


@pytest.fixture
def checkpoints(tmp_path):
    """A small state, the folder of its two checkpoints, and what loads the newest."""
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    accelerator, state = Accelerator(cpu=True), TrainState(model, optimizer)
    for state.step in (3, 6):
        save_state(state, tmp_path, 5, accelerator)
    state.step = 0
    return state, tmp_path, lambda: load_latest_state(state, tmp_path, accelerator)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "Permission denied"),
     RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
     state_files.SafetensorError("Error while deserializing: I/O error: Input/output error (os error 5)")],
    ids=["memory", "disk", "permission", "torch's memory", "safetensors' disk"],
)  # fmt: skip
def test_an_error_that_says_nothing_about_the_file_moves_no_checkpoint(checkpoints, monkeypatch, error):
    state, folder, load = checkpoints

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(state_files, "load_file", failing)
    with pytest.raises((OSError, MemoryError), match="checkpoint-0000006 could not be read") as caught:
        load()
    assert isinstance(caught.value, MemoryError) == ("memory" in str(error) or isinstance(error, MemoryError))
    assert names(folder) == ["checkpoint-0000003", "checkpoint-0000006"] and state.step == 0


@pytest.mark.parametrize("file", ["model.safetensors", "optimizers.pt"])
@pytest.mark.parametrize("tear", ["empty", "half", "head", "garbage", "gone"])
def test_a_torn_checkpoint_gives_way_and_if_all_are_torn_nothing_starts_over(checkpoints, file, tear):
    state, folder, load = checkpoints

    def torn(checkpoint):
        path = folder / checkpoint / file
        content = path.read_bytes()
        parts = {"empty": b"", "half": content[: len(content) // 2], "head": content[:5], "garbage": b"x" * 999}
        path.unlink()
        if tear != "gone":
            path.write_bytes(parts[tear])

    torn("checkpoint-0000006")
    assert load() and state.step == 3
    assert names(folder) == ["checkpoint-0000003", "torn-checkpoint-0000006"]
    torn("checkpoint-0000003")
    with pytest.raises(ValueError, match="none of the checkpoints can be read: checkpoint-0000003 .*--restart"):
        load()
    assert names(folder) == ["checkpoint-0000003", "torn-checkpoint-0000006"]


@pytest.mark.parametrize("size", [5_000, 20_000, 60_000, 200_000])
def test_optimizers_cut_short_anywhere_give_way(tmp_path, size):
    """torch.load fails in more than one way: with EINVAL where its search for the end would begin before the start."""
    model = torch.nn.Linear(200, 200)
    optimizer, accelerator = torch.optim.AdamW(model.parameters()), Accelerator(cpu=True)
    model(torch.ones(1, 200)).sum().backward()
    optimizer.step()
    state = TrainState(model, optimizer)
    for state.step in (3, 6):
        save_state(state, tmp_path, 5, accelerator)
    file = tmp_path / "checkpoint-0000006/optimizers.pt"
    content = file.read_bytes()
    assert len(content) > 300_000
    file.write_bytes(content[:size])
    assert load_latest_state(state, tmp_path, accelerator) and state.step == 3
    assert names(tmp_path) == ["checkpoint-0000003", "torn-checkpoint-0000006"]


@pytest.mark.parametrize("version", [None, state_files.DATA_VERSION - 1, state_files.DATA_VERSION])
def test_a_checkpoint_of_other_draws_goes_on_but_says_so_and_forgets_the_best_validation(checkpoints, caplog, version):
    state, folder, load = checkpoints
    file = folder / "checkpoint-0000006/optimizers.pt"
    saved = torch.load(file, weights_only=True)
    assert saved.pop("data_version") == state_files.DATA_VERSION
    saved["health"] |= {"best_step": 3, "best_valid_mel": 1.5, "best_train_mel": 1.7, "non_finite_steps": 2}
    torch.save(saved if version is None else saved | {"data_version": version}, file)
    assert load() and state.step == 6 and state.health.non_finite_steps == 2
    same = version == state_files.DATA_VERSION
    assert (state.health.best_step, state.health.best_valid_mel) == ((3, 1.5) if same else (0, np.inf))
    assert ("checkpoint-0000006 was written by a version" in caplog.text) != same


def test_no_checkpoint_at_all_is_a_start(checkpoints):
    state, folder, load = checkpoints
    for checkpoint in folder.iterdir():
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    assert load() is False and state.step == 0


def test_a_slow_copy_is_cut_from_anywhere_in_a_recording_hardly_longer_than_a_crop(tmp_path, monkeypatch):
    """0.52 s for crops of 0.5 s: as much as the fastest copy needs would leave no choice at all."""
    soundfile.write(tmp_path / "ramp.wav", np.linspace(0.1, 0.9, 8320, dtype=np.float32), 16000, subtype="FLOAT")
    audio = training_audio([DataSource(str(tmp_path))], 16000, seed=0)
    settings = AugmentationConfig(speed=0.1, level_db=0, noise_probability=0)
    crops, pieces = TrainingCrops(audio, CropConfig(crop_s=0.5), settings, 3, 100, 0), []
    real = TrainingCrops.__getitem__.__globals__["augment"]
    monkeypatch.setitem(TrainingCrops.__getitem__.__globals__, "augment", lambda *a: pieces.append(a[0][0]) or real(*a))
    masks = [crops[i]["padding_mask"].all() for i in range(40)]
    assert max(pieces) > 0.12 and torch.equal(crops[7]["input_values"], crops[7]["input_values"])
    assert sum(map(bool, masks)) > 20  # padded only where the recording itself is too short for a fast copy


def test_pooled_targets_stay_in_fp32_under_autocast():
    from tokenizer.model.configuration import preset_config

    features, sizes = torch.randn(2, 40, 8), preset_config("nano-12.5hz")
    wanted = pool_to_frames(features, 10, sizes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pool_to_frames(features, 10, sizes), wanted)


def test_the_smallest_discriminators_allowed_hear_something():
    settings = DiscriminatorConfig(periods=[1], fft_sizes=[16], period_channels=1, band_channels=1)
    torch.manual_seed(0)
    waveform = torch.randn(1, 1, 400, requires_grad=True)
    parts = Discriminator(settings)(waveform)
    assert len(parts) == 2  # a period and a spectrum
    for part in parts:
        (gradient,) = torch.autograd.grad(part[-1].sum(), waveform, retain_graph=True)
        assert torch.isfinite(part[-1]).all() and gradient.abs().max() > 0
