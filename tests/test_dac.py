"""The DAC family under the codec protocol: masks, lengths, reach, folding, recomputation, presets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from tokenizer import LMSPTConfig, LMSPTModel, load_tokenizer
from tokenizer.model.configuration import preset_config
from tokenizer.model.dac import WaveConv, WaveUp
from tokenizer.model.preset_table import count_parameters, preset_table

HOP = 30
SIZES = {
    "sampling_rate": 3000, "strides": [2, 3, 5], "auxiliary_sampling_rate": 2000, "auxiliary_strides": [4, 5],
    "encoder_architecture": "dac", "decoder_architecture": "dac", "auxiliary_decoder_architecture": "dac",
    "latent_dim": 16, "codebook_sizes": [32, 16, 24], "codebook_dim": 4, "head_dim": 8, "attention_window": 2,
    "semantic_encoder_width": 4, "semantic_encoder_layers": 1, "acoustic_encoder_width": 3,
    "acoustic_encoder_layers": 0, "decoder_width": 16, "decoder_layers": 1, "auxiliary_decoder_width": 8,
    "auxiliary_decoder_layers": 0,
}  # fmt: skip
SAME_RATE = {"auxiliary_sampling_rate": 3000, "auxiliary_strides": None}
VARIANTS = {
    "dac": {},
    "causal": {"causal": True},
    "shared": {"shared_encoder": True, "auxiliary_decoder": "shared", **SAME_RATE},
    "published-lengths": {"exact_lengths": False},
    "to-vocos": {"decoder_architecture": "vocos", "decoder_strides": [10, 3], "n_fft": 40},
}


def tiny(**changes):
    torch.manual_seed(0)
    model = LMSPTModel(LMSPTConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():  # large weights and biases, so that a leak past a mask shows
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("original0") and "quantizer" not in name:
                parameter.mul_(3)
    return model


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(request):
    return tiny(**VARIANTS[request.param])


def speech(length, seed=0):
    return torch.randn(1, 1, length, generator=torch.Generator().manual_seed(seed)) * 0.3


LENGTHS = [HOP + 1, 2 * HOP - 1, 2 * HOP, 9 * HOP + 7, 23 * HOP]


@torch.no_grad()
def test_batch_equals_singles_and_padded_equals_unpadded(model):
    values, mask = torch.full((len(LENGTHS), 1, max(LENGTHS)), 7.0), torch.zeros(len(LENGTHS), max(LENGTHS))
    for i, length in enumerate(LENGTHS):
        values[i, :, :length], mask[i, :length] = speech(length, i)[0], 1
    together, agree, total = model(values, mask), 0, 0
    sounds = [method(together.audio_codes).audio_values for method in (model.decode, model.resynthesize)]
    for i, length in enumerate(LENGTHS):
        alone = model(speech(length, i))
        n = -(-length // HOP) if model.config.exact_lengths else model.semantic_encoder.out_length(length)
        assert alone.audio_codes.shape == (1, 3, n)
        assert together.audio_codes_mask[i].tolist() == [j < n for j in range(together.audio_codes.shape[-1])]
        for name in ("semantic_latents", "quantized_semantic"):
            torch.testing.assert_close(together[name][i, :, :n], alone[name][0], atol=1e-4, rtol=0)
            assert (together[name][i, :, n:] == 0).all()
        agree += (together.audio_codes[i, :, :n] == alone.audio_codes[0]).sum().item()
        total += alone.audio_codes.numel()
        assert (together.audio_codes[i, :, n:] == -1).all()
        codes = together.audio_codes[i : i + 1, :, :n]
        hops = (model.config.hop_length, model.config.auxiliary_hop_length)
        for sound, method, hop in zip(sounds, (model.decode, model.resynthesize), hops, strict=True):
            single = method(codes).audio_values[0, 0]
            short = n * hop - len(single)
            assert short == 0 if model.config.exact_lengths else 0 < short <= 8
            torch.testing.assert_close(sound[i, 0, : len(single)], single, atol=1e-4, rtol=1e-4)
            assert (sound[i, 0, len(single) :] == 0).all()
            assert single.std() > 1e-3
    assert agree / total >= 0.995


@torch.no_grad()
def test_forward_equals_encode_then_decode_and_lengths_trim(model):
    values = speech(9 * HOP)
    output, codes = model(values), model.encode(values).audio_codes
    assert torch.equal(output.audio_codes, codes) and output.audio_values.shape == values.shape
    sound, spoken = model.decode(codes).audio_values, model.resynthesize(codes).audio_values
    torch.testing.assert_close(output.audio_values[..., : sound.shape[-1]], sound, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.auxiliary_values[..., : spoken.shape[-1]], spoken, atol=1e-5, rtol=1e-4)
    assert output.auxiliary_values.shape[-1] == 9 * model.config.auxiliary_hop_length
    cut = model.decode(codes, torch.tensor([9 * HOP - 1])).audio_values
    assert cut.shape[-1] == 9 * HOP - 1 and torch.equal(cut[..., : 8 * HOP], sound[..., : 8 * HOP])
    with pytest.raises(ValueError, match="lengths"):
        model.decode(codes, torch.tensor([9 * HOP + 1]))


@torch.no_grad()
def test_a_change_outside_the_receptive_fields_changes_nothing(model):
    reach = model.receptive_field_frames
    values = speech((2 * reach + 11) * HOP)
    changed = values.clone()
    changed[:, :, (reach + 5) * HOP : (reach + 6) * HOP] = 0.9
    parts = [part(values) for part in (lambda x: model(x).semantic_latents, lambda x: model(x).quantized)]
    moved = [
        (was != now(changed)).any(dim=1)[0].nonzero().flatten()
        for was, now in zip(parts, (lambda x: model(x).semantic_latents, lambda x: model(x).quantized), strict=True)
    ]
    first = reach + 5 if model.config.causal else 5
    assert all(where.min() >= first and where.max() <= 2 * reach + 5 for where in moved)
    assert len(moved[0]) > reach // 2  # the bound is no idle one

    reach = model.decoder_receptive_field_frames
    codes = torch.randint(0, 16, (1, 3, 2 * reach + 11))
    changed = codes.clone()
    changed[..., reach + 5] = (changed[..., reach + 5] + 1) % 16
    for method, hop in ((model.decode, HOP), (model.resynthesize, model.config.auxiliary_hop_length)):
        where = (method(codes).audio_values != method(changed).audio_values)[0, 0].nonzero().flatten() // hop
        first = reach + 5 if model.config.causal else 5
        assert where.min() >= first and where.max() <= 2 * reach + 5 and len(where.unique()) > 2


@torch.no_grad()
@pytest.mark.parametrize("variant", ["dac", "to-vocos"])
def test_saved_and_folded_models_are_the_same(variant, tmp_path):
    model, values = tiny(**VARIANTS[variant]), speech(7 * HOP)
    wanted = model(values)
    model.save_pretrained(tmp_path / "as-is")
    loaded = AutoModel.from_pretrained(tmp_path / "as-is").eval()
    assert loaded.fingerprint() == model.fingerprint()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())
    folded = loaded.fold_weight_norm()
    assert not any("parametrizations" in name for name in folded.state_dict())
    folded.save_pretrained(tmp_path / "folded")
    again = load_tokenizer(tmp_path / "folded")
    assert again.fingerprint() == folded.fingerprint() != model.fingerprint()
    for candidate in (folded, again):
        output = candidate(values)
        assert torch.equal(output.audio_codes, wanted.audio_codes)
        for name in ("audio_values", "auxiliary_values", "semantic_latents"):
            torch.testing.assert_close(output[name], wanted[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["dac", "nano"])
def test_activation_checkpointing_gives_the_same_gradients(family):
    sizes = {"semantic_encoder_width": 64, "acoustic_encoder_width": 64, "decoder_width": 64, "latent_dim": 32}
    model = tiny() if family == "dac" else LMSPTModel(preset_config("nano-12.5hz", **sizes))
    values, runs, count = speech(8 * model.config.hop_length), [], 0

    def counting(block, *arguments):
        nonlocal count
        count += 1
        return torch.utils.checkpoint.checkpoint(block, *arguments, use_reentrant=False)

    for on in (False, True):
        model.train().zero_grad()
        if on:
            model.activation_checkpointing_enable()
            for module in model.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module._gradient_checkpointing_func = counting
        output = model(values)
        (output.audio_values.square().sum() + output.auxiliary_values.square().sum()).backward()
        runs.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert count >= 4 * 3 and runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_gradients_reach_each_part_and_a_shared_decoder_makes_the_resynthesis():
    model = tiny().train()
    model(speech(8 * HOP)).auxiliary_values.square().sum().backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"semantic_encoder", "quantizer", "auxiliary_decoder"}
    model.zero_grad()
    model(speech(8 * HOP)).audio_values.square().sum().backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"semantic_encoder", "acoustic_encoder", "quantizer", "decoder"}
    model = tiny(**VARIANTS["shared"]).train()
    model(speech(8 * HOP)).auxiliary_values.square().sum().backward()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"semantic_encoder", "quantizer", "decoder"}
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert names == {"semantic_encoder", "quantizer", "decoder"}


@pytest.mark.parametrize("stride", [2, 3, 4, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_stated_output_lengths(stride, causal):
    for conv in (WaveConv(1, 1, 2 * stride, stride, causal=causal), WaveUp(1, 1, stride, causal)):
        for length in range(stride, 20):
            assert conv(torch.zeros(1, 1, length)).shape[-1] == conv.out_length(length)


def test_too_short_an_input_without_exact_lengths():
    model = tiny(exact_lengths=False)
    with pytest.raises(ValueError, match="too few for one frame of 30"):
        model.encode(speech(5))
    assert model.encode(speech(model.min_samples)).audio_codes.shape == (1, 3, 1) and model.min_samples > 5
    with pytest.raises(ValueError, match="too few"):
        model.encode(speech(model.min_samples - 1))
    assert tiny().encode(speech(1)).audio_codes.shape == (1, 3, 1) and tiny().min_samples == 1


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"encoder_architecture": "conv"}, "encoder_architecture must be one of mel, dac"),
        ({"decoder_width": 12}, "decoder_width must be a multiple of 8"),
        ({"strides": [1, 6, 5]}, "strides"),
        ({"decoder_strides": [2, 3, 6]}, "decoder_strides must be of the product of strides, 30"),
        ({"semantic_encoder_depths": [1, 1, 1]}, "semantic_encoder_depths must be left out"),
        ({"head_dim": 6}, "latent_dim must be a multiple of head_dim=6 for semantic_encoder_layers"),
        ({"auxiliary_decoder": "shared"}, "auxiliary_sampling_rate must be the main decoder's 3000"),
        ({"semantic_subtraction": "half"}, "semantic_subtraction must be one of"),
        ({"semantic_quantizer": "fsq"}, "fsq_levels"),
        ({"semantic_quantizer": "fsq", "fsq_levels": [4, 4]}, "codebook_sizes must be led by .* 16"),
        ({"fsq_levels": [8, 4]}, "fsq_levels must be left out"),
        ({"causal": "yes"}, "causal must be true or false"),
        ({"encoder_architecture": "mel", "exact_lengths": False}, "exact_lengths must be true"),
    ],
)
def test_configuration_errors_name_the_key(changes, key):
    with pytest.raises(ValueError, match=key):
        LMSPTConfig(**{**SIZES, **changes})


def test_old_configurations_load_and_keep_their_fingerprint(tmp_path):
    """config.json without the keys of the DAC family, with a boolean semantic_subtraction."""
    old = {
        "sampling_rate": 16000, "strides": [160, 4, 2], "n_fft": 640, "n_mels": 80, "mel_mean": -6.5, "mel_std": 2.3,
        "latent_dim": 64, "codebook_sizes": [32, 16], "codebook_dim": 8, "semantic_subtraction": True,
        "auxiliary_sampling_rate": 16000, "auxiliary_strides": [160, 4, 2], "attention_window": 16, "head_dim": 64,
        "kernel_size": 7, "expansion": 3,
    }  # fmt: skip
    for part in ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder"):
        old |= {f"{part}_width": 64, f"{part}_depths": [1, 0, 0], f"{part}_layers": 1}
    for subtraction in (True, False):
        old["semantic_subtraction"] = subtraction
        model = LMSPTModel(LMSPTConfig(**old))
        model.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(old | {"model_type": "lmspt"}))
        model = load_tokenizer(tmp_path)
        assert model.config.semantic_subtraction == ("attached" if subtraction else "none")
        digest = hashlib.sha256(json.dumps(old, sort_keys=True).encode())
        for name, tensor in sorted(model.state_dict().items()):
            if not name.endswith(".usage"):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update((tensor + 0).contiguous().numpy().tobytes())
        digest.update(b"fp32")
        assert model.fingerprint(sound=True) == digest.hexdigest()


def test_presets_have_the_sizes_of_their_sources_and_the_documented_counts():
    for rate in ("25", "12.5", "6.25"):
        counts = count_parameters(f"paper-{rate}hz")
        assert abs(sum(counts.values()) / 99.7e6 - 1) < 0.03 and preset_config(f"paper-{rate}hz").frame_rate == float(
            rate
        )
        assert abs(counts["auxiliary_decoder"] / 2.4e6 - 1) < 0.1
    assert preset_config("release-12.5hz").frame_rate == 12.5
    document = Path(__file__).resolve().parents[1] / "docs" / "tokenizer-presets.md"
    assert document.read_text() == preset_table(), (
        "run: python -m tokenizer.model.preset_table > docs/tokenizer-presets.md"
    )
