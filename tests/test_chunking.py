"""Long audio: chunks equal the whole, in batches and from a stream of blocks too, and what goes through is bounded."""

import numpy as np
import pytest
import soundfile
import torch
from test_tokenizer_protocol import SIZES

from tokenizer import LMSPTConfig, LMSPTModel
from tokenizer.data.audio import load_audio
from tokenizer.data.utterances import AudioError, Utterance
from tokenizer.long_form.chunking import (
    can_chunk,
    decode_blocks,
    decode_latents_long,
    decode_long,
    encode_blocks,
    encode_long,
    resynthesize_long,
)
from tokenizer.long_form.chunking import windows as cut
from tokenizer.long_form.long_audio import LongAudio

HOP = 320
LONG = 150 * HOP + 77

DAC = {
    "encoder_architecture": "dac",
    "decoder_architecture": "dac",
    "auxiliary_decoder_architecture": "dac",
    "strides": [2, 5, 4],
    "decoder_strides": [2, 5, 4],
    "latent_dim": 16,
    "codebook_sizes": [32, 16, 24],
    "codebook_dim": 4,
    "head_dim": 8,
    "attention_window": 3,
    "semantic_encoder_width": 4,
    "acoustic_encoder_width": 4,
    "semantic_encoder_layers": 1,
    "acoustic_encoder_layers": 1,
    "decoder_width": 32,
    "auxiliary_decoder_width": 16,
    "decoder_layers": 0,
    "auxiliary_decoder_layers": 0,
}


