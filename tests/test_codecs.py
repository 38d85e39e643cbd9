"""The codec protocol on every tokenizer that `load_tokenizer` knows, LM-SPT included: one contract, tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    HubertConfig,
    MimiConfig,
    MimiModel,
    Wav2Vec2BertConfig,
    Xcodec2Config,
    Xcodec2Model,
    XcodecConfig,
    XcodecModel,
)

from tokenizer import LMSPTModel, load_tokenizer
from tokenizer.codecs.supervised import SemanticQuantizerConfig
from tokenizer.codecs.transformers_codecs import EncodecCodec, XCodec2
from tokenizer.teacher.recogniser import Recogniser, RecogniserConfig, save_recogniser

KINDS = ["lmspt", "mimi", "dac", "encodec", "xcodec", "xcodec2", "supervised", "dmel-25hz"]
DECODING = [kind for kind in KINDS if kind != "supervised"]
NUMBERED = ["mimi", "dac", "encodec", "xcodec", "dmel-25hz"]


def mimi() -> MimiModel:
    sizes = {"hidden_size": 16, "num_filters": 4, "codebook_size": 16, "codebook_dim": 8, "num_quantizers": 4}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    return MimiModel(
        MimiConfig(upsampling_ratios=[5, 4], vector_quantization_hidden_dimension=8, upsample_groups=16,
                   sliding_window=8, **sizes, **layers)
    )  # fmt: skip


def dac() -> DacModel:
    # an odd stride: transformers' decoder falls short there; and a frame rate that it rounds (44100 / 40 = 1102.5)
    sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "n_codebooks": 3, "codebook_size": 16}
    return DacModel(DacConfig(downsampling_ratios=[2, 4, 5], codebook_dim=4, sampling_rate=44_100, **sizes))


def encodec() -> EncodecModel:
    sizes = {"hidden_size": 8, "num_filters": 4, "codebook_size": 16, "num_lstm_layers": 1}
    return EncodecModel(EncodecConfig(upsampling_ratios=[5, 4], target_bandwidths=[4.8, 19.2], **sizes))


def xcodec() -> XcodecModel:
    semantic = HubertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    acoustic = DacConfig(
        encoder_hidden_size=2, decoder_hidden_size=32, downsampling_ratios=[8, 5, 4, 2], hidden_size=16
    )
    return XcodecModel(
        XcodecConfig(semantic_model_config=semantic, acoustic_model_config=acoustic, codebook_size=16,
                     target_bandwidths=[0.2, 0.8])
    )  # fmt: skip


def xcodec2(**changes) -> Xcodec2Model:
    semantic = Wav2Vec2BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, output_hidden_size=16,
        num_adapter_layers=0, position_embeddings_type="relative_key", conv_depthwise_kernel_size=3,
    )  # fmt: skip
    sizes = {"hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8, "quantization_dim": 80}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "encoder_hidden_size": 2}
    config = Xcodec2Config(semantic_model_config=semantic, quantization_levels=[4, 4, 4], **sizes, **heads, **changes)
    model = Xcodec2Model(config)
    torch.nn.init.normal_(model.fc_encoder.weight)  # or all latents would be rounded to one code
    torch.nn.init.normal_(model.quantizer.project_in.weight)
    return model


def recogniser(**quantizer) -> Recogniser:
    settings = SemanticQuantizerConfig(**{"layer": 1, "codebook_size": 16, "codebook_dim": 4, **quantizer})
    sizes = {"hidden_size": 64, "encoder_layers": 2, "decoder_layers": 1, "n_mels": 20, "window_s": 0.8}
    return Recogniser.from_scratch(RecogniserConfig(**sizes, dropout=0.0, quantizer=settings))


@pytest.fixture(scope="session")
def folders(tmp_path_factory, tiny_tokenizer) -> dict[str, str]:
    """What `load_tokenizer` is given for each kind."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("codecs")
    found = {"lmspt": str(tiny_tokenizer), "supervised": str(root / "supervised"), "dmel-25hz": "dmel-25hz"}
    save_recogniser(recogniser(), root / "supervised")
    for build in (mimi, dac, encodec, xcodec, xcodec2):
        model = build()
        for name, tensor in model.state_dict().items():  # their empty books are for training to fill
            if name.endswith((".embed", ".embed_sum")):
                tensor.normal_()
        model.save_pretrained(root / build.__name__)
        found[build.__name__] = str(root / build.__name__)
    return found


@pytest.fixture(scope="session")
def tokenizers(folders) -> dict:
    return {kind: load_tokenizer(folders[kind]) for kind in KINDS}


def speech(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 1, length, generator=torch.Generator().manual_seed(seed)) * 0.3


