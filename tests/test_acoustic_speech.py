"""The acoustic stage where speech is made: `slm synthesize` in a voice, and the row of `slm evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import tone
from slm_tiny import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from eval.results_file import load_results
from recipes import cli
from recipes.commands import evaluate, synthesize
from recipes.config import ConfigError, load_config
from recipes.inference import acoustic
from recipes.scoring import acoustic as stage
from recipes.scoring import evaluation, judges
from slm.acoustic.configuration import AcousticConfig, AcousticError, LatentConfig
from slm.acoustic.latent_model import new_latent_model
from slm.acoustic.latent_space import fit_latent_space
from slm.acoustic.masked_model import new_acoustic_model
from slm.model.modeling import save_slm
from slm.model.speech_rows import extend_with_speech
from slm.vocabulary import add_speech
from tokenizer import load_tokenizer
from tokenizer.data.utterances import AudioError


def save_stage(folder: Path, tokenizer: Path, **changes) -> str:
    """An untrained stage for a tokenizer's codes."""
    codec = load_tokenizer(tokenizer)
    facts = {"codebook_sizes": codec.config.codebook_sizes, "frame_rate": codec.config.frame_rate}
    facts |= {"fingerprint": codec.fingerprint("fp32"), "tokenizer": str(tokenizer), "min_prompt_s": 0.5}
    sizes = {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 32, "code_dim": 8, "max_prompt_s": 1.0}
    new_acoustic_model(AcousticConfig(**(facts | sizes | changes)), 0).save_pretrained(folder)
    return str(folder)


def save_latent_stage(folder: Path, tokenizer: Path) -> str:
    """An untrained stage that predicts latents, in a space of its own."""
    codec = load_tokenizer(tokenizer)
    sizes, rng = codec.config.codebook_sizes, np.random.default_rng(0)
    codes = np.stack([rng.integers(0, size, 400) for size in sizes])
    space = fit_latent_space(sizes[0], codec.quantizer.entries(len(sizes))[1:], [codes], 0.99)
    facts = {"codebook_sizes": sizes, "frame_rate": codec.config.frame_rate, "tokenizer": str(tokenizer)}
    facts |= {"fingerprint": codec.fingerprint("fp32"), "min_prompt_s": 0.35, "max_prompt_s": 1.0}
    facts |= {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 32, "n_added_books": len(sizes) - 1}
    facts |= {"latent_dim": space.directions.shape[1], "space_dim": space.directions.shape[0]}
    new_latent_model(LatentConfig(**facts), space, 0).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def job(tmp_path, tiny_tokenizer_folder):
    """A loader of the recipe's configuration: an SLM of the tiny tokenizer's book 0, a stage and two voices."""
    codec = load_tokenizer(tiny_tokenizer_folder)
    text_tokenizer = tiny_tokenizer()
    vocabulary = add_speech(
        text_tokenizer,
        codec.config.codebook_sizes,
        n_codebooks=1,
        fingerprint=codec.fingerprint("fp32"),
        frame_rate=codec.config.frame_rate,
        tokenizer=str(tiny_tokenizer_folder),
        precision="fp32",
    )
    model = tiny_model("qwen2", len(text_tokenizer))
    extend_with_speech(model, vocabulary, 0)
    save_slm(model, text_tokenizer, vocabulary, tmp_path / "slm")
    save_stage(tmp_path / "stage", tiny_tokenizer_folder)
    for name, pitch_hz in (("low", 110.0), ("high", 400.0)):
        soundfile.write(tmp_path / f"{name}.wav", tone(1.5, 22050, pitch_hz), 22050)  # resampled to 16 kHz

    def config(*overrides: str, stage: bool = True):
        own = [f"model={tmp_path / 'slm'}", "device=cpu", "text=lay red by a nine please", "decoding.min_seconds=2"]
        own += [f"acoustic={tmp_path / 'stage'}", f"voice={tmp_path / 'low.wav'}"] if stage else []
        return load_config(synthesize.Config, None, [*own, f"output={tmp_path / 'out.wav'}", *overrides])

    return config


@pytest.fixture
def tiny_tokenizer_folder(request) -> Path:
    """The shared tiny tokenizer, whose fixture has the name of a function here."""
    return request.getfixturevalue("tiny_tokenizer")


def said(config) -> np.ndarray:
    return soundfile.read(synthesize.run(config))[0]


def test_a_voice_fills_the_books_and_is_heard(job, tmp_path, monkeypatch):
    filled, whole = [], acoustic.fill_speech

    def noted(*arguments):
        filled.extend(whole(*arguments))
        return filled

    monkeypatch.setattr(acoustic, "fill_speech", noted)
    plain, low = said(job(stage=False)), said(job())
    assert len(filled) == 1 and filled[0].shape[0] == 3 and len(plain) == len(low) == filled[0].shape[1] * 1280
    assert not np.allclose(plain, low, atol=1e-3)
    codec, first = load_tokenizer(_tokenizer(tmp_path)), filled[0]
    assert np.allclose(_decoded(codec, first), low, atol=1e-3)
    filled.clear()
    assert np.array_equal(low, said(job())) and np.array_equal(first, filled[0])  # the same again
    filled.clear()
    said(job(f"voice={tmp_path / 'high.wav'}"))
    assert np.array_equal(first[0], filled[0][0]) and not np.array_equal(first, filled[0])


