"""Parity with the published model: its numbers, its layout there and back, and the teacher's loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from published_layout import Published
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_teacher import speech_like, tiny_whisper
from transformers import AutoModel, WhisperFeatureExtractor
from typer.testing import CliRunner

from recipes import cli
from tokenizer import LMSPTModel, load_tokenizer
from tokenizer.codecs.published import config_from_published, config_to_published, load_published, save_published
from tokenizer.model.configuration import preset_config
from tokenizer.teacher.distillation import resynthesis_distillation
from tokenizer.teacher.whisper import SpeechTeacher

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity" / "lmspt_tiny"
SIZES = {
    "sample_rate": 12_000, "encoder_rates": [3, 4, 5], "decoder_rates": [4, 3, 5], "n_codebooks": 4,
    "n_semantic_codebooks": 1, "semantic_codebook_dim": 5, "acoustic_codebook_dim": 3, "semantic_subtraction": True,
    "use_shared_encoder": False, "encoder_dim": 6, "latent_dim": 24, "decoder_dim": 40, "semantic_codebook_size": 37,
    "acoustic_codebook_size": 19,
    "aux_decoder": {"input_channel": 24, "channels": 16, "rates": [5, 8], "sample_rate": 8000},
}  # fmt: skip
OTHERS = {
    "other-sizes": {},
    "shared-encoder": {"use_shared_encoder": True, "semantic_subtraction": False},
    "causal": {"is_causal": True, "aux_decoder": SIZES["aux_decoder"] | {"is_causal": True}},
}


@torch.no_grad()
def compare(model, audio, codes, decoded, semantic, resynthesis):
    """Share of equal codes and the three largest differences of waveforms; codes are (K, B, F)."""
    got, given = model.encode(audio).audio_codes, codes.transpose(0, 1)
    assert got.shape == given.shape
    pairs = [(model.decode(given), decoded), (model.decode(given[:, :1]), semantic)]
    pairs.append((model.resynthesize(given), resynthesis))
    assert all(ours.audio_values.shape == theirs.shape for ours, theirs in pairs)
    agree = (got == given).float().mean().item()
    return [agree, *((ours.audio_values - theirs).abs().max().item() for ours, theirs in pairs)]


def assert_parity(report):
    agree, *differences = report
    assert agree >= 0.995 and max(differences) <= 1e-4, report


@pytest.fixture(scope="module")
def stored():
    if not PARITY.is_dir():
        pytest.skip(f"no parity data at {PARITY}")
    return load_file(PARITY / "io.safetensors")


def test_published_numbers(stored, tmp_path):
    out = tmp_path / "converted"
    result = CliRunner().invoke(cli.app, ["convert", str(PARITY), str(out)])
    assert result.exit_code == 0, result.output
    names = ("audio", "codes", "decoded", "decoded_semantic_only", "aux_decoded")
    model = load_tokenizer(out)
    assert model.trained and not model.config.exact_lengths
    assert model.config.frame_rate == 12.5 and model.config.auxiliary_sampling_rate == 16_000
    assert_parity(compare(model, *(stored[name] for name in names)))
    for same in (AutoModel.from_pretrained(out), load_tokenizer(PARITY)):
        assert isinstance(same, LMSPTModel) and same.fingerprint() == model.fingerprint()


def test_published_tensors_come_back_bit_for_bit_from_the_command_line(stored, tmp_path):
    out, back = tmp_path / "converted", tmp_path / "back"
    for arguments in ([str(PARITY), str(out)], [str(out), str(back), "--to-published"]):
        result = CliRunner().invoke(cli.app, ["convert", *arguments])
        assert result.exit_code == 0, result.output
    was, now = load_file(PARITY / "weights.safetensors"), load_file(back / "weights.safetensors")
    assert set(was) == set(now) and all(torch.equal(was[name], now[name]) for name in was)
    assert json.loads((PARITY / "config.json").read_text()) == json.loads((back / "config.json").read_text())


def another(name, folder):
    """Another size of the layout, evaluated by the second opinion: its folder, its name and its numbers."""
    torch.manual_seed(0)
    model = Published(SIZES | OTHERS[name])
    audio = 0.5 * torch.randn(2, 1, 60 * 45 + 17)
    codes = model.encode(audio)
    numbers = (audio, codes, model.decode(codes), model.decode(codes[:1]), model.resynthesize(codes))
    tensors = dict(model.tensors)
    if model.config["use_shared_encoder"]:  # one module under two names
        twins = {name.replace("semantic", "acoustic"): t.clone() for name, t in tensors.items() if "_encoder" in name}
        tensors |= twins
    save_file(tensors, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config))
    return folder, name, numbers


@pytest.fixture(scope="module", params=list(OTHERS))
def other(request, tmp_path_factory):
    return another(request.param, tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return another("other-sizes", tmp_path_factory.mktemp("plain"))[0]


def test_another_size_has_the_numbers_of_an_independent_evaluation(other):
    folder, _, numbers = other
    model = load_published(folder)
    report = compare(model, *numbers)
    assert_parity(report)
    assert numbers[1].unique().numel() > 12  # codes that say something
    with torch.no_grad():  # and the comparison can fail
        model.decoder.model[1].block[1].bias += 1e-2
        model.semantic_encoder.block[0].bias += 1.0
    spoilt = compare(model, *numbers)
    assert spoilt[0] < 0.99 and spoilt[1] > 1e-4 and spoilt[3] == report[3]


def test_another_size_goes_there_and_back(other, tmp_path):
    folder, name, _ = other
    load_published(folder).save_pretrained(tmp_path / "ours")
    save_published(load_tokenizer(tmp_path / "ours"), tmp_path / "back")
    was, now = load_file(folder / "weights.safetensors"), load_file(tmp_path / "back" / "weights.safetensors")
    assert set(was) == set(now) and all(torch.equal(was[key], now[key]) for key in was)
    assert (
        json.loads((tmp_path / "back" / "config.json").read_text())
        == SIZES | {"use_shared_encoder": False} | OTHERS[name]
    )
    usage = load_published(tmp_path / "back").quantizer.books[2].usage
    shares = was["quantizer.acoustic_vocab_usage"][1]
    torch.testing.assert_close(usage, shares / shares.sum() * 19)


def test_exact_lengths_change_lengths_and_nothing_before_the_end(other):
    folder, name, (audio, codes, decoded, *_) = other
    exact = load_published(folder, exact_lengths=True)
    got = exact.encode(audio).audio_codes
    assert got.shape[-1] == 46 and codes.shape[-1] == (46 if name == "causal" else 45)
    same = 45 - exact.receptive_field_frames
    assert (got[..., :same] == codes.transpose(0, 1)[..., :same]).float().mean() >= 0.995 and same > 10
    audio_values = exact.decode(codes.transpose(0, 1)).audio_values
    assert audio_values.shape[-1] == codes.shape[-1] * 60
    short = decoded.shape[-1]
    assert (short < codes.shape[-1] * 60) == (name != "causal") and (audio_values[..., short:] == 0).all()
    torch.testing.assert_close(audio_values[..., :short], decoded, atol=1e-4, rtol=0)


def test_a_folded_model_goes_back_as_the_same_function(other, tmp_path):
    folder, _, numbers = other
    save_published(load_published(folder).fold_weight_norm(), tmp_path / "back")
    assert_parity(compare(load_published(tmp_path / "back"), *numbers))


def spoil(folder, out, config=None, drop=None, resize=None):
    values = json.loads((folder / "config.json").read_text()) | (config or {})
    tensors = load_file(folder / "weights.safetensors")
    tensors.pop(drop, None)
    if resize:
        tensors[resize] = tensors[resize][..., :-1].contiguous()
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "gone"}))
    save_file(tensors, out / "weights.safetensors")
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "decoder.model.0.bias"}, "missing or wrong.*decoder.model.0.bias"),
        ({"resize": "semantic_encoder.block.0.weight_v"}, r"semantic_encoder.block.0.weight_v is \(6, 1, 6\), not"),
        ({"config": {"decoder_dim": 80}}, "decoder.model.0"),
        ({"config": {"n_codebooks": 3}}, "quantizers.2.*not of this model"),
        ({"config": {"colour": "red"}}, "colour is unknown"),
        ({"config": {"decoder_dim": "gone"}}, "decoder_dim is missing"),
        (
            {
                "config": {"encoder_dim": "gone", "latent_dim": "gone"}
                | {f"{part}_encoder_dim": 6 for part in ("semantic", "acoustic")}
            },
            "latent_dim is missing",
        ),
        ({"config": {"dilation": [1, 2, 4]}}, r"dilation must be \[1, 3, 9\]"),
        ({"config": {"n_semantic_codebooks": 2}}, "n_semantic_codebooks must be 1"),
        ({"config": {"output_sample_rate": 24_000}}, "output_sample_rate"),
        ({"config": {"decoder_rates": [4, 3, 4]}}, "decoder_strides must be of the product of strides, 60"),
        ({"config": {"aux_decoder": {"channels": 16, "rates": [5, 8]}}}, "aux_decoder.sample_rate is missing"),
        ({"config": {"encoder_rates": 60}}, "encoder_rates must be a list"),
    ],
)
def test_errors_name_what_is_wrong(plain, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_published(spoil(plain, tmp_path / "spoilt", **change))


def test_torn_and_absent_files(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    with pytest.raises(ValueError, match="no .safetensors files: name one weights.safetensors"):
        load_tokenizer(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="weights.safetensors cannot be read.*torn"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_published(tmp_path)
    with pytest.raises(ValueError, match="neither a folder"):
        load_published("someone/else")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot get lmspt_12d5hz.*hf download kakaocorp/lmspt"):
        load_published("kakaocorp/lmspt")


def test_a_file_alone_is_read_as_the_release(tmp_path):
    save_file({"decoder.model.0.bias": torch.zeros(1536)}, tmp_path / "lmspt_12d5hz_16384_4096.safetensors")
    for source in (tmp_path, tmp_path / "lmspt_12d5hz_16384_4096.safetensors"):
        with pytest.raises(ValueError, match="acoustic_encoder.block.0.bias") as error:
            load_published(source)
        assert "decoder.model.0.bias is" not in str(error.value)  # that one fits


def test_the_release_preset_is_the_published_configuration():
    published = config_to_published(preset_config("release-12.5hz"))
    stored = {
        "sample_rate": 24_000, "encoder_rates": [4, 5, 6, 8, 2], "decoder_rates": [2, 8, 6, 5, 4], "encoder_dim": 32,
        "latent_dim": 1024, "decoder_dim": 1536, "n_codebooks": 8, "n_semantic_codebooks": 1,
        "semantic_codebook_size": 16384, "acoustic_codebook_size": 4096, "semantic_codebook_dim": 8,
        "acoustic_codebook_dim": 8, "use_shared_encoder": False, "semantic_subtraction": True,
        "aux_decoder": {"input_channel": 1024, "channels": 128, "rates": [8, 8, 5, 4], "sample_rate": 16_000},
    }  # fmt: skip
    assert published == stored
    assert config_from_published(stored).to_dict() == preset_config("release-12.5hz").to_dict()


def test_what_the_layout_cannot_hold_is_named(tmp_path):
    for key in ("encoder_architecture", "auxiliary_decoder", "semantic_encoder_layers"):
        with pytest.raises(ValueError, match=key):
            config_to_published(preset_config("nano-12.5hz", auxiliary_decoder="shared"))


def test_convert_refuses_before_it_writes(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for arguments, message in (
        ([str(tmp_path)], "give SOURCE and OUT_DIR"),
        ([str(tmp_path), str(tmp_path / "full")], "--restart"),
        ([str(tmp_path), "."], "give the new folder a name"),
        ([str(tmp_path / "absent"), str(tmp_path / "out"), "--to-published"], "no tokenizer"),
        ([str(tmp_path), str(tmp_path / "out"), "--to-published", "exact_lengths=true"], "exact_lengths"),
    ):
        result = CliRunner().invoke(cli.app, ["convert", *arguments])
        assert result.exit_code == 2 and message in result.output, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_convert_onto_a_full_disk_and_from_a_torn_folder_says_so_and_leaves_nothing(plain, tmp_path, monkeypatch):
    mine = tmp_path / "out.tmp"
    mine.mkdir()
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    load_published(plain).save_pretrained(whole)
    shutil.copytree(whole, torn)
    (torn / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:5000])
    result = CliRunner().invoke(cli.app, ["convert", str(torn), str(tmp_path / "out"), "--to-published"])
    assert result.exit_code == 2 and "torn: the weights cannot be read" in result.output, result.output

    def full(tensors, path, **_):
        Path(path).write_bytes(b"some")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("tokenizer.codecs.published.save_file", full)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    for arguments in ([str(plain)], [str(whole), "--to-published"]):
        result = CliRunner().invoke(cli.app, ["convert", arguments[0], str(tmp_path / "out"), *arguments[1:]])
        assert result.exit_code == 2 and "no space left for" in result.output, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "torn", "out.tmp"}


def test_teacher_parity_with_the_published_window_of_30_seconds():
    whisper = tiny_whisper(1500)
    with torch.no_grad():  # weights that say something: fresh ones hardly tell one sound from another
        for parameter in whisper.encoder.parameters():
            parameter.mul_(20 if parameter.ndim > 1 else 1)
    teacher = SpeechTeacher(whisper.encoder, pad_to_seconds=30)
    target = speech_like(6.0)[None]
    resynthesis = 0.2 * torch.sin(torch.arange(96_000) * 0.08)[None]
    extractor = WhisperFeatureExtractor()

    @torch.no_grad()
    def reference(waveform):
        features = extractor(waveform[0].numpy(), sampling_rate=16_000, return_tensors="pt").input_features
        return whisper.encoder(features).last_hidden_state

    wanted = torch.nn.functional.mse_loss(reference(resynthesis), reference(target))
    loss, _ = resynthesis_distillation(teacher, target, resynthesis)
    assert wanted > 0.01 and abs(loss - wanted) < 1e-4
    crop, _ = resynthesis_distillation(SpeechTeacher(whisper.encoder), target, resynthesis)
    assert abs(crop - wanted) > 0.01  # the window matters
