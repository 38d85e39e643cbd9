"""Tokenizer configuration: presets, exact rates, and errors that name the key."""

import pytest
from transformers import AutoConfig

from tokenizer import LMSPTConfig
from tokenizer.model.configuration import preset_config
from tokenizer.model.presets import PRESETS


@pytest.mark.parametrize(("name", "rate", "hop"), [("25", 25.0, 640), ("12.5", 12.5, 1280), ("6.25", 6.25, 2560)])
def test_presets_have_exact_rates(name, rate, hop):
    config = preset_config(f"nano-{name}hz")
    assert (config.frame_rate, config.hop_length) == (rate, hop)
    assert config.codebook_sizes == [1024] * 8 and config.num_codebooks == 8
    assert config.auxiliary_hop_length / config.auxiliary_sampling_rate == hop / config.sampling_rate
    assert not config.trained


def test_unknown_preset_lists_presets():
    with pytest.raises(ValueError) as error:
        preset_config("nano-13hz")
    assert all(name in str(error.value) for name in PRESETS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("strides", []),
        ("strides", [160, 0]),
        ("strides", "160"),
        ("strides", [300, 4]),
        ("auxiliary_strides", [160, 4]),
        ("codebook_sizes", [1024]),
        ("codebook_sizes", [1024, 1]),
        ("codebook_sizes", [1024, 16.5]),
        ("codebook_dim", 0),
        ("latent_dim", -1),
        ("n_mels", 0),
        ("semantic_encoder_depths", [1]),
        ("decoder_depths", [1, -1, 1]),
        ("decoder_width", 100),
        ("auxiliary_decoder_layers", -1),
        ("attention_window", 0),
        ("head_dim", 65),
        ("kernel_size", 6),
        ("mel_std", 0.0),
        ("initializer_range", 0.0),
        ("sampling_rate", 0),
    ],
)
def test_errors_name_the_key(key, value):
    with pytest.raises(ValueError, match=key):
        LMSPTConfig(**{key: value})


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError, match="(?s)kernel_size.*decoder_width|decoder_width.*kernel_size"):
        LMSPTConfig(kernel_size=2, decoder_width=1)


def test_auxiliary_rate_may_differ():
    sizes = {"sampling_rate": 24_000, "strides": [240, 4, 2], "n_fft": 960}
    config = LMSPTConfig(**sizes, auxiliary_sampling_rate=16_000, auxiliary_strides=[160, 4, 2])
    assert config.frame_rate == 12.5 and config.auxiliary_hop_length == 1280


def test_saved_and_loaded_through_auto_config(tmp_path):
    config = preset_config("nano-6.25hz", codebook_sizes=[32, 16], trained=True)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, LMSPTConfig) and loaded.trained
    keys = LMSPTConfig.__annotations__
    assert {key: getattr(loaded, key) for key in keys} == {key: getattr(config, key) for key in keys}


def test_instances_do_not_share_lists():
    first = preset_config("nano-25hz")
    first.strides.append(2)
    assert preset_config("nano-25hz").strides == [160, 4] and PRESETS["nano-25hz"]["strides"] == [160, 4]