def test_a_stage_of_latents_is_heard_too(job, tmp_path, tiny_tokenizer_folder, monkeypatch):
    plain, masked = said(job(stage=False)), said(job())
    stage = f"acoustic={save_latent_stage(tmp_path / 'latent', tiny_tokenizer_folder)}"
    given, whole = [], acoustic.complete

    def noted(stage, decoder, codes, filled):
        given.extend(codes)
        return whole(stage, decoder, codes, filled)

    monkeypatch.setattr(acoustic, "complete", noted)
    low = said(job(stage))
    assert len(low) == len(plain) == given[0].shape[1] * 1280
    assert all(not np.allclose(low, other, atol=1e-3) for other in (plain, masked))
    assert np.array_equal(low, said(job(stage)))  # the same again
    assert not np.allclose(low, said(job(stage, f"voice={tmp_path / 'high.wav'}")), atol=1e-3)
    calm = said(job(stage, "acoustic_decoding.temperature=0", "acoustic_decoding.guidance=2"))
    assert not np.allclose(low, calm, atol=1e-3)
    with pytest.raises(AcousticError, match="guidance: 2: a stage of objective masked has none"):
        said(job("acoustic_decoding.guidance=2"))


def _tokenizer(tmp_path: Path) -> str:
    return json.loads((tmp_path / "stage" / "config.json").read_text())["tokenizer"]