def lengths_of(tokenizer) -> list[int]:
    hop = tokenizer.config.hop_length
    return [1, hop - 1, hop, hop + 1, 5 * hop + 3, 5 * hop, max(9 * hop - 2, 14_000 // hop * hop + 3)]


def padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Items side by side, with loud junk past each end that the mask must hide."""
    values = torch.full((len(lengths), 1, max(lengths)), 7.0)
    for row, length in enumerate(lengths):
        values[row, :, :length] = speech(length, row)[0]
    return values, torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_exact(tokenizers, kind):
    tokenizer = tokenizers[kind]
    config = tokenizer.config
    assert config.frame_rate * config.hop_length == config.sampling_rate
    assert tokenizer.trained and not tokenizer.training
    assert isinstance(tokenizer.decode_paths, tuple) and all(size > 1 for size in config.codebook_sizes)
    exact = {
        "dac": 1102.5,
        "mimi": 600.0,
        "encodec": 1200.0,
        "xcodec": 50.0,
        "xcodec2": 50.0,
        "supervised": 25.0,
        "dmel-25hz": 25.0,
    }
    assert config.frame_rate == exact.get(kind, 12.5)
    books = {"dac": 3, "mimi": 4, "encodec": 4, "xcodec": 4, "xcodec2": 1, "supervised": 1, "dmel-25hz": 80}
    assert len(config.codebook_sizes) == books.get(kind, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_singles_and_padded_equals_unpadded(tokenizers, kind):
    tokenizer = tokenizers[kind]
    lengths, hop = lengths_of(tokenizer), tokenizer.config.hop_length
    with torch.no_grad():
        together = tokenizer.encode(*padded(lengths))
        codes, agree, total = together.audio_codes, 0, 0
        assert codes.dtype == torch.int64 and codes.shape == (len(lengths), len(tokenizer.config.codebook_sizes),
                                                              -(-max(lengths) // hop))  # fmt: skip
        for row, length in enumerate(lengths):
            alone, n = tokenizer.encode(speech(length, row)).audio_codes, -(-length // hop)
            assert alone.shape == (1, codes.shape[1], n) and (alone >= 0).all()
            assert (codes[row, :, n:] == -1).all()
            assert together.audio_codes_mask[row].tolist() == [frame < n for frame in range(codes.shape[-1])]
            agree, total = agree + (codes[row, :, :n] == alone[0]).sum().item(), total + alone.numel()
    assert agree / total >= 0.995
    assert len(codes[codes >= 0].unique()) > 3  # they do say something


@pytest.mark.parametrize("kind", KINDS)
def test_recordings_of_equal_length_do_not_depend_on_their_batch(tokenizers, kind):
    """Nothing is padded here, and still kernels of another batch size may round otherwise."""
    tokenizer, length = tokenizers[kind], 7 * tokenizers[kind].config.hop_length
    values = torch.cat([speech(length, seed) for seed in range(7)])
    with torch.no_grad():
        alone = torch.cat([tokenizer.encode(one[None]).audio_codes for one in values])
        for size in (2, 7):
            together = torch.cat([tokenizer.encode(part).audio_codes for part in values.split(size)])
            assert (together == alone).float().mean() >= 0.995


def without_speech(length: int) -> dict[str, torch.Tensor]:
    click = torch.zeros(length)
    click[length // 2] = 0.9
    return {
        "silence": torch.zeros(length),
        "DC": torch.full((length,), 0.5),
        "-90 dB": 10 ** (-90 / 20) * speech(length)[0, 0] / 0.3,
        "click": click,
        "full scale": torch.ones(length) * (1 - 2 * (torch.arange(length) % 2)),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_speech_has_codes_and_finite_sound_and_moves_no_other(tokenizers, kind):
    tokenizer = tokenizers[kind]
    length = 6 * tokenizer.config.hop_length + 3
    clips = without_speech(length)
    with torch.no_grad():
        codes = tokenizer.encode(torch.stack(list(clips.values()))[:, None]).audio_codes
        sizes = torch.tensor(tokenizer.config.codebook_sizes)[:, None]
        assert ((codes >= 0) & (codes < sizes)).all()
        for name, clip in clips.items():
            mixed = tokenizer.encode(torch.stack([speech(length)[0], clip[None]])).audio_codes
            alone = tokenizer.encode(speech(length)).audio_codes
            assert (mixed[:1] == alone).float().mean() >= 0.995, name
        if kind in DECODING:
            assert tokenizer.decode(codes).audio_values.isfinite().all()


@pytest.mark.parametrize("kind", DECODING)
def test_decode_takes_what_encode_gives(tokenizers, kind):
    tokenizer = tokenizers[kind]
    lengths, hop = lengths_of(tokenizer), tokenizer.config.hop_length
    with torch.no_grad():
        codes = tokenizer.encode(*padded(lengths)).audio_codes
        together = tokenizer.decode(codes).audio_values
        cut = tokenizer.decode(codes, torch.tensor(lengths)).audio_values
        assert together.shape == (len(lengths), 1, codes.shape[-1] * hop) and together.dtype == torch.float32
        assert cut.shape == (len(lengths), 1, max(lengths))
        for row, length in enumerate(lengths):
            n = -(-length // hop)
            alone = tokenizer.decode(codes[row : row + 1, :, :n]).audio_values
            torch.testing.assert_close(together[row, 0, : n * hop], alone[0, 0], atol=1e-4, rtol=1e-4)
            assert (together[row, 0, n * hop :] == 0).all() and (cut[row, 0, length:] == 0).all()
            assert torch.equal(cut[row, 0, :length], together[row, 0, :length])
        first = tokenizer.decode(codes[:, :1]).audio_values
        assert first.shape == together.shape and torch.equal(first, together) == (codes.shape[1] == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_named(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for shape in ((10,), (1, 2, 10), (1, 1, 0)):
        with pytest.raises(ValueError, match="input_values"):
            tokenizer.encode(torch.zeros(shape))
    for mask in ([[0, 0, 0], [1, 1, 1]], [[1, 0, 1], [1, 1, 1]], [[1, 1]]):
        with pytest.raises(ValueError, match="padding_mask"):
            tokenizer.encode(torch.zeros(2, 1, 3), torch.tensor(mask))
    sizes = tokenizer.config.codebook_sizes
    wrong = {
        f"book 0 .*{sizes[0]}": [[[sizes[0]]] + [[0]] * (len(sizes) - 1)],
        f"{len(sizes) + 1} books": [[[0]] * (len(sizes) + 1)],
        "-1 may stand": [[[0, -1, 0]]],
        "shape": [[0]],
    }
    for message, codes in wrong.items():
        with pytest.raises(ValueError, match=message if kind in DECODING else "no decoder.*train-tokenizer"):
            tokenizer.decode(torch.tensor(codes))
    if kind in DECODING:
        with pytest.raises(ValueError, match="lengths"):
            tokenizer.decode(torch.zeros(1, 1, 2).long(), torch.tensor([2 * tokenizer.config.hop_length + 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprints_tell_tokenizers_apart_and_nothing_else(tokenizers, folders, kind):
    again = load_tokenizer(folders[kind])
    assert again.fingerprint("fp32") == tokenizers[kind].fingerprint("fp32")
    marks = {other: tokenizers[other].fingerprint("fp32") for other in KINDS}
    assert len(set(marks.values())) == len(KINDS)
    if list(again.parameters()):
        with torch.no_grad():
            next(again.parameters()).add_(1e-3)
        assert again.fingerprint("fp32") != marks[kind]


@pytest.mark.parametrize("kind", NUMBERED)
def test_the_number_of_books_is_a_choice(tokenizers, folders, kind):
    whole, two = tokenizers[kind], load_tokenizer(f"{folders[kind]}:2")
    assert two.config.codebook_sizes == whole.config.codebook_sizes[:2]
    assert two.fingerprint() != whole.fingerprint()
    assert two.fingerprint() == load_tokenizer(folders[kind], num_codebooks=2).fingerprint()
    values = speech(7 * whole.config.hop_length)
    codes = whole.encode(values).audio_codes[:, :2]
    assert torch.equal(two.encode(values).audio_codes, codes)
    torch.testing.assert_close(two.decode(codes).audio_values, whole.decode(codes).audio_values)
    for number in (0, 99):
        with pytest.raises(ValueError, match=f"num_codebooks={number}"):
            load_tokenizer(folders[kind], num_codebooks=number)


def test_lmspt_has_no_such_choice_and_says_so(folders):
    with pytest.raises(ValueError, match="LM-SPT.*num_codebooks=2"):
        load_tokenizer(folders["lmspt"] + ":2")
    assert isinstance(load_tokenizer(folders["lmspt"]), LMSPTModel)


def test_only_what_a_codec_can_do_is_offered(tokenizers):
    both = ("reconstruction", "semantic_reconstruction")
    assert {kind: tokenizers[kind].decode_paths for kind in KINDS} == {
        "lmspt": (*both, "resynthesis"),
        "mimi": both,
        "xcodec": both,
        "xcodec2": both[:1],
        "dac": both[:1],
        "encodec": both[:1],
        "dmel-25hz": both[:1],
        "supervised": (),
    }
    for kind in KINDS:
        assert hasattr(tokenizers[kind], "resynthesize") == ("resynthesis" in tokenizers[kind].decode_paths)


def test_an_encodec_whose_codes_do_not_say_all_is_refused():
    for change in ({"audio_channels": 2}, {"normalize": True}, {"chunk_length_s": 1.0, "overlap": 0.01}):
        model = encodec()
        for key, value in change.items():
            setattr(model.config, key, value)
        with pytest.raises(ValueError, match="encodec_24khz"):
            EncodecCodec(model)


def test_an_xcodec2_whose_two_encoders_do_not_meet_is_refused():
    with pytest.raises(ValueError, match="160 samples of 16000 Hz"):
        XCodec2(xcodec2(downsampling_ratios=[2, 2, 2, 4, 5]))


def test_folders_of_other_models_and_torn_ones_are_refused(folders, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match="'bert'.*lmspt, dac, encodec, mimi, supervised_speech_tokenizer, xcodec, xcodec2"
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="dmel-25hz"):
        load_tokenizer("dmel-26hz")
    DacConfig(downsampling_ratios=[2, 4, 5], encoder_hidden_size=8).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((Path(folders["dac"]) / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="do not fit config.json"):
        load_tokenizer(tmp_path)
