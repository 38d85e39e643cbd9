"""slm resynthesize: what is written is what the tokenizers make of the recording; bad files are named, others made."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import tone
from typer.testing import CliRunner

import tokenizer.embedded
from recipes import cli
from recipes.commands import resynthesize
from recipes.commands.resynthesize import Config
from recipes.config import ConfigError, load_config
from recipes.runs.run_folder import RunFolder
from recipes.scoring import resynthesis, round_trip
from recipes.scoring.labels import distinct, labels_of
from recipes.scoring.round_trip import long_enough
from tokenizer import load_tokenizer
from tokenizer.data.utterances import AudioError

WAYS = ("reconstruction", "semantic-reconstruction", "resynthesis")


@pytest.fixture(scope="module", autouse=True)
def one_copy_of_each_tokenizer():
    """Tokenizers are read once for all tests here."""
    loaded = {}
    patch = pytest.MonkeyPatch()
    patch.setattr(resynthesize, "load_tokenizer", lambda name: loaded.setdefault(name, load_tokenizer(name)))
    yield
    patch.undo()


@pytest.fixture
def stereo(tmp_path) -> Path:
    """1.3 s, 44.1 kHz, two channels that differ."""
    path = tmp_path / "in" / "my <take>.wav"
    path.parent.mkdir()
    soundfile.write(path, np.stack([tone(1.3, 44100), tone(1.3, 44100, 310.0)], axis=1), 44100)
    return path


@pytest.fixture
def config(tmp_path, tiny_tokenizer, stereo) -> Config:
    out = tmp_path / "out"
    return Config([str(stereo)], [str(tiny_tokenizer), "dmel-25hz"], str(out), judge=None, precision="fp32")


def results_of(config: Config) -> dict:
    return json.loads((Path(config.output) / "resynthesis.json").read_text())


def test_a_stereo_recording_through_two_tokenizers(config, stereo, tiny_tokenizer, capsys):
    page = resynthesize.run(config)
    out = Path(config.output)
    assert page == out / "index.html"
    label = tiny_tokenizer.name
    expected = ["recording", *(f"{label}-{way}" for way in WAYS), "dmel-25hz-reconstruction"]
    assert {path.name for path in out.glob("*.wav")} == {f"my-take-{name}.wav" for name in expected}

    # What is written is the model's own answer to the mixed recording at its rate.
    both, _ = soundfile.read(stereo, dtype="float32")
    mono = soxr.resample(both.mean(axis=1), 44100, 16000).astype(np.float32)
    model = load_tokenizer(tiny_tokenizer)
    with torch.inference_mode():
        codes = model.encode(torch.from_numpy(mono)[None, None]).audio_codes
        answers = [model.decode(codes), model.decode(codes[:, :1]), model.resynthesize(codes)]
    written = [soundfile.read(out / f"my-take-{name}.wav", dtype="float32") for name in expected]
    assert all(rate == 16000 and audio.shape == mono.shape for audio, rate in written)
    assert np.abs(written[0][0] - mono).max() < 1e-3
    for (audio, _), answer in zip(written[1:4], answers, strict=True):
        answer = answer.audio_values[0, 0, : len(mono)].clamp(-1, 1).numpy()
        assert np.abs(audio - answer).max() < 1e-3 and np.abs(answer).max() > 1e-3

    entry = results_of(config)["recordings"][0]
    rows = {(row["tokenizer"], row["way"]): row for row in entry["rows"]}
    assert (entry["sampling_rate"], entry["channels"]) == (44100, 2) and entry["duration_s"] == pytest.approx(1.3)
    assert rows[label, "reconstruction"]["bitrate_bps"] == 12.5 * (5 + 4 + 4)
    assert rows[label, "semantic_reconstruction"]["bitrate_bps"] == rows[label, "resynthesis"]["bitrate_bps"] == 62.5
    assert [row["n_books"] for row in entry["rows"]] == [3, 1, 1, 80]
    assert all(row["real_time_factor"] > 0 and row["mel_distance_db"] > 0 for row in entry["rows"])
    # dMel keeps the spectrum; the tiny model knows nothing.
    close, far = rows["dmel-25hz", "reconstruction"], rows[label, "reconstruction"]
    assert close["mel_distance_db"] < far["mel_distance_db"]
    printed = capsys.readouterr().out
    assert "my <take>.wav (1.30 s, 44100 Hz, stereo" in printed and "dmel-25hz" in printed
    assert f"{far['mel_distance_db']:.2f}" in printed


def test_a_long_recording_goes_in_chunks_to_the_same_sound(config, tiny_tokenizer):
    config.tokenizers = [str(tiny_tokenizer)]
    resynthesize.run(config)
    whole = [soundfile.read(path)[0] for path in sorted(Path(config.output).glob("*.wav"))]
    config.chunk_s, config.output = 0.25, config.output + "-chunks"
    resynthesize.run(config)
    for one, path in zip(whole, sorted(Path(config.output).glob("*.wav")), strict=True):
        chunked = soundfile.read(path)[0]
        assert chunked.shape == one.shape and np.abs(chunked - one).max() < 2e-3


def test_scores_are_against_the_recording_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(resynthesis, "PIECE_S", 0.5)
    sound = tone(2.2)
    soundfile.write(tmp_path / "a.wav", sound, 16000)
    soundfile.write(tmp_path / "half.wav", 0.5 * soxr.resample(sound, 16000, 24000), 24000)
    same = resynthesis.scores(tmp_path / "a.wav", tmp_path / "a.wav", "x")
    assert same["mel_distance_db"] == 0 and same["level_difference_db"] == 0
    assert same["n_measured"]["mel_distance_db"] == 5 and same["scored_s"] == pytest.approx(2.2)
    half = resynthesis.scores(tmp_path / "a.wav", tmp_path / "half.wav", "x")
    assert half["level_difference_db"] == pytest.approx(-6.02, abs=0.1)


def test_an_hour_is_scored_in_pieces_spread_over_it():
    pieces = resynthesis.pieces(3600.0)
    assert len(pieces) == resynthesis.MOST_PIECES and pieces[0] == (0, 30) and sum(pieces[-1]) == 3600
    assert resynthesis.pieces(4.0) == [(0, 4)] and len(resynthesis.pieces(30.5)) == 2


@pytest.fixture
def bad_files(tmp_path, stereo) -> dict[str, str]:
    """File -> what is said of it."""
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(tmp_path / "no_frames.wav", np.zeros(0), 16000)
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "corrupt.flac", tone(1.0), 16000)
    content = (tmp_path / "corrupt.flac").read_bytes()
    (tmp_path / "corrupt.flac").write_bytes(content[: len(content) // 3])
    (tmp_path / "words.wav").write_text("no audio at all " * 50)
    (tmp_path / "phone.m4a").write_bytes(b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom" + bytes(range(256)) * 8)
    said = {
        "silent.wav": "silent",
        "no_frames.wav": "0.0 ms of audio",
        "empty.wav": "empty (0 bytes): copy it again",
        "corrupt.flac": "convert it to WAV or FLAC",
        "words.wav": "convert it to WAV or FLAC",
        "phone.m4a": "convert it to WAV or FLAC",
        "gone.wav": "no such file: correct the path",
    }
    return {str(tmp_path / name): message for name, message in said.items()}


def test_bad_files_are_named_and_the_others_are_made(config, bad_files, stereo, tiny_tokenizer):
    files = [*bad_files, str(stereo)]
    settings = [f"tokenizers={tiny_tokenizer}", "judge=null"]
    found = CliRunner().invoke(cli.app, ["resynthesize", *files, "-o", config.output, *settings])
    assert found.exit_code == 2
    assert "7 of 8 files could not be used" in found.stderr
    for name, reason in bad_files.items():
        assert any(line.startswith(f"{name}: ") and reason in line for line in found.stderr.splitlines()), name
    results = results_of(config)
    assert [error["file"] for error in results["errors"]] == list(bad_files)
    assert all(reason in error["error"] for error, reason in zip(results["errors"], bad_files.values(), strict=True))
    assert [entry["file"] for entry in results["recordings"]] == [str(stereo)]
    assert len(list(Path(config.output).glob("*.wav"))) == 4
    assert "silent.wav" in (Path(config.output) / "index.html").read_text()


def test_strict_stops_at_the_first_bad_file(config, bad_files, stereo):
    config.strict, config.files = True, [list(bad_files)[-1], str(stereo)]
    with pytest.raises(AudioError, match="gone.wav: no such file"):
        resynthesize.run(config)
    assert not Path(config.output).exists()
    with pytest.raises(AudioError, match="gone.wav: no such file"):
        resynthesize.plan(config)


def test_a_plan_reads_all_and_writes_nothing(config):
    plan = resynthesize.plan(config)
    assert "1.30 s, 44100 Hz, stereo" in plan[config.files[0]]
    assert plan["dmel-25hz"] == {"frame rate (Hz)": 25.0, "codebooks": [16] * 80, "outputs": "reconstruction"}
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("command", "settings"), [("resynthesize", ["tokenizers=dmel-25hz", "judge=null"]), ("transcribe", [])]
)
def test_a_dry_run_of_bad_files_ends_as_the_run_would(bad_files, stereo, command, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(cli.app, [command, *bad_files, str(stereo), *settings, "--dry-run"])
    assert found.exit_code == 2 and "7 of 8 files could not be used" in found.stderr
    for name, reason in bad_files.items():
        assert any(line.startswith(f"{name}: ") and reason in line for line in found.stderr.splitlines()), name


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_made(config, tmp_path, monkeypatch):
    """By a dry run too. A file system that is read-only refuses root as well, so that only the answer is put in."""
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    for step in (resynthesize.plan, resynthesize.run):
        with pytest.raises(ConfigError, match=rf"output \(-o\) {config.output}: {tmp_path} may not be written"):
            step(config)
    with pytest.raises(ConfigError, match=rf"run_dir {tmp_path}/a/b: {tmp_path} may not be written"):
        RunFolder(tmp_path / "a" / "b").check(config)


def test_random_weights_are_refused(config):
    config.tokenizers = ["nano-6.25hz"]
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="random weights.*allow_untrained=true"):
        resynthesize.plan(config)
    config.allow_untrained = True
    assert resynthesize.plan(config)["nano-6.25hz"]["frame rate (Hz)"] == 6.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": []}, "nothing to do: give FILE"),
        ({"tokenizers": ["dmel-25hz", "dmel-25hz"]}, "one stands there twice"),
        ({"output": "{stereo}"}, "is a file; name a folder"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(config, stereo, changes, message):
    for key, value in changes.items():
        setattr(config, key, str(stereo) if value == "{stereo}" else value)
    with pytest.raises(ConfigError, match=message):
        resynthesize.run(config)


def test_a_tokenizer_without_a_decoder_is_refused(config, monkeypatch):
    model = load_tokenizer("dmel-25hz")
    monkeypatch.setattr(type(model), "decode_paths", ())
    with pytest.raises(ConfigError, match="dmel-25hz has no decoder"):
        resynthesize.plan(config)


def test_a_recording_is_never_written_over(config, stereo):
    resynthesize.run(config)
    config.files = [str(stereo), str(Path(config.output) / "my-take-recording.wav")]
    before = Path(config.files[1]).read_bytes()
    with pytest.raises(ConfigError, match="would be overwritten: choose another -o"):
        resynthesize.run(config)
    assert Path(config.files[1]).read_bytes() == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_mistyped_folder_leaves_what_an_earlier_start_made(config, stereo, bad_files):
    config.tokenizers = ["dmel-25hz"]
    resynthesize.run(config)
    made = contents(Path(config.output))
    config.files = [str(stereo.parent / "tyop" / stereo.name)]
    with pytest.raises(AudioError, match=r"no such file(.|\n)*1 of 1 files could not be used, nothing was made"):
        resynthesize.run(config)
    assert contents(Path(config.output)) == made
    # Beside a file that can be used too: the earlier start's sound stays.
    other = shutil.copy(stereo, stereo.parent / "other.wav")
    config.files.append(str(other))
    with pytest.raises(AudioError, match="1 of 2 files could not be used, the others are in"):
        resynthesize.run(config)
    now = contents(Path(config.output))
    assert {name for name in made if name.endswith(".wav")} < set(now) and "other-recording.wav" in now


def test_half_a_result_is_taken_away_again(config, stereo, monkeypatch):
    def torn(*_):
        raise AudioError(f"{stereo}: torn in the middle")

    config.tokenizers = ["dmel-25hz"]
    resynthesize.run(config)
    page = (Path(config.output) / "index.html").read_bytes()
    monkeypatch.setattr(round_trip, "long_enough", torn)
    with pytest.raises(AudioError, match="nothing was made"):
        resynthesize.run(config)
    # It had written its recording; the sound of the earlier start it had not come to.
    assert [path.name for path in Path(config.output).glob("*.wav")] == ["my-take-dmel-25hz-reconstruction.wav"]
    assert (Path(config.output) / "index.html").read_bytes() == page  # no empty one in its place


@pytest.mark.parametrize("name", ["index.html", "my-take-recording.wav", "resynthesis.json"])
def test_nobody_else_s_file_is_written_over(config, name):
    out = Path(config.output)
    out.mkdir()
    (out / name).write_text("{}")
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    for start in (resynthesize.plan, resynthesize.run):
        with pytest.raises(ConfigError, match=rf"holds {name}, which would be written over.*choose another -o"):
            start(config)
    assert contents(out) == before


def test_a_start_that_was_cut_off_finds_its_own_files(config, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    config.tokenizers = ["dmel-25hz"]
    (Path(config.output)).mkdir()
    (Path(config.output) / "notes.txt").write_text("mine")  # no hindrance: nothing of it is written over
    with monkeypatch.context() as patch:
        patch.setattr(resynthesize, "scores", cut)
        with pytest.raises(KeyboardInterrupt):
            resynthesize.run(config)
    assert list(Path(config.output).glob("*.wav"))
    resynthesize.run(config)
    assert len(results_of(config)["recordings"]) == 1 and (Path(config.output) / "notes.txt").exists()


def test_the_page_holds_excerpts_and_no_outside_resource(config, monkeypatch):
    config.tokenizers, config.excerpt_s = ["dmel-25hz"], 0.5
    page = resynthesize.run(config).read_text()
    sources = re.findall(r'<audio[^>]* src="([^"]*)"', page)
    assert len(sources) == 2 and "http" not in page and "my <take>" not in page and "my &lt;take&gt;" in page
    for source in sources:
        audio, rate = soundfile.read(io.BytesIO(base64.b64decode(source.removeprefix("data:audio/flac;base64,"))))
        assert (len(audio), rate) == (8000, 16000) and np.abs(audio).max() > 0.01
    assert "first 0.5 s" in page
    assert "dmel-25hz: dmel-25hz" in page  # a short name, and whose it is
    monkeypatch.setattr(resynthesis, "MOST_INSIDE_S", 0.1)  # too much: the page plays the files beside it
    page = resynthesize.run(config).read_text()
    sources = re.findall(r'<audio[^>]* src="([^"]*)"', page)
    assert len(sources) == 2 and all((Path(config.output) / source).is_file() for source in sources)


def test_a_judge_says_what_it_hears(config, monkeypatch, capsys):
    class Ear:
        name, identity = "ear", {"name": "ear"}

        def transcribe(self, audios, sampling_rate):
            return [f"{len(audio) / sampling_rate:.2f} s of hum" for audio in audios]

    monkeypatch.setattr(resynthesize, "check_judge", lambda judge: None)
    monkeypatch.setattr(resynthesize, "load_judge", lambda judge, device: Ear())
    config.tokenizers, config.judge, config.excerpt_s = ["dmel-25hz"], "ear", 0.75
    page = resynthesize.run(config).read_text()
    entry = results_of(config)["recordings"][0]
    assert entry["rows"][0]["heard_cer"] == 0.0 and "CER %" in page
    assert entry["heard"] == entry["rows"][0]["heard"] == "0.75 s of hum" and page.count("0.75 s of hum") == 2
    assert "ear hears in the recording: 0.75 s of hum" in capsys.readouterr().out


def test_several_recordings_get_their_means(config, tmp_path, capsys):
    soundfile.write(tmp_path / "my <take>.flac", tone(0.6), 16000)  # the stem is taken: it gets a number
    config.files.append(str(tmp_path / "my <take>.flac"))
    config.tokenizers = ["dmel-25hz"]
    resynthesize.run(config)
    results = results_of(config)
    each = [entry["rows"][0]["mel_distance_db"] for entry in results["recordings"]]
    assert results["means"][0]["mel_distance_db"] == pytest.approx(sum(each) / 2) and results["means"][0]["n"] == 2
    assert [entry["audio"] for entry in results["recordings"]][1] == "my-take-2-recording.wav"
    assert "means over 2 recordings" in capsys.readouterr().out


def test_a_mean_says_how_many_recordings_it_is_of():
    row = {"tokenizer": "t", "way": "resynthesis", "frame_rate_hz": 25.0, "n_books": 1, "bitrate_bps": 250.0}
    row |= {"real_time_factor": 0.1, "mel_distance_db": 3.0, "pesq": None, "heard_cer": 0.5}
    row |= {"n_measured": dict.fromkeys(("mel_distance_db", "stoi", "pesq"), 1)}
    rows = [row | {"stoi": stoi} for stoi in (0.8, 0.9, None)]
    (mean,) = resynthesis.means({"recordings": [{"rows": [one]} for one in rows]})
    texts = {heading: text(mean) for heading, text in resynthesis._columns(rows)}
    assert (texts["STOI"], texts["log-mel dB"], texts["CER %"]) == ("0.850 (2 of 3)", "3.00", "50")
    assert mean["pesq"] is None and "PESQ" not in texts  # a column that is empty is left out


def test_names_tell_models_apart():
    assert labels_of(["runs/a/12.5hz/tokenizer/model", "runs/a/25hz/tokenizer/model"]) == ["12.5hz", "25hz"]
    assert labels_of(["runs/a/25hz/tokenizer", "runs/b/25hz/tokenizer", "kyutai/mimi"]) == [
        "a-25hz",
        "b-25hz",
        "kyutai-mimi",
    ]
    assert labels_of(["runs/tokenizer/model"]) == ["tokenizer"]
    assert distinct(["a", "A", "a-2", "b"]) == ["a", "A-2", "a-2-2", "b"]


def test_one_tokenizer_needs_no_brackets():
    assert load_config(Config, None, ["tokenizers=runs/a"]).tokenizers == ["runs/a"]
    assert load_config(Config, None, ["tokenizers=[runs/a, b/c]"]).tokenizers == ["runs/a", "b/c"]


def test_without_a_word_it_is_the_embedded_tokenizers_and_their_recogniser(
    tmp_path, stereo, tiny_tokenizer, tiny_teacher, monkeypatch, capsys
):
    config = load_config(Config, None, [f"files=[{stereo}]", f"output={tmp_path / 'out'}"])
    assert config.tokenizers == ["embedded-25hz", "embedded-12.5hz", "embedded-6.25hz"]
    with pytest.raises(ValueError, match="embedded-recogniser: its files are missing"):
        monkeypatch.setattr(tokenizer.embedded, "WEIGHTS", tmp_path / "weights")
        resynthesize.plan(config)
    for name in tokenizer.embedded.EMBEDDED:
        shutil.copytree(tiny_teacher if "recogniser" in name else tiny_tokenizer, tmp_path / "weights" / name)
    resynthesize.run(config)
    results = results_of(config)
    assert [item["label"] for item in results["tokenizers"]] == config.tokenizers
    assert len(results["recordings"][0]["rows"]) == 9 and results["protocol"]["judge"]["name"] == "embedded-recogniser"
    assert {path.name for path in Path(config.output).glob("*.wav")} >= {
        f"my-take-embedded-6.25hz-{way}.wav" for way in WAYS
    }
    shown = capsys.readouterr().out
    assert "bit/s" in shown and "embedded-25hz" in shown and "embedded-recogniser hears in the recording" in shown


def test_what_is_too_short_for_a_code_is_filled_up():
    def lengths(fewest):
        return sum(len(block) for block in long_enough([np.ones(3), np.ones(4)], fewest))

    assert (lengths(1), lengths(7), lengths(10)) == (7, 7, 10)
