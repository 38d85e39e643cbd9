"""The codec protocol on LMSPTModel: lengths, masks, batches, books, saving, gradients, errors."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from tokenizer import LMSPTConfig, LMSPTModel, load_tokenizer
from tokenizer.model.presets import PRESETS

HOP = 320
SIZES = {
    "strides": [40, 4, 2],
    "n_fft": 160,
    "n_mels": 16,
    "latent_dim": 16,
    "codebook_sizes": [32, 16, 24],
    "codebook_dim": 4,
    "head_dim": 8,
    "attention_window": 3,
    "semantic_encoder_width": 16,
    "acoustic_encoder_width": 8,
    "decoder_width": 16,
    "auxiliary_decoder_width": 8,
}


def tiny(**kwargs):
    torch.manual_seed(0)
    model = LMSPTModel(LMSPTConfig(**{**SIZES, **kwargs})).eval()
    with torch.no_grad():  # large weights and biases, so that a leak past a mask shows
        for parameter in model.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


def speech(length, seed=0):
    return torch.randn(1, 1, length, generator=torch.Generator().manual_seed(seed)) * 0.3


def padded_batch(lengths, junk=7.0):
    """Items of the given lengths side by side, with loud junk past each end that the mask must hide."""
    values, mask = torch.full((len(lengths), 1, max(lengths)), junk), torch.zeros(len(lengths), max(lengths))
    for i, length in enumerate(lengths):
        values[i, :, :length], mask[i, :length] = speech(length, i)[0], 1
    return values, mask


LENGTHS = [1, 37, HOP - 1, HOP, HOP + 1, 5 * HOP, 23 * HOP + 11, 31 * HOP]


def test_batch_equals_singles_and_padded_equals_unpadded(model):
    values, mask = padded_batch(LENGTHS)
    with torch.no_grad():
        together = model(values, mask)
        agree = total = 0
        for i, length in enumerate(LENGTHS):
            alone = model(speech(length, i))
            n = -(-length // HOP)
            assert alone.audio_codes.shape == (1, 3, n)
            assert together.audio_codes_mask[i].tolist() == [j < n for j in range(together.audio_codes.shape[-1])]
            for name in ("semantic_latents", "quantized_semantic"):
                torch.testing.assert_close(together[name][i, :, :n], alone[name][0], atol=1e-4, rtol=0)
                assert (together[name][i, :, n:] == 0).all()
            agree += (together.audio_codes[i, :, :n] == alone.audio_codes[0]).sum().item()
            total += alone.audio_codes.numel()
            assert (together.audio_codes[i, :, n:] == -1).all()
        assert agree / total >= 0.995


def test_decoders_give_the_same_in_a_batch_as_alone(model):
    values, mask = padded_batch(LENGTHS)
    with torch.no_grad():
        codes = model.encode(values, mask).audio_codes
        for decode in (model.decode, model.resynthesize):
            together = decode(codes).audio_values
            for i, length in enumerate(LENGTHS):
                n = -(-length // HOP)
                alone = decode(codes[i : i + 1, :, :n]).audio_values
                assert alone.shape == (1, 1, n * HOP)
                torch.testing.assert_close(together[i, 0, : n * HOP], alone[0, 0], atol=1e-4, rtol=1e-4)
                assert (together[i, 0, n * HOP :] == 0).all()


def test_forward_equals_encode_then_decode(model):
    values, mask = padded_batch([3 * HOP + 5, 9 * HOP])
    with torch.no_grad():
        output = model(values, mask)
        encoded = model.encode(values, mask)
        assert torch.equal(output.audio_codes, encoded.audio_codes)
        assert torch.equal(output.audio_codes_mask, encoded.audio_codes_mask)
        decoded, spoken = model.decode(encoded.audio_codes), model.resynthesize(encoded.audio_codes)
        torch.testing.assert_close(output.audio_values, decoded.audio_values, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(output.auxiliary_values, spoken.audio_values, atol=1e-5, rtol=1e-4)
    assert model(speech(HOP + 3)).audio_values.shape == (1, 1, HOP + 3)


def test_lengths_trim_and_zero(model):
    values, mask = padded_batch([2 * HOP + 5, 4 * HOP - 9])
    with torch.no_grad():
        codes = model.encode(values, mask).audio_codes
        whole = model.decode(codes).audio_values
        cut = model.decode(codes, torch.tensor([2 * HOP + 5, 4 * HOP - 9])).audio_values
    assert whole.shape == (2, 1, 4 * HOP) and cut.shape == (2, 1, 4 * HOP - 9)
    assert torch.equal(cut[0, 0, : 2 * HOP + 5], whole[0, 0, : 2 * HOP + 5])
    assert (cut[0, 0, 2 * HOP + 5 :] == 0).all() and cut[1, 0, -1] != 0
    for wrong in ([4 * HOP, HOP], [HOP], [-1, HOP]):  # item 0 holds three frames
        with pytest.raises(ValueError, match="lengths"):
            model.decode(codes, torch.tensor(wrong))


def test_fewer_books_and_what_resynthesis_reads(model):
    with torch.no_grad():
        codes = model.encode(speech(6 * HOP)).audio_codes
        audio = [model.decode(codes[:, :k]).audio_values for k in (1, 2, 3)]
        assert not torch.equal(audio[0], audio[1]) and not torch.equal(audio[1], audio[2])
        only_semantic = model(speech(6 * HOP), semantic_only=torch.tensor([True])).audio_values
        torch.testing.assert_close(audio[0], only_semantic, atol=1e-5, rtol=1e-4)
        changed = codes.clone()
        changed[:, 1:] = 0
        assert torch.equal(model.resynthesize(codes).audio_values, model.resynthesize(changed).audio_values)
        assert torch.equal(model.resynthesize(codes[:, :1]).audio_values, model.resynthesize(codes).audio_values)


def test_a_change_outside_the_receptive_field_changes_nothing(model):
    reach = model.receptive_field_frames
    values = speech((2 * reach + 11) * HOP)
    changed = values.clone()
    middle = (reach + 5) * HOP
    changed[:, :, middle : middle + HOP] = 0.9
    with torch.no_grad():
        before, after = model(values).semantic_latents, model(changed).semantic_latents
    moved = (before != after).any(dim=1)[0].nonzero().flatten()
    assert moved.min() >= 5 and moved.max() <= 2 * reach + 5
    assert moved.numel() > 3  # and it does see its neighbours


def test_saved_and_loaded_model_is_the_same_bit_for_bit(model, tmp_path):
    model.config.trained = True
    try:
        model.save_pretrained(tmp_path)
    finally:
        model.config.trained = False
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, LMSPTModel) and loaded.trained
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    with torch.no_grad():
        ours, theirs = model(speech(7 * HOP)), loaded(speech(7 * HOP))
    assert all(torch.equal(ours[key], theirs[key]) for key in ("audio_values", "auxiliary_values", "audio_codes"))
    again = load_tokenizer(tmp_path)
    assert again.trained and not again.training and again.fingerprint() == model.fingerprint()


def test_fingerprint_follows_weights_sizes_and_precision(model):
    mark = model.fingerprint("fp32")
    assert mark == model.fingerprint() == tiny().fingerprint() and len(mark) == 64
    assert model.fingerprint("bf16") != mark
    other = tiny()
    other.update_usage(other(speech(5 * HOP)))
    assert other.fingerprint() == mark
    with torch.no_grad():
        other.quantizer.books[2].codebook.weight[0, 0] += 1e-3
    assert other.fingerprint() != mark
    zeros = [tiny() for _ in range(2)]
    for other, sign in zip(zeros, (1.0, -1.0), strict=True):
        with torch.no_grad():
            other.quantizer.books[2].codebook.weight[0, 0] = sign * 0.0
    assert zeros[0].fingerprint() == zeros[1].fingerprint() != mark
    wider = tiny()
    wider.config.mel_mean += 0.1
    assert wider.fingerprint() != mark


@pytest.mark.parametrize("part", ["decoder", "auxiliary_decoder"])
def test_a_decoder_makes_other_sound_of_the_same_codes(model, part):
    """Whether its weights or its sizes are other ones: corpora and SLMs of those codes stay good."""
    trained, deeper = tiny(), tiny(**{f"{part}_layers": 3})
    with torch.no_grad():
        next(getattr(trained, part).parameters()).add_(1e-3)
        for name, value in model.state_dict().items():
            if not name.startswith(part):
                deeper.state_dict()[name].copy_(value)
    for other in (trained, deeper):
        assert torch.equal(other.encode(speech(5 * HOP)).audio_codes, model.encode(speech(5 * HOP)).audio_codes)
        assert other.fingerprint() == model.fingerprint()
        assert other.fingerprint(sound=True) != model.fingerprint(sound=True)
    assert model.fingerprint(sound=True) == tiny().fingerprint(sound=True) != model.fingerprint()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    parts = {"book 0": model.quantizer.books[0], "acoustic books": model.quantizer.books[1:]}
    names = ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder")
    parts.update({name: getattr(model, name) for name in names})
    return {
        name: sum(p.grad.abs().sum().item() for p in part.parameters() if p.grad is not None)
        for name, part in parts.items()
    }


def test_gradients_reach_each_part():
    model = tiny().train()
    output = model(speech(8 * HOP))
    main = gradients(model, output.audio_values.square().sum())
    assert all(main[part] > 0 for part in main if part != "auxiliary_decoder") and main["auxiliary_decoder"] == 0
    auxiliary = gradients(model, model(speech(8 * HOP)).auxiliary_values.square().sum())
    assert {part for part in auxiliary if auxiliary[part] > 0} == {"semantic_encoder", "book 0", "auxiliary_decoder"}
    output = model(speech(8 * HOP))
    total = sum(output[key] for key in output if key.endswith("_loss")) + output.audio_values.square().sum()
    gradients(model, total + output.auxiliary_values.square().sum())
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_semantic_only_moves_the_decoder_and_nothing_behind_it():
    model = tiny().train()
    values = torch.cat([speech(8 * HOP, 0), speech(8 * HOP, 1)])
    output = model(values, semantic_only=torch.tensor([True, False]))
    detached = gradients(model, output.audio_values[0].square().sum())
    assert {part for part in detached if detached[part] != 0} == {"decoder"}
    output = model(values, semantic_only=torch.tensor([True, False]))
    normal = gradients(model, output.audio_values[1].square().sum())
    assert normal["semantic_encoder"] > 0 and normal["book 0"] > 0 and normal["decoder"] > 0


def test_usage_and_revival_through_the_model():
    model = tiny().train()
    output = model(*padded_batch([4 * HOP, 9 * HOP]))
    for _ in range(500):
        model.update_usage(output)
    dead = [(book.usage < 0.05).sum().item() for book in model.quantizer.books]
    assert all(n > 0 for n in dead)
    assert model.revive_dead_codes(output, torch.Generator().manual_seed(0), threshold=0.05) == dead
    assert model.revive_dead_codes(output, torch.Generator().manual_seed(0), threshold=0.05) == [0, 0, 0]
    assert model.fingerprint() != tiny().fingerprint()


def test_bf16_autocast_runs_and_gives_fp32_audio(model):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        output = model(*padded_batch([3 * HOP, 7 * HOP + 1]))
    assert output.audio_values.dtype == output.quantized.dtype == torch.float32
    assert output.audio_values.isfinite().all()


def test_auxiliary_rate_of_its_own():
    model = tiny(sampling_rate=24_000, strides=[60, 4, 2], n_fft=480, auxiliary_strides=[40, 4, 2])
    output = model(speech(5 * 480))
    assert output.audio_values.shape[-1] == 5 * 480 and output.auxiliary_values.shape[-1] == 5 * HOP
    assert model.resynthesize(output.audio_codes).audio_values.shape[-1] == 5 * HOP


@pytest.mark.parametrize("shape", [(10,), (1, 10), (1, 2, 10), (1, 1, 0), (0, 1, 10)])
def test_input_errors(model, shape):
    with pytest.raises(ValueError, match="input_values"):
        model.encode(torch.zeros(shape))


@pytest.mark.parametrize("mask", [[[0, 0, 0], [1, 1, 1]], [[1, 0, 1], [1, 1, 1]], [[0, 1, 1], [1, 1, 1]], [[1, 1]]])
def test_mask_errors(model, mask):
    with pytest.raises(ValueError, match="padding_mask"):
        model.encode(torch.zeros(2, 1, 3), torch.tensor(mask))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[[3], [16], [0]]], "book 1 .*16.*0 to 15"),
        ([[[-2], [0], [0]]], "book 0 .*-2"),
        ([[[0]] * 4], "4 books.* 3"),
        ([[[0, -1, 1]]], "-1"),
        ([[[-1, -1]]], "-1"),
        ([[[0, 1], [0, -1]]], "differ"),
        ([[0, 1]], "shape"),
        ([[[]]], "shape"),
    ],
)
def test_code_errors(model, codes, message):
    for method in (model.decode, model.resynthesize):
        with pytest.raises(ValueError, match=message):
            method(torch.tensor(codes, dtype=torch.int64))


def test_load_tokenizer_by_preset_warns_that_it_is_untrained():
    with pytest.warns(UserWarning, match="random"):
        model = load_tokenizer("nano-6.25hz")
    assert not model.trained and not model.training and model.config.frame_rate == 6.25
    codes = model.encode(speech(2561)).audio_codes
    assert codes.shape == (1, 8, 2) and model.decode(codes[:, :1]).audio_values.shape == (1, 1, 5120)


def test_load_tokenizer_errors_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError) as error:
        load_tokenizer("nano-13hz")
    assert all(word in str(error.value) for word in (*PRESETS, "config.json", "model.safetensors"))
    with pytest.raises(ValueError, match=r"absent'?: no such folder.*slm train-tokenizer.*embedded-12.5hz"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match="a file; give the folder"):
        load_tokenizer(Path(__file__))
    with pytest.raises(ValueError, match="no config.json and no model.safetensors"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="'whisper', not 'lmspt'"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="someone/no-such-tokenizer.*hf download"):
        load_tokenizer("someone/no-such-tokenizer")


def test_load_tokenizer_refuses_weights_that_do_not_fit(model, tmp_path):
    model.save_pretrained(tmp_path)
    LMSPTConfig(**{**SIZES, "codebook_sizes": [32, 16, 24, 8]}).save_pretrained(tmp_path)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="do not fit config.json.*books.3"):
        warnings.simplefilter("ignore")
        load_tokenizer(tmp_path)
