"""Embedded models: a name stands wherever a folder may, fp16 on disk is fp32 in use, wheels carry the files."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import slm_tiny
import soundfile
import torch
from conftest import tone
from safetensors import safe_open
from slm_tiny import save_llm

import slm.embedded
import tokenizer.embedded
from eval.judges.config import JudgeConfig
from eval.judges.judge import check_judge, load_judge
from recipes.commands import export, synthesize, train_teacher, train_tokenizer, transcribe
from recipes.config import ConfigError, load_config
from recipes.runs.embedded import EMBEDDED, model_path, resolve, resolve_judge
from recipes.runs.inputs import digest
from recipes.runs.logs import log
from recipes.tokenizer_training.data import inputs_digest
from slm.model.modeling import describe_llm, load_llm, save_slm
from slm.model.speech_rows import extend_with_speech
from slm.vocabulary import add_speech
from tokenizer import LMSPTModel, load_tokenizer
from tokenizer.teacher.whisper import SpeechTeacher, TeacherConfig
from tokenizer.training.initialisation import initialise_from

ROOT = Path(__file__).parents[1]
LARGEST_BYTES = 12_000_000  # of a tokenizer or recogniser
LARGEST_LM_BYTES = 12_000_000


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tiny_tokenizer, tiny_teacher) -> dict[str, Path]:
    """Tiny models, exported as the embedded ones are: `tokenizer/weights` and `slm/weights` of an installation."""
    places = {island: tmp_path_factory.mktemp(island) / "weights" for island in ("tokenizer", "slm")}
    sources = {
        "embedded-12.5hz": tiny_tokenizer,
        "embedded-recogniser": tiny_teacher,
        "embedded-lm": save_llm(tmp_path_factory.mktemp("lm") / "model"),
    }
    for name, source in sources.items():
        place = places["slm" if name == "embedded-lm" else "tokenizer"]
        export.run(export.Config(str(source), str(place / name)))
    codec = load_tokenizer(places["tokenizer"] / "embedded-12.5hz")
    speaking = save_speech_lm(codec, tmp_path_factory.mktemp("slm") / "model")
    export.run(export.Config(str(speaking), str(places["slm"] / slm.embedded.DEFAULT_SPEECH_LM)))
    return places


def save_speech_lm(codec: LMSPTModel, folder: Path) -> Path:
    """An untrained SLM of the codes of the embedded tokenizer of 12.5 Hz, as `slm finetune` leaves it."""
    text_tokenizer = slm_tiny.tiny_tokenizer()
    model = slm_tiny.tiny_model("qwen2", len(text_tokenizer))
    facts = {"fingerprint": codec.fingerprint(), "frame_rate": 12.5, "tokenizer": "embedded-12.5hz"}
    vocabulary = add_speech(text_tokenizer, codec.config.codebook_sizes, **facts, precision="fp32")
    extend_with_speech(model, vocabulary, 0)
    save_slm(model, text_tokenizer, vocabulary, folder)
    return folder


@pytest.fixture(autouse=True)
def installed(monkeypatch, weights):
    monkeypatch.setattr(tokenizer.embedded, "WEIGHTS", weights["tokenizer"])
    monkeypatch.setattr(slm.embedded, "WEIGHTS", weights["slm"])


def test_a_tokenizer_by_name_is_the_one_in_the_folder_in_fp32(weights, tiny_tokenizer):
    folder = weights["tokenizer"] / "embedded-12.5hz"
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert {stored.get_tensor(name).dtype for name in stored.keys()} == {torch.float16}  # noqa: SIM118
    by_name, by_path = load_tokenizer("embedded-12.5hz"), load_tokenizer(folder)
    assert {value.dtype for value in by_name.state_dict().values()} == {torch.float32}
    assert by_name.trained and by_name.fingerprint() == by_path.fingerprint()
    assert by_name.fingerprint() != load_tokenizer(tiny_tokenizer).fingerprint()  # rounded: other weights
    audio = torch.from_numpy(tone(0.5))[None, None]
    codes = by_name.encode(audio).audio_codes
    assert (
        torch.equal(codes, by_path.encode(audio).audio_codes)
        and torch.isfinite(by_name.decode(codes).audio_values).all()
    )


def test_the_recogniser_by_name_teaches_and_judges(weights):
    teacher = SpeechTeacher.from_pretrained(TeacherConfig("embedded-recogniser"))
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    assert torch.isfinite(teacher(torch.from_numpy(tone(0.5))[None])).all()
    for decoding in ("attention", "ctc"):
        judge = resolve_judge(JudgeConfig("embedded-recogniser", decoding=decoding))
        by_path = check_judge(replace(judge, name=str(weights["tokenizer"] / "embedded-recogniser"), label=None))
        assert check_judge(judge)["weights_sha256"] == by_path["weights_sha256"]
        heard = load_judge(judge)
        assert heard.identity["name"] == "embedded-recogniser"  # not a path: it stands in tables and protocols
        assert len(heard.transcribe([tone(0.4), np.zeros(800, np.float32)], 16000)) == 2
    assert resolve_judge(JudgeConfig("pocketsphinx")).name == "pocketsphinx"
    assert resolve_judge(JudgeConfig("embedded-recogniser", label="ear")).label == "ear"


def test_the_llm_by_name_is_fine_tuned_in_fp32():
    model, text_tokenizer, vocabulary = load_llm("embedded-lm")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32} and vocabulary is None
    assert describe_llm("embedded-lm").tokenizer("bin blue")["input_ids"] == text_tokenizer("bin blue")["input_ids"]


def test_a_recording_and_a_text_need_no_model_and_are_told_which_answers(tmp_path, capsys, caplog):
    def told() -> list[str]:
        found = [record.message for record in caplog.records if record.message.startswith("model: ")]
        caplog.clear()
        return found

    caplog.set_level("INFO", logger=log.name)
    soundfile.write(tmp_path / "a.wav", tone(0.5), 16000)
    heard = transcribe.run(load_config(transcribe.Config, None, [f"files=[{tmp_path / 'a.wav'}]"]))
    printed = capsys.readouterr().out.splitlines()[-1].removesuffix("  [cut off]")
    assert printed.strip() == heard[str(tmp_path / "a.wav")].strip()
    assert ["embedded-slm-12.5hz" in line for line in told()] == [True]
    text = ["text=bin blue", "decoding.min_seconds=1", "decoding.seconds_per_character=0"]
    said = synthesize.run(load_config(synthesize.Config, None, [*text, f"output={tmp_path / 'b.wav'}"]))
    assert soundfile.info(said).samplerate == 16000 and ["embedded-slm-12.5hz" in line for line in told()] == [True]
    # One of one's own is not announced.
    own = [f"output={tmp_path / 'c.wav'}", f"model={slm.embedded.WEIGHTS / 'embedded-slm-12.5hz'}"]
    synthesize.run(load_config(synthesize.Config, None, [*text, *own]))
    assert not told()


def test_an_slm_whose_vocabulary_is_missing_says_so(weights, tmp_path, monkeypatch):
    shutil.copytree(weights["slm"], tmp_path / "weights")
    monkeypatch.setattr(slm.embedded, "WEIGHTS", tmp_path / "weights")
    (tmp_path / "weights" / "embedded-slm-12.5hz" / "speech_vocabulary.json").unlink()
    with pytest.raises(ValueError, match="embedded-slm-12.5hz: its files are missing.*speech_vocabulary.json"):
        describe_llm("embedded-slm-12.5hz")


def test_trainings_start_from_names_and_their_digest_follows_the_weights(weights, tmp_path):
    model = load_tokenizer("embedded-12.5hz")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.data.zero_()
    initialise_from(model, "embedded-12.5hz")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    config = train_teacher.Config(
        init_from="embedded-recogniser",
        model=train_teacher.RecogniserConfig(hidden_size=64, encoder_layers=2, decoder_layers=1, window_s=2.0),
    )
    loaded = train_teacher._initial_model(config).state_dict()["ctc_head.weight"]
    with safe_open(weights["tokenizer"] / "embedded-recogniser" / "ctc_head.safetensors", "pt") as head:
        assert torch.equal(loaded, head.get_tensor("weight").float())

    # A run belongs to the weights it started from, wherever the package is installed.
    copy = tmp_path / "elsewhere"
    shutil.copytree(weights["tokenizer"] / "embedded-12.5hz", copy)
    config = train_tokenizer.Config(teacher=TeacherConfig("embedded-recogniser"), init_from="embedded-12.5hz")
    first = inputs_digest(config)
    config.init_from = str(copy)
    assert inputs_digest(config) == first == digest([], model_path("embedded-recogniser"), copy)
    config.init_from = None
    assert inputs_digest(config) != first


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: load_tokenizer("embedded-13hz"), "no embedded model is called 'embedded-13hz'; .*embedded-12.5hz"),
        (
            lambda: load_tokenizer("embedded-25hz"),
            "embedded-25hz: its files are missing .*complete here: embedded-12.5hz",
        ),
        (lambda: load_tokenizer("embedded-recogniser"), "holds a model of type 'whisper'"),
        (lambda: SpeechTeacher.from_pretrained(TeacherConfig("embedded-second-recogniser")), "files are missing"),
        (lambda: SpeechTeacher.from_pretrained(TeacherConfig("embedded-12.5hz")), "not a Whisper"),
        (
            lambda: describe_llm("embedded-llm"),
            "no embedded LLM is called 'embedded-llm'; this package has embedded-lm",
        ),
        (
            lambda: resolve("embedded-judge"),
            "no embedded model is called 'embedded-judge'; did you mean .*. there are embedded-25hz, .*lm",
        ),
    ],
)
def test_a_name_that_is_none_or_not_installed_lists_those_there_are(load, message):
    with pytest.raises(ValueError, match=message):
        load()


def test_a_folder_of_ones_own_may_be_called_so(tmp_path, monkeypatch, tiny_tokenizer):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_tokenizer, "embedded-mine")
    assert load_tokenizer("embedded-mine").fingerprint() == load_tokenizer(tiny_tokenizer).fingerprint()
    assert resolve("embedded-mine") == "embedded-mine"
    with pytest.raises(ConfigError):
        resolve("embedded-yours")


def _complete(name: str) -> Path | None:
    island = "slm" if name in slm.embedded.EMBEDDED else "tokenizer"
    folder = ROOT / island / "weights" / name
    return folder if (folder / "model.safetensors").is_file() else None


@pytest.mark.parametrize("name", EMBEDDED)
def test_what_is_shipped_is_small_half_precision_and_has_a_card(name, monkeypatch):
    folder = _complete(name)
    if folder is None:
        pytest.skip(f"{name} is not in this checkout yet")
    monkeypatch.undo()
    assert resolve(name) == str(folder)
    weights = list(folder.glob("*.safetensors"))
    most = LARGEST_LM_BYTES if name in slm.embedded.EMBEDDED else LARGEST_BYTES
    assert sum(path.stat().st_size for path in weights) <= most
    for path in weights:
        with safe_open(path, "pt") as stored:
            assert {stored.get_slice(key).get_dtype() for key in stored.keys()} == {"F16"}  # noqa: SIM118
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense:") and "## Data" in card and "## Limits" in card
    if name in tokenizer.embedded.TOKENIZERS:
        model = load_tokenizer(name)
        assert model.trained and f"embedded-{model.config.frame_rate:g}hz" == name
        assert model.config.sampling_rate == 16000 and model.fingerprint() in card
    if name in slm.embedded.SPEECH_LMS:
        codec = load_tokenizer(name.replace("-slm", ""))
        vocabulary = describe_llm(name).vocabulary
        assert vocabulary.fingerprint == codec.fingerprint() and vocabulary.frame_rate == codec.config.frame_rate
        assert vocabulary.trained_on is not None and sum(path.stat().st_size for path in weights) <= 11_000_000


def test_a_wheel_carries_the_weights_and_no_tests(tmp_path, weights):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    for package in ("tokenizer", "slm", "eval", "recipes", "tests"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    for island, place in weights.items():
        shutil.copytree(place, source / island / "weights")
    build = "import setuptools.build_meta as backend; print(backend.build_wheel('dist'))"
    found = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    wheel = source / "dist" / found.stdout.splitlines()[-1]
    names = set(zipfile.ZipFile(wheel).namelist())
    for name, files in {
        "tokenizer/weights/embedded-12.5hz": ("config.json", "model.safetensors", "README.md"),
        "tokenizer/weights/embedded-recogniser": ("ctc_head.safetensors", "tokenizer.json", "preprocessor_config.json"),
        "slm/weights/embedded-lm": ("config.json", "model.safetensors", "tokenizer.json", "README.md"),
        "slm/weights/embedded-slm-12.5hz": ("model.safetensors", "speech_vocabulary.json"),
        "recipes/configs/quickstart": ("quickstart.yaml", "from-scratch.yaml"),
    }.items():
        assert {f"{name}/{file}" for file in files} <= names
    assert not [name for name in names if name.startswith("tests/")]


def test_git_takes_the_weights():
    """What .gitignore hid would be missing from a clone."""
    names = [f"tokenizer/weights/embedded-25hz/{file}" for file in ("model.safetensors", "config.json", "README.md")]
    command = ["git", "check-ignore", "--no-index", *names, "slm/weights/embedded-lm/model.safetensors"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode not in (0, 1):
        pytest.skip("no git checkout here")
    assert found.stdout == ""
