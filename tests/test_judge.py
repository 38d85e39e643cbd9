"""Judges: tiny models built here, saved, loaded and read; pocketsphinx on real speech."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from eval.judges.config import JudgeConfig, JudgeError
from eval.judges.judge import Judge, check_judge, load_judge
from eval.judges.readers import collapse
from eval.speech.audio import resample, split_at_quiet

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CHARACTERS = ["<pad>", "<s>", "</s>", "<unk>", " ", *"abcdefghijklmnopqrstuvwxyz'"]


def character_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random home-made recogniser: one-second window, 40 ids, no language tokens, and a CTC head."""
    folder = tmp_path_factory.mktemp("recogniser") / "model"
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=40, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=40, max_source_positions=50,
        max_target_positions=48, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():  # wide weights, so that the random model says something
        for parameter in model.model.decoder.parameters():
            parameter.mul_(8)
    # Whisper's default lists of suppressed ids lie outside this vocabulary: the judge has to cope.
    model.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, begin_suppress_tokens=[220, 50256]
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=40, chunk_length=1).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    save_file({"weight": torch.randn(40, 32), "bias": torch.randn(40)}, folder / "ctc_head.safetensors")
    return folder


def clips() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [0.1 * rng.standard_normal(int(16_000 * s)).astype(np.float32) for s in (0.3, 1.0, 2.7, 0.004)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 2}, {"decoding": "ctc"}, {"decoding": "joint"}, {"decoding": "joint", "num_beams": 2}],
)
def test_home_made_recogniser_reads_any_length_and_batching_changes_nothing(whisper_folder, settings) -> None:
    batched = load_judge(JudgeConfig(name=str(whisper_folder), batch_size=8, **settings))
    alone = load_judge(JudgeConfig(name=str(whisper_folder), batch_size=1, **settings))
    texts = batched.transcribe(clips(), 16_000)
    assert texts == alone.transcribe(clips(), 16_000)
    assert len(texts) == 4 and any(texts)
    assert batched.window_s == 1.0 and batched.name == whisper_folder.parent.name
    # At most 10 + 25 tokens for each second, of each of three or four pieces.
    assert all(len(text) <= 10 + 25 * 1.0 for text in texts[:2]) and len(texts[2]) <= 4 * 36


def test_one_long_clip_does_not_pad_the_others() -> None:
    """Pieces of like length are read together, bounded in seconds and in number."""
    rate, read = 100, []

    def reader(pieces: list[np.ndarray]) -> list[str]:
        read.append([len(piece) / rate for piece in pieces])
        return [str(len(piece)) for piece in pieces]

    clips = [np.ones(round(rate * s), np.float32) for s in (1.0, 25.0, 1.5, 2.0, 1.2, 24.0, 1.1, 1.3)]
    texts = Judge({"name": "j"}, rate, 30.0, 4, 40.0, reader).transcribe(clips, rate)
    assert texts == [str(len(clip)) for clip in clips]
    assert sorted(read) == [[1.0, 1.1, 1.2, 1.3], [1.5, 2.0], [24.0], [25.0]]
    read.clear()
    Judge({"name": "j"}, rate, 30.0, 100, 240.0, reader).transcribe(clips, rate)
    assert sorted(map(len, read)) == [2, 6]
    with pytest.raises(JudgeError, match="batch_seconds must be positive"):
        JudgeConfig(batch_seconds=0)


def test_a_whisper_window_counts_in_full(whisper_folder) -> None:
    judge = load_judge(JudgeConfig(name=str(whisper_folder), batch_size=8, batch_seconds=3.0))
    assert (judge.window_s, judge.batch_size) == (1.0, 3)


def test_identity_pins_weights_and_decoding(whisper_folder, tmp_path) -> None:
    config = JudgeConfig(name=str(whisper_folder), label="mine")
    identity = check_judge(config)
    assert identity == load_judge(config).identity and json.dumps(identity)
    assert (identity["name"], identity["kind"], identity["decoding"]) == ("mine", "seq2seq", "attention")
    assert len(identity["weights_sha256"]) == 64
    ctc = check_judge(JudgeConfig(name=str(whisper_folder), decoding="ctc"))
    assert (ctc["kind"], ctc["weights_sha256"]) == ("ctc-head", identity["weights_sha256"])
    save_file({"weight": torch.zeros(40, 32), "bias": torch.zeros(40)}, whisper_folder / "other.safetensors")
    assert check_judge(config)["weights_sha256"] != identity["weights_sha256"]
    (whisper_folder / "other.safetensors").unlink()


