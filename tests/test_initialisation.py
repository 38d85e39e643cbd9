"""Starting a tokenizer from another's weights: which tensors go over, which are new, and that the log names them."""

from __future__ import annotations

import logging

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from test_codec_training import TINY, config
from test_training_scale import DAC

from recipes.commands import export, train_tokenizer
from recipes.config import ConfigError
from recipes.tokenizer_training.networks import new_state
from tokenizer import LMSPTModel
from tokenizer.model.configuration import preset_config
from tokenizer.training.initialisation import initialise_from


def grown(tmp_path, before: dict, after: dict, old="nano-12.5hz", new="nano-12.5hz"):
    """A model made from another one's weights; the old model, the new one and what went over."""
    torch.manual_seed(0)
    source = LMSPTModel(preset_config(old, **before))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    source.save_pretrained(tmp_path / "old")
    model = LMSPTModel(preset_config(new, **after))
    return source, model, initialise_from(model, tmp_path / "old")


def modules(names) -> set[str]:
    return {".".join(name.split(".")[:3]) for name in names}


def test_the_same_sizes_take_everything(tmp_path):
    source, model, result = grown(tmp_path, TINY, TINY)
    assert not result.new and not result.dropped
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in source.state_dict().items())


def test_a_nano_tokenizer_at_half_the_rate_has_new_strides_alone(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "tokenizer"):
        source, model, result = grown(tmp_path, TINY, TINY, new="nano-6.25hz")
    encoders = {"semantic_encoder.downs.1", "acoustic_encoder.downs.1"}
    assert modules(result.new) == encoders | {"decoder.ups.1", "auxiliary_decoder.ups.1"}
    assert modules(result.dropped) == modules(result.new)
    assert "strides [160, 4, 2] become [160, 4, 4]" in caplog.text
    assert "new: semantic_encoder.downs.1" in caplog.text
    state, old = model.state_dict(), source.state_dict()
    assert all(torch.equal(state[name], old[name]) for name in result.reused)


def test_a_larger_book_begins_with_the_entries_of_the_smaller(tmp_path, caplog):
    small, large = ({"codebook_sizes": [n, *TINY["codebook_sizes"][1:]]} for n in (16, 40))
    with caplog.at_level(logging.INFO, "tokenizer"):
        source, model, result = grown(tmp_path, TINY | small, TINY | large)
    old, new = (m.quantizer.books[0].codebook.weight for m in (source, model))
    assert torch.equal(new[:16], old)
    assert len(new.unique(dim=0)) == 40  # equal entries would never be told apart
    assert torch.cdist(new, old).argmin(1).tolist() == [n % 16 for n in range(40)]
    assert result.grown == ("quantizer.books.0.codebook.weight",) and not result.new and not result.dropped
    assert "larger books, from copies of the old entries: quantizer.books.0" in caplog.text


def test_a_nano_tokenizer_with_one_more_rung_names_it(tmp_path):
    _, model, result = grown(tmp_path, TINY, TINY, old="nano-25hz")
    added = {f"{part}_encoder.{name}.1" for part in ("semantic", "acoustic") for name in ("downs", "down_norms")}
    added |= {f"{part}.{name}.1" for part in ("decoder", "auxiliary_decoder") for name in ("ups", "up_norms")}
    assert modules(result.new) == added
    assert modules(result.dropped) == {"semantic_encoder.blocks.1"}  # nano-12.5hz has a block less there
    model(torch.randn(1, 1, 3200))


