"""`slm encode` with precision=auto: bf16 only where book 0 agrees with fp32, and one decision for a whole run."""

from __future__ import annotations

import json

import pytest
import torch

from recipes.commands import encode
from recipes.commands.encode import Config
from recipes.encoding import encoder
from slm.corpus import CodedCorpus
from tokenizer import LMSPTModel, load_tokenizer
from tokenizer.codecs.base import Codec
from tokenizer.data.utterances import DataSource
from tokenizer.long_form.streaming import StreamingDecoder, StreamingEncoder
from tokenizer.model.configuration import preset_config
from tokenizer.model.quantizer import VectorQuantizer
from tokenizer.precision import exact_fp32, precision_agreement
from tokenizer.protocol import CodecConfig, LMSPTEncoderOutput
from tokenizer.teacher.whisper import at_teacher_rate
from tokenizer.training.losses import LossWeights, MultiScaleMelLoss
from tokenizer.training.objective import Objective
from tokenizer.training.validation import validate


@pytest.fixture
def config(tmp_path, tiny_tokenizer, make_corpus):
    data = [DataSource(str(make_corpus(6)))]
    return Config(run_dir=str(tmp_path / "codes"), tokenizer=str(tiny_tokenizer), data=data)


@pytest.fixture
def fast_bf16(config, monkeypatch):
    """`auto` as on hardware that multiplies bf16 fast, and a place to set what is measured there."""
    config.precision = "auto"
    monkeypatch.setattr(
        encode, "resolve_precision", lambda precision, device: "bf16" if precision == "auto" else precision
    )
    measured = []

    def agreement(tokenizer, values, mask, precision):
        measured.append((precision, tuple(values.shape)))
        return [fast_bf16.book_0, 0.5, 0.5]

    def fast_bf16(book_0):
        fast_bf16.book_0 = book_0
        monkeypatch.setattr(encoder, "precision_agreement", agreement)
        return measured

    return fast_bf16


def test_auto_takes_bf16_only_where_book_0_agrees_and_a_resumed_run_keeps_what_was_decided(
    config, fast_bf16, tiny_tokenizer, caplog
):
    measured = fast_bf16(0.989)
    with caplog.at_level("WARNING", logger="slm"):
        corpus = CodedCorpus.open(encode.run(config))
    assert len(measured) == 1 and measured[0][0] == "bf16"
    assert "book 0 has fp32's code in 98.90 % of frames" in caplog.text
    assert corpus.metadata.precision == "fp32"
    assert corpus.metadata.fingerprint == load_tokenizer(tiny_tokenizer).fingerprint("fp32")

    config.run_dir += "-agreeing"
    measured = fast_bf16(0.99)
    folder = encode.run(config)
    shards = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    corpus = CodedCorpus.open(folder)
    assert corpus.metadata.precision == "bf16"
    assert corpus.metadata.fingerprint == load_tokenizer(tiny_tokenizer).fingerprint("bf16")
    # Cut off before the index, and now it would be measured otherwise: it goes on as it was begun.
    begun = {"format": corpus.index["format"], "metadata": corpus.index["metadata"]}
    (folder / "begun.json").write_text(json.dumps(begun))
    for name in ("index.json", "complete.json", min(shards)):
        (folder / name).unlink()
    fast_bf16(0.5)
    assert CodedCorpus.open(encode.run(config)).metadata.precision == "bf16"
    assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == shards


def test_a_plan_says_how_far_a_lower_precision_agrees_book_by_book(config, fast_bf16):
    fast_bf16(0.995)
    plan = encode.plan(config)
    assert plan["precision"] == "bf16" and plan["frames as in fp32, by book (%)"] == [99.5, 50.0, 50.0]


def test_agreement_counts_valid_frames_of_each_book():
    class Off(torch.nn.Module):
        """Under autocast every fourth code of book 1 is another one, and so is all padding."""

        def encode(self, values, mask):
            codes = torch.arange(8).repeat(2, 2, 1)
            valid = torch.ones(2, 8, dtype=torch.bool)
            valid[1, 4:] = False
            if torch.is_autocast_enabled("cpu"):
                codes[:, 1, ::4] += 1
                codes[1, :, 4:] = -2
            return LMSPTEncoderOutput(audio_codes=codes, audio_codes_mask=valid)

    found = precision_agreement(Off(), torch.zeros(2, 1, 80), None, "bf16")
    assert found == pytest.approx([1.0, 0.75])
    assert precision_agreement(Off(), torch.zeros(2, 1, 80), None, "fp32") == [1.0, 1.0]