def test_joint_decoding_stands_in_the_protocol_and_heeds_the_head(whisper_folder) -> None:
    name = str(whisper_folder)
    identity = check_judge(JudgeConfig(name=name, decoding="joint", ctc_weight=0.4, num_beams=2))
    assert (identity["kind"], identity["decoding"], identity["ctc_weight"]) == ("seq2seq", "joint", 0.4)
    assert "ctc_weight" not in check_judge(JudgeConfig(name=name))

    def reads(**settings) -> list[str]:
        return load_judge(JudgeConfig(name=name, **settings)).transcribe(clips()[:2], 16_000)

    alone = reads()
    assert reads(decoding="joint", ctc_weight=0.0) == alone
    head = {"weight": torch.zeros(40, 32), "bias": torch.full((40,), -20.0)}
    head["bias"][CHARACTERS.index("q")] = 20.0  # it hears a single q, whatever the decoder would say
    original = (whisper_folder / "ctc_head.safetensors").read_bytes()
    save_file(head, whisper_folder / "ctc_head.safetensors")
    try:
        assert reads(decoding="joint", ctc_weight=0.99) == ["q", "q"] != alone
    finally:
        (whisper_folder / "ctc_head.safetensors").write_bytes(original)


def test_ctc_head_says_what_its_weights_say(whisper_folder) -> None:
    head = {"weight": torch.zeros(40, 32), "bias": torch.zeros(40)}
    head["bias"][CHARACTERS.index("q")] = 1.0
    original = (whisper_folder / "ctc_head.safetensors").read_bytes()
    save_file(head, whisper_folder / "ctc_head.safetensors")
    try:
        judge = load_judge(JudgeConfig(name=str(whisper_folder), decoding="ctc"))
        assert judge.transcribe([clips()[1]], 16_000) == ["q"]
        head["bias"][0] = 2.0  # blank
        save_file(head, whisper_folder / "ctc_head.safetensors")
        judge = load_judge(JudgeConfig(name=str(whisper_folder), decoding="ctc"))
        assert judge.transcribe([np.ones(8000, np.float32)], 16_000) == [""]
    finally:
        (whisper_folder / "ctc_head.safetensors").write_bytes(original)


def testcollapse() -> None:
    assert collapse([0, 5, 5, 0, 5, 6, 6, 0], blank=0) == [5, 5, 6]