def speech(length, seed=0):
    """(1, 1, S) noise and a tone whose level and pitch change every 50 ms, so that codes change too."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(2, -(-length // 800), generator=generator).repeat_interleave(800, dim=1)[:, :length]
    tone = torch.sin(torch.cumsum(0.02 + steps[1], dim=0))
    return (10 ** (-2 * steps[0]) * (tone + 0.3 * torch.randn(length, generator=generator)))[None, None]


def padded_batch(lengths):
    values, mask = torch.full((len(lengths), 1, max(lengths)), 7.0), torch.zeros(len(lengths), max(lengths))
    for i, length in enumerate(lengths):
        values[i, :, :length], mask[i, :length] = speech(length, i)[0], 1
    return values, mask


def lively(sizes):
    """A tiny model whose codes follow its input: larger weights, and books made of latents of such speech.

    A DAC decoder's gains stay as they are: larger ones drive nearly every sample to -1 or 1, where differences hide,
    and the few in between blow rounding up a thousandfold.
    """
    torch.manual_seed(0)
    model = LMSPTModel(LMSPTConfig(**sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "original1" not in name and not ("decoder" in name and "original0" in name):
                parameter.mul_(4)
        model.revive_dead_codes(model(speech(LONG, 99)), torch.Generator().manual_seed(0), threshold=1e9)
        for book in model.quantizer.books:  # no two entries alike: a tie would be the rounding's to break
            book.codebook.weight.add_(0.2 * book.codebook.weight.std() * torch.randn_like(book.codebook.weight))
    return model


def mel(**kwargs):
    return lively({**SIZES, **kwargs})


def dac(**kwargs):
    return lively({**DAC, **kwargs})


MODELS = {
    "mel": mel,
    "mel-causal": lambda: mel(causal=True),
    "mel-two-rungs": lambda: mel(strides=[40, 8], attention_window=5),
    "dac": dac,
    "dac-causal": lambda: dac(causal=True),
    "dac-published-lengths": lambda: dac(exact_lengths=False),
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return MODELS[request.param]()


def chunk_of(model, frames):
    return frames / model.config.frame_rate


def assert_same_sound(found, expected, share=1e-4):
    """Equal within a share of the loudest sample: a hundred times what rounding makes of it, whatever adds up how."""
    torch.testing.assert_close(found, expected, atol=share * expected.abs().max().item(), rtol=0)


def agreement(a, b):
    return (a == b).double().mean().item()


def test_windows_cover_each_frame_once_and_reach_both_ways():
    found = list(cut(23, 10, 3))
    assert [(w.start, w.first, w.last, w.stop) for w in found] == [(0, 0, 10, 13), (7, 10, 20, 23), (17, 20, 23, 23)]


@torch.no_grad()
def test_chunks_equal_the_whole(model):
    hop = model.config.hop_length
    values = speech(120 * hop + 7)
    whole = model.encode(values).audio_codes
    assert min(len(book.unique()) for book in whole[0]) > 3  # there is something to agree on
    for frames in (7, 50, 1000):
        cut_up = encode_long(model, values, chunk_of(model, frames))
        assert cut_up.audio_codes.shape == whole.shape and cut_up.audio_codes_mask.all()
        assert agreement(cut_up.audio_codes, whole) >= 0.995
    for long, short in ((decode_long, model.decode), (resynthesize_long, model.resynthesize)):
        assert_same_sound(long(model, whole, chunk_of(model, 19)).audio_values, short(whole).audio_values)
        lengths = torch.tensor([100 * hop + 3])
        cut_up = long(model, whole, chunk_of(model, 19), lengths).audio_values
        assert_same_sound(cut_up, short(whole, lengths).audio_values)


@torch.no_grad()
def test_less_context_than_the_receptive_field_would_show(model, monkeypatch):
    """The figures above mean something only if they fail without the overlap."""
    values = speech(120 * model.config.hop_length)
    whole = model.encode(values).audio_codes
    audio = model.decode(whole).audio_values
    monkeypatch.setattr(type(model), "receptive_field_frames", 0)
    monkeypatch.setattr(type(model), "decoder_receptive_field_frames", 0)
    assert agreement(encode_long(model, values, chunk_of(model, 10)).audio_codes, whole) < 0.995
    chunks = decode_long(model, whole, chunk_of(model, 10)).audio_values
    n_samples = min(audio.shape[-1], chunks.shape[-1])
    audio, chunks = audio[..., :n_samples], chunks[..., :n_samples]
    assert audio.abs().max() < 0.9  # where the decoder ends in a tanh it has not run into its ends
    assert (chunks - audio).abs().max() > 0.1 * audio.abs().max()


def fill(sizes, total):
    """The sizes up to a total: what is over is cut off, what is missing comes last."""
    ends = [min(end, total) for end in torch.tensor(sizes).cumsum(0).tolist()]
    return [b - a for a, b in zip([0, *ends], [*ends, total], strict=True)]


@torch.no_grad()
def test_blocks_of_any_size_give_the_same_codes(model):
    hop = model.config.hop_length
    values = speech(90 * hop + 5)
    whole = model.encode(values).audio_codes[0]
    for sizes in ([90 * hop + 5], [3 * hop + 1] * 31, [1, hop, 40 * hop, 2, 60 * hop]):
        blocks = values[0, 0].split(fill(sizes, values.shape[-1]))
        parts = list(encode_blocks(model, blocks, chunk_of(model, 20)))
        found = torch.cat(parts, dim=1)
        assert len(parts) >= 2 and found.shape == whole.shape
        assert agreement(found, whole) >= 0.995
    exact = torch.cat(list(encode_blocks(model, values[0, 0, : 90 * hop].split(hop), chunk_of(model, 30))), dim=1)
    assert exact.shape[1] == 90
    with pytest.raises(ValueError, match="no sample"):
        list(encode_blocks(model, []))


LENGTHS = [3, LONG, 41 * HOP, 40 * HOP, 39 * HOP + 9, 1]


@torch.no_grad()
def test_a_batch_of_very_different_lengths_equals_singles_cut_or_whole():
    model = mel()
    values, mask = padded_batch(LENGTHS)
    together = {"whole": model.encode(values, mask), "chunks": encode_long(model, values, chunk_of(model, 20), mask)}
    for output in together.values():
        agree = total = 0
        for i, length in enumerate(LENGTHS):
            n = -(-length // HOP)
            alone = model.encode(speech(length, i)).audio_codes[0]
            assert output.audio_codes_mask[i].sum() == n and (output.audio_codes[i, :, n:] == -1).all()
            agree += (output.audio_codes[i, :, :n] == alone).sum().item()
            total += alone.numel()
        assert agree / total >= 0.995
    codes = together["whole"].audio_codes
    for long, short in ((decode_long, model.decode), (resynthesize_long, model.resynthesize)):
        batch, cut_up = short(codes).audio_values, long(model, codes, chunk_of(model, 20)).audio_values
        assert_same_sound(cut_up, batch)
        for i, length in enumerate(LENGTHS):
            n = -(-length // HOP)
            alone = short(codes[i : i + 1, :, :n]).audio_values[0, 0]
            assert_same_sound(batch[i, 0, : n * HOP], alone)
            assert (batch[i, 0, n * HOP :] == 0).all()


@torch.no_grad()
def test_chunks_of_padding_alone_are_no_obstacle(model):
    hop = model.config.hop_length
    values, mask = padded_batch([30 * hop, 12 * hop + 1])
    values, mask = (torch.nn.functional.pad(x, (0, 60 * hop + 3)) for x in (values, mask))
    whole, cut_up = model.encode(values, mask), encode_long(model, values, chunk_of(model, 10), mask)
    assert torch.equal(cut_up.audio_codes_mask, whole.audio_codes_mask)
    assert agreement(cut_up.audio_codes, whole.audio_codes) >= 0.995
    for long, short in ((decode_long, model.decode), (resynthesize_long, model.resynthesize)):
        found = long(model, whole.audio_codes, chunk_of(model, 10)).audio_values
        assert_same_sound(found, short(whole.audio_codes).audio_values)


@torch.no_grad()
def test_latents_in_chunks_are_their_codes_whole(model):
    hop = model.config.hop_length
    values, mask = padded_batch([60 * hop, 12 * hop + 1])
    encoded = model.encode(*(torch.nn.functional.pad(x, (0, 40 * hop)) for x in (values, mask)))
    latents = model.latents_of(encoded.audio_codes)
    whole = model.decode(encoded.audio_codes).audio_values
    assert_same_sound(
        model.decode_latents(latents + ~encoded.audio_codes_mask[:, None], encoded.audio_codes_mask).audio_values, whole
    )
    for codec in (model, WholeOnly(model)):
        found = decode_latents_long(codec, latents, encoded.audio_codes_mask, chunk_of(model, 10))
        assert_same_sound(found.audio_values, whole)
    with pytest.raises(ValueError, match="latents must be of shape"):
        model.decode_latents(latents[:, 1:])


@torch.no_grad()
def test_what_goes_through_at_once_is_bounded(monkeypatch):
    model, sizes = mel(), []
    encode, decode = model.encode, model.decode
    monkeypatch.setattr(model, "encode", lambda x, m=None: sizes.append(x.shape[-1] // HOP) or encode(x, m))
    monkeypatch.setattr(model, "decode", lambda c, n=None: sizes.append(c.shape[-1]) or decode(c, n))
    codes = encode_long(model, speech(LONG), chunk_of(model, 20)).audio_codes
    list(encode_blocks(model, speech(LONG)[0, 0].split(HOP), chunk_of(model, 20)))
    assert max(sizes) <= 20 + 2 * model.receptive_field_frames < 100
    sizes.clear()
    list(decode_blocks(model, codes, chunk_of(model, 20)))
    assert len(sizes) == 8 and max(sizes) <= 20 + 2 * model.decoder_receptive_field_frames < 100


class WholeOnly:
    """A codec that states no receptive field: what transformers' codecs are behind the protocol."""

    def __init__(self, model):
        self.config, self.encode, self.decode = model.config, model.encode, model.decode
        self.decode_latents = model.decode_latents


