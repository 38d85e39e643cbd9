"""`published/12.5hz` restores every fact of the published training code, and each key does what its name says."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from test_codec_training import config, metrics
from torch import nn

from recipes.commands import train_tokenizer
from recipes.config import load_config
from tokenizer import LMSPTModel
from tokenizer.data.augmentation import AugmentationConfig
from tokenizer.model.configuration import preset_config
from tokenizer.training.discriminator import Discriminator
from tokenizer.training.state import CodecTrainingConfig
from tokenizer.training.step import learning_rate_factor

# As in kakaocorp/lmspt's training configuration and code; see docs/as-published.md.
FACTS = {
    "teacher.name": "openai/whisper-large-v3",
    "teacher.pad_to_seconds": 30,
    "teacher.layer": None,
    "distillation.kind": "resynthesis",
    "weights.distillation": 500,
    "weights.mel": 15,
    "weights.feature_matching": 2,
    "weights.adversarial": 1,
    "weights.commitment": 0.25,
    "weights.codebook": 1,
    "mel_padding": "reflect",
    "discriminator.enabled": True,
    "discriminator.start_step": 0,
    "discriminator.periods": [2, 3, 5, 7, 11],
    "discriminator.fft_sizes": [2048, 1024, 512],
    "discriminator.period_channels": 32,
    "discriminator.band_channels": 64,
    "discriminator.padding": "reflect",
    "crops.crop_s": 6,
    "crops.quantizer_dropout": 0.5,
    "crops.semantic_only": 0,
    "augmentation": AugmentationConfig(speed=0, level_db=0, noise_probability=0),
    "training.learning_rate": 2e-4,
    "training.discriminator_learning_rate": 1e-3,
    "training.discriminator_schedule": "constant",
    "training.warmup_steps": 100,
    "training.betas": (0.8, 0.9),
    "training.gradient_clip": 1,
    "training.ema_decay": 0,
    "training.revive_steps": 0,
    "precision": "fp32",
    "freeze": [],
    "init_from": None,
}


@pytest.fixture(scope="module")
def published():
    return load_config(train_tokenizer.Config, "published/12.5hz")


@pytest.mark.parametrize("key", FACTS)
def test_the_shipped_configuration_holds_the_published_value(published, key):
    value = published
    for name in key.split("."):
        value = getattr(value, name)
    assert value == FACTS[key]


def test_the_published_rate_falls_to_a_floor_of_5e_5(published):
    training = published.training
    rates = [training.learning_rate * learning_rate_factor(step, training) for step in (99, 100, training.steps - 1)]
    assert rates == pytest.approx([2e-4, 2e-4, 5e-5], rel=1e-4)


def test_the_published_sizes_are_those_of_the_release(published):
    """Parameters of the discriminators as counted in the published code: 32 channels by periods, 64 by bands."""
    sizes = preset_config(published.preset, **published.model)
    assert (sizes.sampling_rate, sizes.frame_rate, sizes.codebook_sizes) == (24_000, 12.5, [16_384] + [4096] * 7)
    assert sizes.initialization == "torch" and sizes.semantic_subtraction == "attached"
    with torch.device("meta"):
        discriminator = Discriminator(published.discriminator)
    periods = [part for part in discriminator.parts if hasattr(part, "period")]
    widths = {layer.out_channels for part in discriminator.parts[len(periods) :] for layer in part.stacks[0]}
    assert [part.period for part in periods] == [2, 3, 5, 7, 11] and widths == {64}
    assert [layer.out_channels for layer in periods[0].layers] == [32, 128, 512, 1024, 1024]
    bands = discriminator.parts[len(periods)].bands
    assert bands == [(0, 102), (102, 256), (256, 512), (512, 768), (768, 1025)]  # cut, not rounded


def rates_of(optimizer) -> set[float]:
    return {group["lr"] for group in optimizer.param_groups}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [1e-3, 5e-4, 2.5e-4]),
        ({"discriminator_learning_rate": 4e-3}, [4e-3, 2e-3, 1e-3]),
        ({"discriminator_learning_rate": 4e-3, "discriminator_schedule": "constant"}, [4e-3] * 3),
        ({"discriminator_schedule": "constant"}, [1e-3] * 3),
    ],
)
def test_the_discriminators_have_a_rate_of_their_own(make_corpus, tmp_path, monkeypatch, changes, wanted):
    """What their optimizer moves by at each step, and what is logged of it."""
    shares = [1.0, 0.5, 0.25]
    monkeypatch.setattr("tokenizer.training.step.learning_rate_factor", lambda step, _: shares[step])
    seen = []
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (seen.append(rates_of(self)), real(self))[1])
    training = {"steps": 3, "learning_rate": 1e-3, **changes}
    run = tmp_path / "run"
    train_tokenizer.run(config(make_corpus(), run, None, discriminator={"start_step": 0}, training=training))
    judges, tokenizer = seen[::2], seen[1::2]
    assert tokenizer == [{1e-3}, {5e-4}, {2.5e-4}] and judges == [{rate} for rate in wanted]
    rows = [row for row in metrics(run) if "loss/mel" in row]
    assert [row.get("learning_rate/discriminator", row["learning_rate"]) for row in rows] == wanted


def test_a_rate_that_cannot_work_is_named():
    with pytest.raises(ValueError, match=r"discriminator_learning_rate=0: .*; discriminator_schedule=linear: "):
        CodecTrainingConfig(discriminator_learning_rate=0, discriminator_schedule="linear")


def test_torchs_initialization_is_that_of_torchs_own_layers():
    """Same layers, made by torch alone: weights, under weight norm too, and biases are spread alike."""
    sizes = {
        "semantic_encoder_width": 8, "acoustic_encoder_width": 8, "latent_dim": 64, "decoder_width": 128,
        "auxiliary_decoder_width": 64, "codebook_sizes": [64, 32],
    }  # fmt: skip
    torch.manual_seed(0)
    model = LMSPTModel(preset_config("release-12.5hz", initialization="torch", **sizes))
    ours = LMSPTModel(preset_config("release-12.5hz", **sizes))
    checked = 0
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.ConvTranspose1d)) or module.weight.numel() < 2000:
            continue
        bound = 1 / math.sqrt(module.weight[0].numel())  # of kaiming_uniform_(a=sqrt(5)), for all of them
        weight, bias = module.weight.detach(), module.bias.detach()
        assert float(weight.abs().max()) <= bound * 1.0001, name
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), name
        assert 0 < float(bias.abs().max()) <= bound, name
        assert bool((ours.get_submodule(name).bias == 0).all())
        checked += 1
    assert checked > 20
    for book in model.quantizer.books:
        assert float(book.codebook.weight.detach().std()) == pytest.approx(1, abs=0.1) and bool((book.usage == 1).all())
        assert not torch.allclose(book.project_out.weight, book.project_in.weight.T)


def test_how_weights_were_drawn_is_no_part_of_the_fingerprint():
    one, other = (preset_config("nano-12.5hz", initialization=kind) for kind in ("truncated", "torch"))
    assert one.identity() == other.identity()
    with pytest.raises(ValueError, match="initialization must be"):
        preset_config("nano-12.5hz", initialization="xavier")


def test_the_table_in_the_docs_names_every_key_that_the_configuration_sets(published):
    """Whoever adds a key to the YAML explains it, and no key of the table is stale."""
    text = (Path(__file__).resolve().parents[1] / "docs/as-published.md").read_text(encoding="utf-8")
    default = train_tokenizer.Config()
    for section in dataclasses.fields(published):
        now, before = getattr(published, section.name), getattr(default, section.name)
        if section.name == "run_dir":
            continue
        if not dataclasses.is_dataclass(now):
            assert now == before or f"`{section.name}" in text, section.name
            continue
        for field in dataclasses.fields(now):
            if getattr(now, field.name) != getattr(before, field.name):
                assert f"`{section.name}.{field.name}" in text, f"{section.name}.{field.name}"