def test_wav2vec2(tmp_path) -> None:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(CHARACTERS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(16, 16), conv_stride=(10, 16), conv_kernel=(10, 16), num_feat_extract_layers=2, pad_token_id=0,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, feat_extract_norm="group",
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    model.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    judge = load_judge(JudgeConfig(name=str(tmp_path)))
    assert judge.identity["kind"] == "ctc"
    together = judge.transcribe(clips(), 16_000)
    assert together == [judge.transcribe([clip], 16_000)[0] for clip in clips()] and any(together)
    with pytest.raises(JudgeError, match="num_beams=4 needs decoding=attention"):
        check_judge(JudgeConfig(name=str(tmp_path), num_beams=4))


def test_clear_errors(whisper_folder, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(JudgeError, match="nowhere/at-all.*neither a local model folder"):
        check_judge(JudgeConfig(name="nowhere/at-all"))
    with monkeypatch.context() as context:
        context.setattr("transformers.AutoConfig.from_pretrained", None)  # no hub is asked
        with pytest.raises(JudgeError, match="'whisper-bse': no such folder, and a hub name is `owner/name`"):
            check_judge(JudgeConfig(name="whisper-bse"))
    with pytest.raises(JudgeError, match="decoding must be one of auto, attention, ctc, joint"):
        JudgeConfig(decoding="viterbi")
    with pytest.raises(JudgeError, match="batch_size must be positive"):
        JudgeConfig(batch_size=0)
    with pytest.raises(JudgeError, match="ctc_weight=1.5 must lie between"):
        JudgeConfig(ctc_weight=1.5)
    with pytest.raises(JudgeError, match="processes=2 is for pocketsphinx alone"):
        check_judge(JudgeConfig(name=str(whisper_folder), processes=2))
    judge = load_judge(JudgeConfig(name=str(whisper_folder), decoding="ctc"))
    for bad in (np.zeros(0), np.array([np.nan] * 2000), np.zeros((2, 100))):
        with pytest.raises(ValueError, match="waveform 0"):
            judge.transcribe([bad.astype(np.float32)], 16_000)


def test_missing_pocketsphinx_names_the_extra(monkeypatch) -> None:
    from eval.judges import judge

    def absent(name: str) -> str:
        raise judge.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(judge.metadata, "version", absent)
    with pytest.raises(JudgeError, match=r"pip install 'lmspt-slm\[eval\]'"):
        check_judge(JudgeConfig(name="pocketsphinx"))


def test_long_audio_is_cut_in_the_pause() -> None:
    rate = 16_000
    speech = 0.3 * np.random.default_rng(0).standard_normal(3 * rate).astype(np.float32)
    speech[int(0.80 * rate) : int(0.92 * rate)] = 0
    speech[int(1.65 * rate) : int(1.75 * rate)] = 0
    pieces = split_at_quiet(speech, rate, 1.0)
    assert np.array_equal(np.concatenate(pieces), speech)
    assert all(len(piece) <= rate for piece in pieces)
    edges = np.cumsum([len(piece) for piece in pieces]) / rate
    assert 0.80 <= edges[0] <= 0.92 and 1.65 <= edges[1] <= 1.75
    assert len(split_at_quiet(speech[:100], rate, 1.0)) == 1


def test_resample_keeps_a_tone() -> None:
    time = np.arange(44_100) / 44_100
    tone = resample(np.sin(2 * np.pi * 440 * time), 44_100, 16_000)
    assert len(tone) == 16_000
    assert np.abs(np.fft.rfft(tone)).argmax() == 440


def test_pocketsphinx_reads_real_speech() -> None:
    pytest.importorskip("pocketsphinx", reason="extra `eval` is not installed")
    soundfile = pytest.importorskip("soundfile")
    manifest = DATA / "kathleen-arctic" / "manifest.jsonl"
    if not manifest.is_file():
        pytest.skip(f"no real speech at {DATA}")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    known = next(row for row in rows if row["id"] == "kathleen_arctic_a0123_1592745749")
    (audio, rate), (first, _), (other, _) = (
        soundfile.read(manifest.parent / row["audio"], dtype="float32") for row in (known, rows[0], rows[4])
    )
    judge = load_judge(JudgeConfig())
    assert judge.transcribe([audio, 0 * audio], rate) == ["she had died from cold and starvation", ""]
    # What was read before changes nothing (these two differ where the front end's state is kept).
    fresh = load_judge(JudgeConfig())
    assert (
        fresh.transcribe([first], rate) + fresh.transcribe([other], rate)
        == (judge.transcribe([other], rate) + judge.transcribe([first], rate))[::-1]
    )


@pytest.mark.slow
def test_pocketsphinx_says_the_same_in_several_processes() -> None:
    pytest.importorskip("pocketsphinx", reason="extra `eval` is not installed")
    rng = np.random.default_rng(0)
    noise = [0.1 * np.repeat(rng.standard_normal(4000), 4).astype(np.float32) for _ in range(3)]
    several = load_judge(JudgeConfig(processes=2))
    assert several.identity == load_judge(JudgeConfig()).identity
    assert several.transcribe(noise, 16_000) == load_judge(JudgeConfig()).transcribe(noise, 16_000)


def test_auto_reads_a_recogniser_without_a_trained_decoder_by_its_ctc_head(whisper_folder, tmp_path) -> None:
    folder = tmp_path / "ctc-only"
    shutil.copytree(whisper_folder, folder)
    assert check_judge(JudgeConfig(name=str(folder)))["decoding"] == "attention"
    head = load_file(folder / "ctc_head.safetensors")
    save_file(head, folder / "ctc_head.safetensors", metadata={"decoder": "untrained"})
    assert check_judge(JudgeConfig(name=str(folder)))["decoding"] == "ctc"