@torch.no_grad()
def test_a_codec_without_a_receptive_field_takes_the_whole():
    model = mel()
    codec, values = WholeOnly(model), speech(60 * HOP + 5)
    codes = model.encode(values).audio_codes
    assert can_chunk(model) and not can_chunk(codec)
    assert torch.equal(encode_long(codec, values, 0.1).audio_codes, codes)
    assert torch.equal(next(encode_blocks(codec, values[0, 0].split(999), 0.1)), codes[0])
    assert torch.equal(decode_long(codec, codes, 0.1).audio_values, model.decode(codes).audio_values)


def test_a_chunk_needs_a_length():
    for chunk_s in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="chunk_s"):
            encode_long(mel(), speech(HOP), chunk_s)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mel", "mel-causal", "dac", "dac-causal"])
def test_a_code_outside_the_decoder_s_receptive_field_changes_no_sample(name):
    model = MODELS[name]()
    reach, hop = model.decoder_receptive_field_frames, model.config.hop_length
    codes = model.encode(speech((2 * reach + 11) * hop)).audio_codes
    changed = codes.clone()
    changed[:, :, reach + 5] = (changed[:, :, reach + 5] + 1) % 16
    for decode, step in ((model.decode, hop), (model.resynthesize, model.config.auxiliary_hop_length)):
        moved = (decode(codes).audio_values != decode(changed).audio_values)[0, 0].nonzero().flatten() // step
        assert moved.min() >= 5 and moved.max() <= 2 * reach + 5
        assert moved.unique().numel() > 1


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2)])
def test_a_recording_read_in_blocks_is_the_recording(tmp_path, monkeypatch, rate, channels):
    monkeypatch.setattr("tokenizer.long_form.long_audio.BLOCK_S", 0.3)
    samples = speech(2 * rate)[0, 0].numpy() / 5
    soundfile.write(tmp_path / "a.wav", np.stack([samples] * channels, axis=1), rate)
    utterance = Utterance("a", str(tmp_path / "a.wav"))
    recording, whole = LongAudio(utterance, 16_000), load_audio(utterance, 16_000)
    blocks = list(recording.blocks())
    assert len(blocks) >= 7 and recording.peak == pytest.approx(np.abs(samples).max(), abs=1e-4)
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    faster = np.concatenate(list(recording.blocks(speed=1.05)))
    assert len(faster) == pytest.approx(len(whole) / 1.05, abs=2)