def test_a_dac_tokenizer_with_one_more_stride_keeps_what_lies_nearer_the_waveform(tmp_path):
    wider = DAC | {"strides": [4, 5, 8, 8, 2], "decoder_width": 64, "auxiliary_decoder_width": 32}
    source, model, result = grown(tmp_path, DAC, wider)
    new, old = model.state_dict(), source.state_dict()
    # an encoder's added block stands last, a decoder's first: what was block 1 of a decoder is block 2
    for name, before in (
        ("semantic_encoder.block.4.block.0.block.1.bias", None),
        ("decoder.model.2.block.1.bias", "decoder.model.1.block.1.bias"),
        ("auxiliary_decoder.model.7.bias", "auxiliary_decoder.model.6.bias"),
    ):
        assert torch.equal(new[name], old[before or name]), name
        assert name in result.reused
    assert modules(result.new) >= {"semantic_encoder.block.5", "decoder.model.0", "decoder.model.1"}
    assert "quantizer.books.0.codebook.weight" in result.reused
    assert not any(name.startswith("decoder.model.3") for name in result.new)
    model(torch.randn(1, 1, 5120))


def test_a_dac_tokenizer_with_a_longer_last_stride_has_new_strided_convolutions_alone(tmp_path):
    _, _, result = grown(tmp_path, DAC, DAC | {"strides": [4, 5, 8, 16]})
    # weight norm keeps one gain per channel, and a bias: those fit; the taps do not
    assert {name.rsplit(".", 1)[-1] for name in result.new} <= {"weight", "original0", "original1"}
    assert modules(result.new) == {f"{part}_encoder.block.4" for part in ("semantic", "acoustic")} | {
        "decoder.model.1",
        "auxiliary_decoder.model.1",
    }


def test_a_model_of_other_sizes_throughout_or_no_tokenizer_is_refused(tmp_path, make_corpus, tiny_teacher):
    wider = TINY | {"latent_dim": 48} | {name: 48 for name in TINY if name.endswith("_width")}
    with pytest.raises(ValueError, match="no weight of its encoders"):
        grown(tmp_path, TINY, wider)
    with pytest.raises(ConfigError, match="init_from=.*not a tokenizer folder"):
        train_tokenizer.run(config(make_corpus(), tmp_path / "r", None, init_from=str(tiny_teacher)))


def test_a_run_starts_from_a_tokenizer_of_twice_its_rate(make_corpus, tmp_path):
    manifest = make_corpus()
    changes = {"discriminator": {"enabled": False}, "training": {"steps": 1, "warmup_steps": 0, "learning_rate": 1e-9}}
    first = train_tokenizer.run(config(manifest, tmp_path / "first", None, **changes))
    second = train_tokenizer.run(
        config(manifest, tmp_path / "second", None, preset="nano-6.25hz", init_from=str(first), **changes)
    )
    one, two = (LMSPTModel.from_pretrained(folder).state_dict() for folder in (first, second))
    name = "semantic_encoder.layers.1.up.weight"
    torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=0)


@pytest.fixture
def adversarial(make_corpus, tmp_path):
    """A finished adversarial run: its configuration with changes, the discriminators of its last checkpoint."""
    manifest = make_corpus()

    def settings(name: str, **changes):
        return config(manifest, tmp_path / name, None, **changes)

    train_tokenizer.run(settings("first"))
    return settings, load_file(tmp_path / "first/checkpoints/checkpoint-0000004/discriminator.safetensors")


def started(settings):
    """The state before the first step of a training."""
    torch.manual_seed(99)
    return new_state(settings, Accelerator(cpu=True))


@pytest.mark.parametrize("source", ["run", "export"])
def test_a_run_goes_on_with_the_discriminators_of_another(adversarial, tmp_path, source):
    """From the run itself or from an export of it; both optimizers start anew, and without the key all is new."""
    settings, trained = adversarial
    place = str(tmp_path / "first/model")
    if source == "export":
        place = str(export.run(export.Config(place, str(tmp_path / "out"), dtype="fp32", discriminators=True)))
    changes = {"init_from": place, "init_discriminators": True}
    state = started(settings("second", **changes))
    assert all(torch.equal(value, trained[name]) for name, value in state.discriminator.state_dict().items())
    assert not state.discriminator_optimizer.state_dict()["state"] and not state.optimizer.state_dict()["state"]
    new = started(settings("second", init_from=place)).discriminator.state_dict()
    assert not all(torch.equal(value, trained[name]) for name, value in new.items())
    train_tokenizer.plan(settings("second", **changes))
    train_tokenizer.run(settings("second", **changes))