def _decoded(codec, codes: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return codec.decode(torch.from_numpy(codes)[None]).audio_values[0, 0].clamp(-1, 1).numpy()


def test_the_option_and_a_run_folder(job, tmp_path):
    words = ["synthesize", "lay red", f"model={tmp_path / 'slm'}", "device=cpu", "-o", str(tmp_path / "cli.wav")]
    job()
    ran = CliRunner().invoke(
        cli.app, [*words, "--voice", str(tmp_path / "low.wav"), f"acoustic={tmp_path / 'stage'}", "--dry-run"]
    )
    assert ran.exit_code == 0, ran.output
    ran = CliRunner().invoke(cli.app, [*words, "--voice", str(tmp_path / "low.wav")])
    assert ran.exit_code == 2 and "voice: needs acoustic too" in " ".join(ran.stderr.split())
    ran = CliRunner().invoke(cli.app, ["encode", "--voice", "x.wav"])
    assert ran.exit_code == 2 and "takes no --voice" in " ".join(ran.stderr.split())
    folder = [f"run_dir={tmp_path / 'run'}", "output=''"]
    synthesize.run(job(*folder))
    sidecar = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert sidecar["acoustic"] == str(tmp_path / "stage") and sidecar["voice"].endswith("low.wav")
    soundfile.write(tmp_path / "low.wav", tone(1.5, 22050, 300.0), 22050)
    with pytest.raises(ValueError, match="other contents of model, voice"):
        synthesize.run(job(*folder))


def test_what_does_not_fit_is_refused_by_name(job, tmp_path, tiny_tokenizer_folder):
    for overrides, message in (
        (["voice=''"], "acoustic: needs voice too"),
        (["acoustic=''"], "voice: needs acoustic too"),
        (["stream=true"], "stream: not with acoustic"),
        (["acoustic_decoding.steps=0"], "acoustic_decoding.steps: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            job(*overrides)
    soundfile.write(tmp_path / "short.wav", tone(0.3), 16000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(32000), 16000)
    soundfile.write(tmp_path / "hiss.wav", 1e-3 * np.sin(np.arange(32000)), 16000)
    (tmp_path / "text.wav").write_text("no audio")
    for name, message in (
        ("short", "0.30 s are too short"), ("silent", "silent"), ("hiss", "silent"), ("text", "not audio"),
        ("absent", "no such file"),
    ):  # fmt: skip
        with pytest.raises(AudioError, match=rf"voice: .*{name}\.wav.*{message}"):
            synthesize.run(job(f"voice={tmp_path / name}.wav"))
    other = save_stage(tmp_path / "other", tiny_tokenizer_folder, fingerprint="0" * 64)
    with pytest.raises(AcousticError, match="fills the codes of tokenizer.*slm train-acoustic"):
        synthesize.run(job(f"acoustic={other}"))
    with pytest.raises(AcousticError, match="nowhere has no config.json"):
        synthesize.plan(job("acoustic=nowhere"))


def test_the_loudest_part_of_a_long_recording_is_the_voice(tmp_path):
    sound = np.concatenate([0.01 * tone(2.0), tone(1.0), 0.01 * tone(2.0)])
    soundfile.write(tmp_path / "long.wav", sound, 16000, subtype="FLOAT")
    voice = acoustic.read_voice(tmp_path / "long.wav", AcousticConfig(min_prompt_s=0.5, max_prompt_s=1.0), 16000)
    assert np.allclose(voice, sound[32000:48000], atol=1e-6)


class Deaf:
    """A judge that always hears the same."""

    sampling_rate = 16_000

    def __init__(self) -> None:
        self.identity = {"name": "deaf", "kind": "test", "revision": "1", "decoding": "none"}
        self.name = "deaf"

    def transcribe(self, audios, sampling_rate):
        return ["text" for _ in audios]


@pytest.fixture
def scored(tmp_path, tiny_tokenizer_folder, make_corpus, monkeypatch):
    """A loader of an evaluation: four recordings of anna, one of a speaker who says nothing else."""
    manifest = make_corpus(5, "test")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[4]["speaker"] = "bert"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_stage(tmp_path / "stage", tiny_tokenizer_folder, min_prompt_s=0.35)
    monkeypatch.setattr(evaluation, "check_judge", lambda config: Deaf().identity)
    monkeypatch.setattr(judges, "load_judge", lambda config, device: Deaf())

    def config(*overrides: str):
        own = [f"data.0.path={manifest}", f"tokenizer={tiny_tokenizer_folder}", f"acoustic={tmp_path / 'stage'}"]
        own += ["judges=[{name: deaf}]", "measures=[mel_distance_db]", "samples=1", "precision=fp32", "device=cpu"]
        return load_config(evaluate.Config, None, [*own, f"run_dir={tmp_path / 'scores'}", *overrides])

    return config


def test_the_evaluation_s_row_is_filled_in_another_recording_s_voice(scored, tmp_path, monkeypatch):
    asked, whole = [], stage.fill_speech

    def noted(model, codes, voices, keys, *rest):
        asked.extend(zip(keys, codes, voices, strict=True))
        return whole(model, codes, voices, keys, *rest)

    monkeypatch.setattr(stage, "fill_speech", noted)
    results = load_results(evaluate.run(scored()))
    rows = {row.system: row for row in results.rows}
    assert list(rows) == ["ground_truth", "reconstruction", "semantic_reconstruction", "acoustic_stage", "resynthesis"]
    row = rows["acoustic_stage"]
    assert row.name == "acoustic stage" and row.tokens_per_second == 12.5 and row.real_time_factor > 0
    assert row.n_failed == 1 and row.difference.against == "semantic reconstruction"
    quality = {item.system: item for item in results.quality}
    assert quality["acoustic_stage"].n_scored == 4 and quality["semantic_reconstruction"].n_scored == 5
    near = [quality[name].values["mel_distance_db"] for name in ("acoustic_stage", "semantic_reconstruction")]
    assert near[0] != near[1]
    assert sorted(key for key, *_ in asked) == ["test0", "test1", "test2", "test3"]
    codec, voices = load_tokenizer(_tokenizer(tmp_path)), {key: voice for key, _, voice in asked}
    assert all(len(codes) == 1 for _, codes, _ in asked)
    # test0 is too short for a voice; the first that is long enough is that of all but itself.
    own = {n: _encoded(codec, tmp_path / "corpus" / f"test{n}.flac") for n in (1, 2)}
    assert all(np.array_equal(voices[f"test{n}"], own[2 if n == 1 else 1]) for n in range(4))


def test_the_evaluation_hears_a_stage_of_latents(scored, tmp_path, tiny_tokenizer_folder):
    folder = save_latent_stage(tmp_path / "latent", tiny_tokenizer_folder)
    results = load_results(evaluate.run(scored(f"acoustic={folder}", f"run_dir={tmp_path / 'latents'}")))
    quality = {item.system: item for item in results.quality}
    assert quality["acoustic_stage"].n_scored == 4
    values = {name: item.values["mel_distance_db"] for name, item in quality.items()}
    assert values["acoustic_stage"] not in (values["reconstruction"], values["semantic_reconstruction"])


def _encoded(codec, path: Path) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return codec.encode(torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None, None]).audio_codes[0]


def test_an_evaluation_without_what_it_needs_is_refused(scored, tmp_path, tiny_tokenizer_folder):
    with pytest.raises(ConfigError, match="acoustic: needs the tokenizer"):
        evaluate.plan(scored("tokenizer=null"))
    with pytest.raises(ValueError, match="nowhere has no config.json"):
        evaluate.plan(scored("acoustic=nowhere"))
    other = save_stage(tmp_path / "other", tiny_tokenizer_folder, fingerprint="0" * 64)
    with pytest.raises(AcousticError, match="fills the codes of tokenizer"):
        evaluate.plan(scored(f"acoustic={other}"))
    with pytest.raises(ConfigError, match="no utterance has another one of its speaker"):
        evaluate.run(scored("limit=1", f"run_dir={tmp_path / 'one'}"))