def test_blocks_of_an_mp3_are_the_whole_though_its_decoder_has_a_memory(tmp_path, monkeypatch):
    """Frames of few bits lend each other theirs, so that a block cannot be decoded from its own begin."""
    monkeypatch.setattr("tokenizer.long_form.long_audio.BLOCK_S", 0.7)
    samples = np.random.default_rng(0).normal(scale=0.1, size=5 * 24_000)
    settings = {"bitrate_mode": "CONSTANT", "compression_level": 0.95}
    soundfile.write(tmp_path / "a.mp3", samples, 24_000, format="MP3", subtype="MPEG_LAYER_III", **settings)
    utterance = Utterance("a", str(tmp_path / "a.mp3"))
    for rate in (24_000, 16_000):
        whole = load_audio(utterance, rate)
        assert np.abs(np.concatenate(list(LongAudio(utterance, rate).blocks())) - whole).max() < 1e-6


def test_a_long_recording_is_refused_as_a_short_one_is(tmp_path):
    bad = {"nan.wav": np.full(16_000, np.nan), "silent.wav": np.zeros(16_000), "long.wav": np.ones(48_000) * 0.1}
    bad["short.wav"] = np.ones(20) * 0.1
    for name, samples in bad.items():
        soundfile.write(tmp_path / name, samples.astype(np.float32), 16_000, subtype="FLOAT")
    (tmp_path / "words.wav").write_text("this is no audio")
    for name in (*bad, "words.wav", "missing.wav"):
        messages = []
        for read in (load_audio, LongAudio):
            with pytest.raises(AudioError) as error:
                read(Utterance(name, str(tmp_path / name)), 16_000, 2.5)
            messages.append(str(error.value).split(",")[0].split(": 3.0 s")[0])
        assert name in messages[0] and (name == "long.wav" or messages[0] == messages[1])