def test_other_discriminators_under_the_same_name_are_other_inputs(adversarial, tmp_path):
    settings, _ = adversarial
    changes = {"init_from": str(tmp_path / "first/model"), "init_discriminators": True}
    train_tokenizer.run(settings("second", **changes))
    file = tmp_path / "first/checkpoints/checkpoint-0000004/discriminator.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"new!")
    with pytest.raises(ConfigError, match="other contents of data, teacher or init_from"):
        train_tokenizer.run(settings("second", **changes))


def test_discriminators_of_other_sizes_are_refused_by_tensor_and_key(adversarial, tmp_path):
    settings, _ = adversarial
    changes = {"init_from": str(tmp_path / "first/model"), "init_discriminators": True}
    wider = settings("wide", discriminator={"band_channels": 3}, **changes)
    for start in (train_tokenizer.plan, train_tokenizer.run):
        with pytest.raises(ConfigError) as caught:
            start(wider)
        message = str(caught.value)
        assert "parts.1.stacks.0.0.bias is (2,) there and (3,) here" in message
        assert "set discriminator.band_channels=2 as there" in message and "init_discriminators=false" in message
    fewer = settings("few", discriminator={"periods": []}, **changes)
    with pytest.raises(ConfigError, match=r"and absent here.* set discriminator.periods=\[2\] as there"):
        train_tokenizer.plan(fewer)


def test_discriminators_that_heard_other_ends_are_taken_with_a_warning(adversarial, tmp_path, caplog):
    settings, _ = adversarial
    changes = {"init_from": str(tmp_path / "first/model"), "init_discriminators": True}
    with caplog.at_level(logging.WARNING, logger="slm"):
        train_tokenizer.plan(settings("second", **changes))
        assert "padding" not in caplog.text
        train_tokenizer.plan(settings("third", discriminator={"padding": "reflect"}, **changes))
    assert "discriminator.padding=zeros" in caplog.text


def test_discriminators_that_are_not_there_are_named(adversarial, tmp_path):
    settings, _ = adversarial
    place = str(tmp_path / "first/model")
    with pytest.raises(ConfigError, match="init_discriminators=true needs init_from"):
        train_tokenizer.plan(settings("second", init_discriminators=True))
    with pytest.raises(ConfigError, match="needs discriminator.enabled=true"):
        train_tokenizer.plan(
            settings("second", init_from=place, init_discriminators=True, discriminator={"enabled": False})
        )
    out = str(export.run(export.Config(place, str(tmp_path / "bare"))))
    with pytest.raises(ConfigError, match="bare has no discriminators: neither discriminators/model.safetensors"):
        train_tokenizer.plan(settings("second", init_from=out, init_discriminators=True))


def test_an_export_with_discriminators_says_so_and_can_be_exported_again(adversarial, tmp_path, tiny_teacher):
    _, trained = adversarial
    out = export.run(export.Config(str(tmp_path / "first"), str(tmp_path / "out"), discriminators=True))
    card = (out / "README.md").read_text()
    assert "init_discriminators=true" in card and "| discriminators/model.safetensors |" in card
    stored = load_file(out / "discriminators/model.safetensors")
    assert all(torch.equal(stored[name], value.half()) for name, value in trained.items())
    assert (out / "discriminators/model.safetensors").stat().st_mode & 0o044 == 0o044
    again = export.run(export.Config(str(out), str(tmp_path / "again"), discriminators=True))
    assert load_file(again / "discriminators/model.safetensors").keys() == trained.keys()
    assert (
        "init_discriminators"
        not in (export.run(export.Config(str(tmp_path / "first"), str(tmp_path / "bare"))) / "README.md").read_text()
    )
    with pytest.raises(ConfigError, match="discriminators: only a tokenizer"):
        export.plan(export.Config(str(tiny_teacher), str(tmp_path / "no"), discriminators=True))