# What a GPU computes fp32 in is decided by these, which a CPU has too.
def switches():
    """The older ones, and where torch has them the newer ones."""
    found = [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]
    if hasattr(torch.backends.cudnn, "conv"):
        found += [torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision]
    return found


EXACT = ["highest", False, "ieee", "ieee"]


@pytest.fixture
def loose():
    """TF32 wherever torch allows it; it must stand so afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    asked = switches()
    assert asked[:2] == ["high", True]
    yield asked
    assert switches() == asked
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def seen(monkeypatch):
    """The switches as each module of torch's own finds them, while it computes."""
    found = []

    def noted(real):
        def forward(self, *args, **kwargs):
            found.append(switches())
            return real(self, *args, **kwargs)

        return forward

    for kind in (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.ConvTranspose1d):
        monkeypatch.setattr(kind, "forward", noted(kind.forward))
    return found


def assert_exact(seen):
    assert seen and all(found == EXACT[: len(found)] for found in seen), seen[:1]
    seen.clear()


def test_codes_of_fp32_are_not_tf32s_whoever_asks_for_them(tiny_tokenizer, loose, seen):
    """A fingerprint says fp32; what cuDNN calls so by default has 10 bits of mantissa."""
    tokenizer, values = load_tokenizer(tiny_tokenizer).eval(), torch.randn(1, 1, 4000)
    codes = tokenizer.encode(values).audio_codes
    assert_exact(seen)
    tokenizer.decode(codes)
    assert_exact(seen)
    tokenizer.resynthesize(codes)
    assert_exact(seen)
    with torch.autocast("cpu", torch.bfloat16):  # its quantizer, look-up and spectra stay fp32
        tokenizer.encode(values)
    assert_exact(seen)
    validate(tokenizer, [values], Objective(LossWeights(), MultiScaleMelLoss(16000), None, 0.0))
    assert_exact(seen)
    with pytest.raises(ValueError, match="audio_codes"):  # the switches are set back on the way out, too
        tokenizer.decode(codes.float())


def test_streams_are_exact_too(tiny_tokenizer, loose, seen):
    sizes = load_tokenizer(tiny_tokenizer).config.to_diff_dict()
    sizes = {k: v for k, v in sizes.items() if k.endswith(("_width", "_dim", "codebook_sizes"))}
    model = LMSPTModel(preset_config("nano-12.5hz-causal", **sizes)).eval()
    codes = StreamingEncoder(model).push(torch.randn(1, 1, 4000))
    assert_exact(seen)
    StreamingDecoder(model).push(codes)
    assert_exact(seen)


def test_other_codecs_are_exact_too(loose, seen):
    class Net(Codec):
        def __init__(self):
            super().__init__(torch.nn.Linear(10, 10), CodecConfig("net", 100, 10, [4]))

        def encode_frames(self, samples):
            return self.model(samples.unflatten(-1, (-1, 10))).argmax(-1) % 4

        def decode_frames(self, codes):
            return self.model(codes[..., None].float().expand(*codes.shape, 10)).flatten(1)

    codec = Net()
    codes = codec.encode(torch.randn(1, 1, 40)).audio_codes
    assert_exact(seen)
    codec.decode(codes)
    assert_exact(seen)


def test_a_trainings_parts_that_stay_fp32_are_exact_the_rest_is_as_asked(tiny_tokenizer, loose, seen, monkeypatch):
    """Look-up, losses and resampling; the encoders may be fast."""
    latents, exact = torch.randn(1, 5, 16), []
    book, real = VectorQuantizer(16, 8, 4), torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: exact.append(switches()) or real(*a))
    book(latents, None)
    book.look_up(torch.zeros(1, 5, dtype=torch.int64), None)
    convolve = torch.nn.functional.conv1d
    monkeypatch.setattr(torch.nn.functional, "conv1d", lambda *a, **k: exact.append(switches()) or convolve(*a, **k))
    at_teacher_rate(torch.randn(1, 1, 240), 24000)
    assert len(exact) == 4
    assert_exact(exact)
    model = load_tokenizer(tiny_tokenizer).train()
    model.semantic_encoder.register_forward_hook(lambda *_: exact.append(switches()))
    model(torch.randn(1, 1, 4000))
    assert loose in exact


def test_threads_inside_at_once_share_the_switches_and_the_last_one_sets_them_back(loose):
    first, second = exact_fp32(), exact_fp32()
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert switches() == EXACT[: len(loose)]
    second.__exit__()
    assert switches() == loose
