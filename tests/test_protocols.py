"""Protocols by name: what they settle, the judges they bring, what evaluations record and when they score again."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import HubertConfig, HubertForCTC, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

from eval import rescoring
from eval.judges import packages
from eval.judges.config import JudgeConfig, JudgeError
from eval.judges.judge import check_judge, conditions_of, load_judge
from eval.protocol_presets import PRESETS, get_preset
from eval.rescoring import outdated, rescored, up_to_date
from eval.results_file import load_results, save_results
from eval.text import normalisers
from eval.text.normalisers import NORMALISERS, get_normaliser
from eval.text.wer import OFFICIAL
from recipes.commands import evaluate
from recipes.config import ConfigError
from recipes.scoring import evaluation
from recipes.scoring.evaluation import Config
from recipes.scoring.protocols import settle
from tokenizer.data.utterances import DataSource

judge_module = importlib.import_module("eval.judges.judge")
RATE = 16_000
TEXTS = ["bin blue at f two now", "set red by g five soon", "lay green with a nine again"]


@pytest.fixture(scope="module")
def hubert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random HuBERT with a CTC head over letters, as `facebook/hubert-large-ls960-ft` is laid out."""
    folder = tmp_path_factory.mktemp("hubert") / "tiny-hubert"
    torch.manual_seed(0)
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
    config = HubertConfig(
        vocab_size=len(letters), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(16, 16), conv_stride=(10, 16), conv_kernel=(10, 16), num_feat_extract_layers=2, pad_token_id=0,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )  # fmt: skip
    model = HubertForCTC(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=True).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "mini"
    folder.mkdir()
    lines = []
    for i, text in enumerate(TEXTS):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(RATE // 2 * (i + 1)), RATE)
        lines.append({"id": f"u{i}", "audio": f"{i}.wav", "text": text, "split": "test", "speaker": f"s{i}"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def configure(tmp_path: Path, corpus: Path, **changes: Any) -> Config:
    settings = {"run_dir": str(tmp_path / "scores"), "data": [DataSource(path=str(corpus))]}
    settings |= {"bootstrap_samples": 50, "samples": 0, "precision": "fp32", "quality": False, "device": "cpu"}
    return Config(**settings | changes)


def test_every_preset_is_whole() -> None:
    names = {"librispeech-hubert", "whisper-large-v3", "whisper-base", "dwer-whisper-small", "seed-tts-eval"}
    assert {*names, "seed-tts-eval-zh", "f5-tts", "embedded"} == {*PRESETS}
    for name, preset in PRESETS.items():
        assert preset.name == name and preset.about and preset.source
        assert preset.normaliser in NORMALISERS and preset.official in ("", *OFFICIAL)
        assert preset.reference == ("judge" if name.startswith("dwer") else "text")
        if "/" in preset.judge.name:  # a hub model without its commit would be another one next year
            assert len(preset.judge.revision) == 40
        assert name in Config.__dataclass_fields__["protocol"].metadata["help"]


def test_a_protocol_takes_a_judge_s_place_and_no_other_reading() -> None:
    preset = get_preset("whisper-base")
    assert preset.apply([]) == ("whisper-base", preset.judge)
    name, judge = preset.apply([JudgeConfig(name="./copy", batch_size=2)])
    assert name == "whisper-base with judge ./copy"
    assert (judge.name, judge.batch_size, judge.language, judge.no_speech) == ("./copy", 2, "en", "off")
    assert judge.revision is None
    name, judge = preset.apply([JudgeConfig(batch_seconds=30)])
    assert (name, judge) == ("whisper-base", dataclasses.replace(preset.judge, batch_seconds=30))
    assert preset.apply([JudgeConfig(name="openai/whisper-base", revision="main")])[0] == "whisper-base at main"
    for wrong in ([JudgeConfig(name="./copy", num_beams=5)], [JudgeConfig(), JudgeConfig()]):
        with pytest.raises(JudgeError, match="protocol 'whisper-base'"):
            preset.apply(wrong)
    with pytest.raises(
        ValueError,
        match="'whisper' is unknown; there are\n  librispeech-hubert: [^$]*f5-tts",
    ):
        get_preset("whisper")
    assert settle("f5-tts", [], "basic").normaliser.name == "f5-tts"


def test_a_ctc_judge_by_protocol_reads_greedily_with_its_own_letters(hubert, tmp_path, corpus) -> None:
    """Against the model called by hand: argmax, repeats to one, blanks away, `|` a space."""
    _, config = get_preset("librispeech-hubert").apply([JudgeConfig(name=str(hubert))])
    judge = load_judge(config)
    assert (judge.identity["kind"], judge.identity["decoding"], judge.no_speech) == ("ctc", "ctc", "off")
    clips = [soundfile.read(corpus / f"{i}.wav", dtype="float32")[0] for i in range(3)]
    model, extractor = HubertForCTC.from_pretrained(hubert).eval(), Wav2Vec2FeatureExtractor.from_pretrained(hubert)
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(hubert)
    expected = []
    for clip in clips:
        with torch.inference_mode():
            best = model(**extractor(clip, sampling_rate=RATE, return_tensors="pt")).logits.argmax(-1)
        # A random model says special tokens too, which the tokenizer would drop before it joins repeats.
        expected.append(re.sub("<.*?>", "", tokenizer.batch_decode(best)[0]).strip())
    found = judge.transcribe(clips, RATE)
    assert [text.split() for text in found] == [text.split() for text in expected] and all(found)

    folder = evaluate.run(
        configure(tmp_path, corpus, protocol="librispeech-hubert", judges=[JudgeConfig(name=str(hubert))])
    )
    results = load_results(folder)
    protocol = results.rows[0].protocol
    assert protocol.name == f"librispeech-hubert with judge {hubert}" and protocol.normaliser == "whisper-english"
    assert [u.hypothesis_text for u in results.rows[0].utterances] == found
    record = protocol.record()
    assert record["dtype"] == "fp32" and record["resampler"] == "soxr HQ" and record["alignment"] == "jiwer"
    assert {"normaliser_version", "aggregation", "missing", "seed", "bootstrap_samples"} <= record.keys()
    assert len(record["test_set"]["audio_sha256"]) == 64 and record["judge"]["weights_sha256"]
    assert results.versions.keys() >= {"torch", "transformers", "jiwer", "whisper-normalizer", "machine"}
    page = (folder / "report.html").read_text()
    assert "test_set.audio_sha256" in page and f"protocol {protocol.name}, " in page


class Echo:
    """Hears a clip's length in half seconds, and each time one word less of it for the second judge."""

    sampling_rate = RATE

    def __init__(self, name: str = "echo") -> None:
        self.name, self.identity = name, {"name": name, "kind": "test", "weights_sha256": "ab", "decoding": "none"}

    def transcribe(self, audios: list[np.ndarray], sampling_rate: int) -> list[str]:
        return [" ".join(TEXTS[2 * len(audio) // sampling_rate - 1].split()[1:]) for audio in audios]


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "check_judge", lambda config: Echo(config.display_name()).identity)
    monkeypatch.setattr("recipes.scoring.judges.load_judge", lambda config, device: Echo(config.display_name()))


def tts(tmp_path: Path, order: tuple[int, ...]) -> str:
    """Predictions of speech: utterance k sounds like text order[k]."""
    folder = tmp_path / "tts"
    folder.mkdir()
    for k, i in enumerate(order):
        soundfile.write(folder / f"{k}.wav", 0.1 * np.ones(RATE // 2 * (i + 1)), RATE)
    lines = [{"id": f"u{k}", "task": "tts", "text": TEXTS[k], "audio": f"{k}.wav"} for k in range(len(order))]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_dwer_holds_speech_against_what_the_judge_hears_in_the_recording(tmp_path, corpus, echo) -> None:
    config = configure(tmp_path, corpus, protocol="dwer-whisper-small", predictions=[tts(tmp_path, (0, 2))])
    truth, spoken = load_results(evaluate.run(config)).rows
    assert truth.wer == 0 and truth.protocol.reference == "judge"
    assert [u.reference for u in spoken.utterances][0] == "blue at f 2 now"  # the judge misses a first word: no error
    assert [u.errors for u in spoken.utterances] == [0, 5, 5] and spoken.n_failed == 1
    with pytest.raises(ConfigError, match="protocol dwer-whisper-small scores against .*: give data"):
        evaluate.plan(configure(tmp_path, corpus, run_dir=str(tmp_path / "b"), data=[], protocol="dwer-whisper-small",
                                predictions=config.predictions))  # fmt: skip


def test_dwer_needs_no_transcripts(tmp_path, corpus, echo) -> None:
    manifest = corpus / "manifest.jsonl"
    lines = [json.loads(line) | {"text": ""} for line in manifest.read_text().splitlines()]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = load_results(evaluate.run(configure(tmp_path, corpus, protocol="dwer-whisper-small"))).rows
    assert row.wer == 0 and [u.reference for u in row.utterances][0] == "blue at f 2 now"
    with pytest.raises(ConfigError, match="no utterance has a transcript"):
        evaluate.plan(configure(tmp_path, corpus, run_dir=str(tmp_path / "b"), protocol="whisper-base"))


def test_a_protocol_s_judge_is_not_needed_where_there_is_no_audio(tmp_path, corpus) -> None:
    (tmp_path / "asr").mkdir()
    lines = [{"id": f"u{i}", "task": "asr", "reference": t, "hypothesis": t.upper()} for i, t in enumerate(TEXTS)]
    (tmp_path / "asr" / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = configure(tmp_path, corpus, data=[], protocol="seed-tts-eval", predictions=[str(tmp_path / "asr")])
    (row,) = load_results(evaluate.run(config)).rows
    assert (row.wer, row.official_wer, row.protocol.name) == (0, 0, "seed-tts-eval, texts as given")


def test_other_recordings_of_the_same_texts_have_another_digest(tmp_path, corpus, echo) -> None:
    def digest(name: str) -> str:
        config = configure(tmp_path, corpus, run_dir=str(tmp_path / name), judges=[JudgeConfig(name="echo")])
        return load_results(evaluate.run(config)).rows[0].protocol.test_set.audio_sha256

    first = digest("a")
    assert digest("b") == first
    soundfile.write(corpus / "0.wav", np.ones(RATE // 2) / 2, RATE)
    assert digest("c") != first


def new_version(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    changed = normalisers.Normaliser("basic", "99", function)
    monkeypatch.setitem(normalisers.NORMALISERS, "basic", changed)


def test_a_changed_normaliser_scores_again_from_the_stored_texts(tmp_path, corpus, echo, monkeypatch) -> None:
    config = configure(tmp_path, corpus, judges=[JudgeConfig(name="echo")], predictions=[tts(tmp_path, (0, 1, 2))])
    folder = evaluate.run(config)
    stored = load_results(folder)
    assert rescored(stored, get_normaliser("basic")).rows == stored.rows and up_to_date(stored) is stored
    assert any(row.difference for row in stored.rows)

    def refuse(*_: Any) -> None:
        raise AssertionError("no audio is read again")

    monkeypatch.setattr("recipes.scoring.judges.load_judge", refuse)
    evaluate.run(config)
    assert load_results(folder).rows == stored.rows
    new_version(monkeypatch, lambda text: text.upper().split()[-1])
    assert outdated(stored) == ["basic 2, now 99"]
    evaluate.run(config)
    again = load_results(folder)
    assert {row.protocol.normaliser_version for row in again.rows} == {"99"} and {
        row.n_words for row in again.rows
    } == {3}
    assert [u.reference_text for u in again.rows[0].utterances] == TEXTS and again.rows[0].wer == 0
    assert "NOW" in (folder / "errors-echo-ground-truth.txt").read_text()


def test_results_that_kept_no_texts_say_how_to_go_on(tmp_path, corpus, echo, monkeypatch) -> None:
    config = configure(tmp_path, corpus, judges=[JudgeConfig(name="echo")])
    folder = evaluate.run(config)
    older = load_results(folder)
    for row in older.rows:
        row.utterances = [dataclasses.replace(u, reference_text=None, hypothesis_text=None) for u in row.utterances]
    save_results(older, folder)
    evaluate.run(config)  # under the version that it was scored by nothing is asked of it
    new_version(monkeypatch, str.upper)
    with pytest.raises(ConfigError, match=r"normalised by basic 2, now 99: .* run `slm evaluate` again \(--restart\)"):
        evaluate.run(config)
    with pytest.raises(ValueError, match="keeps its texts as they were normalised by basic 2"):
        rescoring.up_to_date(older)


def test_a_judge_with_half_its_weights_is_named_and_what_another_heard_is_kept(hubert, tmp_path, corpus) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    for path in hubert.iterdir():
        data = path.read_bytes()
        (torn / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    with pytest.raises(JudgeError, match=r"torn' is incomplete or damaged: it cannot be loaded \(.*Copy or"):
        load_judge(JudgeConfig(name=str(torn)))
    judges = [JudgeConfig(name=str(hubert), label="whole"), JudgeConfig(name=str(torn), label="torn")]
    first = configure(tmp_path, corpus, judges=judges[:1], transcripts_dir=str(tmp_path / "heard"))
    evaluate.run(first)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "heard").iterdir()}
    both = dataclasses.replace(first, run_dir=str(tmp_path / "both"), judges=judges)
    with pytest.raises(JudgeError, match="torn' is incomplete or damaged"):
        evaluate.run(both)
    assert kept and {path.name: path.read_bytes() for path in (tmp_path / "heard").iterdir()} == kept
    assert not (tmp_path / "both").exists()  # nothing was begun that could not be finished


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Stand-ins for the packages, which note how they are called."""
    calls: list[dict] = []

    class AutoModel:
        def __init__(self, **settings: Any) -> None:
            calls.append(settings)

        def generate(self, **given: Any) -> list[dict]:
            calls.append({"samples": len(given.pop("input")), **given})
            return [{"text": "後天"}]

    class WhisperModel:
        def __init__(self, size: str, **settings: Any) -> None:
            calls.append({"size": size, **settings})

        def transcribe(self, clip: np.ndarray, **given: Any) -> tuple[list, None]:
            calls.append({"samples": len(clip), **given})
            return [types.SimpleNamespace(text=" Don't,"), types.SimpleNamespace(text=" stop.")], None

    modules = {
        "funasr": types.SimpleNamespace(AutoModel=AutoModel),
        "zhconv": types.SimpleNamespace(convert=lambda text, variant: text.replace("後", "后") + variant),
        "faster_whisper": types.SimpleNamespace(WhisperModel=WhisperModel),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    versions = types.SimpleNamespace(version=lambda name: "1.0", PackageNotFoundError=Exception)
    monkeypatch.setattr(packages, "metadata", versions)
    monkeypatch.setattr(judge_module, "metadata", versions)
    return calls


def test_faster_whisper_reads_as_f5_tts_asks(installed) -> None:
    judge = load_judge(get_preset("f5-tts").judge)
    assert judge.transcribe([np.ones(50 * RATE, np.float32)], RATE) == ["Don't,  stop."]  # in one piece, it cuts itself
    assert installed == [
        {"size": "large-v3", "device": "cpu", "compute_type": "float32", "revision": None},
        {"samples": 50 * RATE, "beam_size": 5, "language": "en"},
    ]
    assert judge.identity["revision"] == "faster-whisper 1.0" and judge.identity["num_beams"] == 5
    assert get_normaliser("f5-tts")("Don't,  stop.") == "dont stop"
    assert conditions_of(judge.identity, "cpu")["source"] == "faster-whisper:large-v3"
    with pytest.raises(JudgeError, match="decoding=ctc is not for it"):
        check_judge(JudgeConfig(name="faster-whisper:tiny", decoding="ctc"))


def test_paraformer_reads_chinese_in_simplified_characters(installed) -> None:
    judge = load_judge(get_preset("seed-tts-eval-zh").judge)
    assert judge.transcribe([np.ones(RATE, np.float32)], RATE) == ["后天zh-cn"]
    assert installed[1] == {"samples": RATE, "batch_size_s": 300, "disable_pbar": True}
    assert judge.identity["revision"] == "funasr 1.0, zhconv 1.0" and judge.identity["language"] == "zh"
    with pytest.raises(JudgeError, match="knows Chinese and cannot be told language=en"):
        check_judge(JudgeConfig(name="paraformer-zh", language="en"))


def test_packages_that_are_not_there_are_named() -> None:
    for name, package in (("f5-tts", "faster-whisper"), ("seed-tts-eval-zh", "funasr")):
        with pytest.raises(JudgeError, match=f"needs the package {package}, which is not installed: pip install"):
            check_judge(get_preset(name).judge)


def test_normalisers_of_speech_synthesis_do_what_their_authors_code_does() -> None:
    seed, zh, f5 = (get_normaliser(name) for name in ("seed-tts-eval", "seed-tts-eval-zh", "f5-tts"))
    assert seed("Well-known,  DON'T stop\u2014now \u2018so\u2019: 21st") == "wellknown don't stopnow so 21st"
    assert f5("Well-known, DON'T") == "wellknown dont"
    assert zh("\u6211\u6709 3\u53ea\u72d7\u3002OK") == "\u6211 \u6709 3 \u53ea \u72d7 O K"


def test_what_was_heard_before_the_hub_s_name_was_recorded_is_still_used() -> None:
    """Kept transcripts and complete folders go by these facts: none of them may have changed."""
    commit = "e37978b90ca9030d5170a5c07aadb050351a65bb"
    before = {"name": "w", "kind": "seq2seq", "no_speech": "off", "revision": commit, "language": None}
    assert conditions_of(before | {"source": "openai/whisper-base"}, "cpu") == conditions_of(before, "cpu")
    assert "language" in conditions_of(before, "cpu") and "name" not in conditions_of(before, "cpu")
