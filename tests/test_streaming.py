"""Causal tokenizers: the future changes nothing, and a stream in pieces of any size equals the whole."""

import pytest
import torch
from test_chunking import HOP, assert_same_sound, dac, mel, speech

from tokenizer.long_form.streaming import StreamingDecoder, StreamingEncoder, algorithmic_latency_s
from tokenizer.model.configuration import preset_config
from tokenizer.model.layers import ConvNeXtBlock, LocalAttention
from tokenizer.model.presets import PRESETS
from tokenizer.model.spectral import LogMel

MODELS = {
    "mel": lambda **kw: mel(causal=True, **kw),
    "long-windows": lambda **kw: mel(causal=True, n_fft=640, attention_window=5, **kw),
    "dac": lambda **kw: dac(causal=True, **kw),
    "dac-to-vocos": lambda **kw: dac(
        causal=True, decoder_architecture="vocos", decoder_strides=[20, 2], n_fft=80, decoder_layers=1, **kw
    ),
    "shared": lambda **kw: mel(causal=True, shared_encoder=True, auxiliary_decoder="shared", **kw),
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    return MODELS[request.param]()


def lookahead(model, resynthesis=False):
    decoder = StreamingDecoder(model, resynthesis)
    return round(decoder.algorithmic_latency_s * decoder.sampling_rate)


@torch.no_grad()
def test_the_future_changes_no_code_and_no_sample_but_the_stated_ones(model):
    hop = model.config.hop_length
    values = speech(40 * hop)
    changed = values.clone()
    changed[..., 25 * hop :] = speech(15 * hop, seed=9) * 3
    before, after = model(values), model(changed)
    assert torch.equal(before.audio_codes[..., :25], after.audio_codes[..., :25])
    torch.testing.assert_close(before.semantic_latents[..., :25], after.semantic_latents[..., :25], atol=1e-6, rtol=0)
    assert not torch.equal(before.audio_codes[..., 25:], after.audio_codes[..., 25:])
    for key, resynthesis in (("audio_values", False), ("auxiliary_values", True)):
        step = model.config.auxiliary_hop_length if resynthesis else hop
        final = 25 * step - lookahead(model, resynthesis)
        torch.testing.assert_close(before[key][..., :final], after[key][..., :final], atol=1e-6, rtol=0)
        assert not torch.equal(before[key][..., final:], after[key][..., final:])


def pieces(tensor, sizes):
    start = 0
    while start < tensor.shape[-1]:
        size = sizes[start % len(sizes)]
        yield tensor[..., start : start + size]
        start += size


@torch.no_grad()
def test_a_stream_in_pieces_of_any_size_equals_the_whole(model):
    hop = model.config.hop_length
    values = torch.cat([speech(35 * hop + 13, seed) for seed in (0, 1)])
    whole = model.encode(values).audio_codes
    encoder = StreamingEncoder(model)
    for sizes in ([hop], [7 * hop // 3, 1, hop - 1], [36 * hop]):
        found = [encoder.push(piece) for piece in pieces(values, sizes)]
        found = torch.cat([*found, encoder.flush()], dim=-1)
        assert found.shape == whole.shape
        assert (found == whole).double().mean() >= 0.995
    for resynthesis, decode in ((False, model.decode), (True, model.resynthesize)):
        expected, decoder = decode(whole).audio_values, StreamingDecoder(model, resynthesis)
        for sizes in ([1], [3, 1, 17], [36]):
            found = torch.cat([*map(decoder.push, pieces(whole, sizes)), decoder.flush()], dim=-1)
            assert_same_sound(found, expected)


@torch.no_grad()
def test_output_comes_as_soon_as_the_stated_latency_allows_and_is_final(model):
    hop = model.config.hop_length
    values = speech(9 * hop)
    whole = model.encode(values).audio_codes
    audio = model.decode(whole).audio_values
    encoder, decoder = StreamingEncoder(model), StreamingDecoder(model)
    assert encoder.algorithmic_latency_s == pytest.approx(hop / model.config.sampling_rate)
    ready = lookahead(model)
    found, n_out = [], 0
    for frame in range(9):
        assert encoder.push(values[..., frame * hop : (frame + 1) * hop - 1]).shape[-1] == 0
        codes = encoder.push(values[..., (frame + 1) * hop - 1 : (frame + 1) * hop])
        assert torch.equal(codes, whole[..., frame : frame + 1])
        samples = decoder.push(codes)
        assert n_out + samples.shape[-1] == max((frame + 1) * hop - ready, 0)
        found.append(samples)
        n_out += samples.shape[-1]
    found.append(decoder.flush())
    assert found[-1].shape[-1] == min(ready, 9 * hop)
    assert_same_sound(torch.cat(found, dim=-1), audio)


@torch.no_grad()
def test_pushes_of_nothing_and_of_less_than_a_frame_go_through_both(model):
    hop = model.config.hop_length
    values, encoder, decoder = speech(3 * hop + 5), StreamingEncoder(model), StreamingDecoder(model)
    for _ in range(2):  # after a flush the next stream begins
        blocks = [encoder.push(piece) for piece in (values[..., :0], *values.split(hop // 3 + 1, dim=-1))]
        blocks.append(encoder.flush())
        assert 0 in {codes.shape[-1] for codes in blocks}
        found, whole = torch.cat([*map(decoder.push, blocks), decoder.flush()], dim=-1), torch.cat(blocks, dim=-1)
        assert_same_sound(found, model.decode(whole).audio_values)
    assert encoder.push(values[..., :0]).shape == (1, 3, 0) == encoder.flush().shape
    assert decoder.push(blocks[0]).shape == (1, 1, 0) == decoder.flush().shape


def test_a_push_costs_the_same_however_long_the_stream_is():
    """What is kept between pushes does not grow."""
    model = MODELS["mel"]()
    encoder, decoder = StreamingEncoder(model), StreamingDecoder(model)

    def kept():
        tensors = [*encoder._cache.values(), *decoder._cache.values()]
        return sum(sum(t.numel() for t in x) if isinstance(x, tuple) else x.numel() for x in tensors)

    sizes = []
    for seed in range(12):
        decoder.push(encoder.push(speech(2 * HOP, seed)))
        sizes.append(kept())
    assert sizes[0] == sizes[-1] > 0


def test_a_tokenizer_that_reads_the_future_is_refused():
    for make in (StreamingEncoder, StreamingDecoder):
        with pytest.raises(ValueError, match="nano-12.5hz-causal"):
            make(mel())
    assert "nano-12.5hz-causal" in PRESETS


def test_wrong_use_is_named():
    model = MODELS["mel"]()
    encoder, decoder = StreamingEncoder(model), StreamingDecoder(model)
    for stream in (encoder, decoder):
        with pytest.raises(ValueError, match="nothing was pushed"):
            stream.flush()
    with pytest.raises(ValueError, match=r"\(B, 1, s\)"):
        encoder.push(torch.zeros(1, 10))
    with pytest.raises(ValueError, match="-1"):
        decoder.push(torch.tensor([[[0, -1]]]))
    encoder.push(torch.zeros(1, 1, 5))
    decoder.push(torch.zeros(1, 1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="2 streams"):
        encoder.push(torch.zeros(2, 1, 5))
    with pytest.raises(ValueError, match="2 streams"):
        decoder.push(torch.zeros(2, 1, 1, dtype=torch.int64))


@pytest.mark.parametrize("name", ["nano-25hz", "nano-12.5hz", "nano-6.25hz"])
def test_causal_presets_have_the_sizes_of_their_own_rate_and_a_known_latency(name):
    plain, causal = preset_config(name), preset_config(f"{name}-causal")
    assert causal.causal and not plain.causal
    different = {key for key in plain.to_dict() if plain.to_dict()[key] != causal.to_dict()[key]}
    assert different == {"causal"}
    from tokenizer import LMSPTModel

    with torch.device("meta"):
        model = LMSPTModel(causal)
    # one frame, and half of what a window of 640 samples has beyond its hop of 160
    assert algorithmic_latency_s(model) == pytest.approx(1 / causal.frame_rate + 240 / 16_000)


def test_causal_attention_equals_dense_attention_to_the_past():
    torch.manual_seed(0)
    layer, x, window = LocalAttention(16, 8, 4, causal=True), torch.randn(2, 17, 16), 4
    mask = torch.arange(17) < torch.tensor([17, 9])[:, None]
    q, k, v = (y.view(2, 17, 2, 8).transpose(1, 2) for y in layer.qkv(x).chunk(3, dim=-1))
    angles = torch.arange(17)[:, None] * 10_000.0 ** (-torch.arange(4) / 4)

    def turn(y):
        turned = torch.complex(y[..., :4], y[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    back = torch.arange(17)[:, None] - torch.arange(17)
    allowed = (back >= 0) & (back <= window) & mask[:, None, None]
    scores = (turn(q) @ turn(k).transpose(2, 3) / 8**0.5).masked_fill(~allowed, -1e9)
    dense = layer.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 17, 16))
    torch.testing.assert_close(layer(x, mask)[mask], dense[mask], atol=1e-5, rtol=1e-5)


def test_causal_layers_are_their_symmetric_selves_shifted():
    """Same weights, same taps: only the padding moves from both sides to the front."""
    torch.manual_seed(0)
    samples = torch.randn(1, 3_200)
    centred, late = (LogMel(16_000, 640, 160, 80, 0.0, 1.0, causal) for causal in (False, True))
    moved = torch.nn.functional.pad(samples, (240, 0))[:, :3_200]
    torch.testing.assert_close(late(samples)[:, 3:-2], centred(moved)[:, 3:-2], atol=1e-4, rtol=1e-4)
    block, late = ConvNeXtBlock(8, 7, 2, 1.0), ConvNeXtBlock(8, 7, 2, 1.0, causal=True)
    late.load_state_dict(block.state_dict())
    x = torch.randn(1, 20, 8)
    torch.testing.assert_close((late(x, None) - x)[:, 6:], (block(x, None) - x)[:, 3:-3], atol=1e-6, rtol=1e-5)
