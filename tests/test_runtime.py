"""Run folders, precision and what happens on a full disk."""

import errno
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import soundfile

from recipes.commands.plot_training import _lines
from recipes.config import ConfigError
from recipes.runs import files, logs, machine
from recipes.runs.files import atomic_write_text, disk_errors
from recipes.runs.inputs import refuse_other_inputs
from recipes.runs.lineage import PastRun, data_rows
from recipes.runs.machine import resolve_device, resolve_precision
from recipes.runs.run_folder import ADJUSTABLE, EXTENDABLE, NULL_MEANS, RunFolder, command_text
from recipes.runs.times import read_time
from recipes.runs.tracking import append_metrics, drop_metrics_after
from recipes.scoring.predictions import read_predictions


@dataclass
class Inner:
    steps: int = 1


@dataclass
class Config:
    run_dir: str
    seed: int = 3
    inner: Inner = field(default_factory=Inner)
    workers: int = field(default=2, metadata=ADJUSTABLE)
    data: list[dict] = field(default_factory=list)


@dataclass
class Training:
    steps: int = field(default=4, metadata=EXTENDABLE)
    schedule: int | None = field(default=None, metadata={NULL_MEANS: "steps"})


@dataclass
class Trained:
    run_dir: str
    training: Training = field(default_factory=Training)


def test_a_run_is_recorded_completed_and_recognised(tmp_path):
    config = Config(str(tmp_path / "run"))
    folder = RunFolder(config.run_dir).start(config, data_fingerprint="abc")
    record = json.loads(folder.path("run.json").read_text())
    assert record["seed"] == 3 and record["data_fingerprint"] == "abc" and "torch" in record["versions"]
    assert not folder.complete
    folder.mark_complete({"wer": 0.5})
    again = RunFolder(config.run_dir).start(config)
    assert again.complete and again.summary == {"wer": 0.5}


def test_a_command_is_shown_as_a_user_types_it(monkeypatch):
    """Also where torchrun or `python -m recipes.cli` started it."""
    for program in ("/somewhere/bin/slm", "/a checkout/recipes/cli.py"):
        monkeypatch.setattr("sys.argv", [program, "compare", "title=two words"])
        assert command_text() == "slm compare 'title=two words'"


def test_another_configuration_is_refused_naming_the_keys(tmp_path):
    run_dir = str(tmp_path / "run")
    sources = [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 1.0}]
    folder = RunFolder(run_dir).start(Config(run_dir, data=sources))
    folder.metrics.touch()
    others = [sources[0], sources[1] | {"weight": 2.0}, {"path": "c"}]
    with pytest.raises(ConfigError) as caught:
        RunFolder(run_dir).start(Config(run_dir, seed=4, inner=Inner(9), data=others))
    message = str(caught.value)
    assert "seed: was 3, is now 4" in message and "inner.steps: was 1, is now 9" in message
    assert "run_dir: was" not in message and "--restart" in message
    # Of a list only what differs: the whole of ten data sources, twice, hid the one key that did.
    changes = [line for line in message.split("\n") if "data" in line]
    assert changes == ["  - data.1.weight: was 1.0, is now 2.0", "  - data.2: was '(absent)', is now {'path': 'c'}"]


def test_a_run_that_made_nothing_may_begin_anew_with_another_configuration(tmp_path):
    """A fault in its data stops a run at once: there is no result to protect from the mended configuration."""
    run_dir = str(tmp_path / "run")
    RunFolder(run_dir).start(Config(run_dir)).checkpoints.mkdir(exist_ok=True)
    folder = RunFolder(run_dir).start(Config(run_dir, seed=4), "data")
    assert "seed: 4" in folder.path("config.yaml").read_text()
    refuse_other_inputs(folder, "mended data", "data")
    (folder.checkpoints / "shard.parquet").touch()
    with pytest.raises(ConfigError, match="seed: was 4, is now 3"):
        RunFolder(run_dir).check(Config(run_dir))
    with pytest.raises(ConfigError, match="begun with other contents of data"):
        refuse_other_inputs(folder, "mended data", "data")


def test_a_key_that_changes_no_result_may_change(tmp_path):
    run_dir = str(tmp_path / "run")
    RunFolder(run_dir).start(Config(run_dir)).mark_complete()
    assert RunFolder(run_dir).start(Config(run_dir, workers=9)).complete


def test_a_complete_run_may_be_extended_but_not_cut_short(tmp_path):
    run_dir = str(tmp_path / "run")

    def settings(steps: int, schedule: int | None = None) -> Trained:
        return Trained(run_dir, Training(steps, schedule))

    folder = RunFolder(run_dir).start(settings(4))
    (folder.checkpoints / "checkpoint-0000004").mkdir()
    folder.mark_complete()
    assert folder.done(settings(4)) and folder.start(settings(4)).complete
    folder.check(settings(9))
    assert not folder.done(settings(9)) and folder.complete  # nothing is written before it starts
    with pytest.raises(ConfigError, match=r"training.steps: was 4, is now 3, .* has reached step 4 already"):
        folder.check(settings(3))
    assert not folder.start(settings(9)).complete  # until the longer one is done
    with pytest.raises(ConfigError, match="has reached step 4"):
        folder.check(settings(3))
    folder.check(settings(4))  # no step of the longer one has been kept yet


def test_a_run_without_checkpoints_is_not_begun_anew_in_the_place_of_its_result(tmp_path):
    run_dir = str(tmp_path / "run")
    folder = RunFolder(run_dir).start(Trained(run_dir))
    folder.mark_complete()
    with pytest.raises(ConfigError, match="training.steps: was 4, is now 8, .*no checkpoint"):
        folder.check(Trained(run_dir, Training(8)))


def test_a_null_that_stands_for_a_sibling_is_that_value(tmp_path):
    """A run of 4 steps by a schedule of as many goes on by that schedule, but by no other than its own or the new."""
    run_dir = str(tmp_path / "run")
    folder = RunFolder(run_dir).start(Trained(run_dir))
    folder.metrics.touch()
    for steps, schedule in ((4, 4), (8, 4), (8, None)):
        folder.check(Trained(run_dir, Training(steps, schedule)))
    with pytest.raises(ConfigError, match="training.schedule: was None, is now 6"):
        folder.check(Trained(run_dir, Training(8, 6)))


def test_times_are_in_utc_wherever_the_machine_stands(tmp_path, monkeypatch):
    run_dir = str(tmp_path / "run")
    try:
        with monkeypatch.context() as patch:
            patch.setenv("TZ", "America/New_York")
            time.tzset()
            folder = RunFolder(run_dir).start(Config(run_dir))
            folder.mark_complete()
    finally:
        time.tzset()
    started = json.loads(folder.path("run.json").read_text())["starts"][0]
    for recorded in (started, folder.finished):
        assert recorded.endswith("+0000") and abs(read_time(recorded).timestamp() - time.time()) < 600


def test_an_edited_config_makes_a_run_incomplete(tmp_path):
    run_dir = str(tmp_path / "run")
    folder = RunFolder(run_dir).start(Config(run_dir))
    folder.mark_complete()
    folder.path("config.yaml").write_text("seed: 5\n")
    assert not folder.complete


def test_setting_aside_deletes_nothing(tmp_path):
    run_dir = tmp_path / "run"
    for number in (1, 2):
        atomic_write_text(run_dir / "run.json", str(number))
        assert RunFolder(run_dir).set_aside() == tmp_path / f"run.old-{number}"
    assert (tmp_path / "run.old-1" / "run.json").read_text() == "1"
    assert RunFolder(run_dir).set_aside() is None


def test_the_working_folder_is_never_set_aside(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in ("", ".", ".."):
        with pytest.raises(ConfigError, match="working folder"):
            RunFolder(place).set_aside()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    atomic_write_text(tmp_path / "a", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space left for .*a: .*same command goes on"):
        atomic_write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_other_disk_errors_pass_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        open(tmp_path / "nothing")


def test_a_sound_file_that_cannot_be_written_is_named(tmp_path):
    for name, why in (("nowhere/a.wav", "no space left, or no right"), (".", "a folder of that name")):
        with pytest.raises(OSError, match=f"cannot be written: .*{why}"), disk_errors(tmp_path / name):
            soundfile.write(str(tmp_path / name), [0.0], 16000, format="WAV")


def test_bf16_is_picked_only_where_it_is_fast(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    for flags, fast in (("fpu avx2 avx512f", False), ("fpu avx512_bf16", True), ("fpu amx_bf16", True)):
        info.write_text(f"processor : 0\nflags\t\t: {flags}\n")
        assert machine.cpu_has_fast_bf16(info) is fast
        monkeypatch.setattr(machine, "cpu_has_fast_bf16", lambda fast=fast: fast)
        monkeypatch.setattr(machine, "_kernels_may_use_bf16", lambda: True)
        assert resolve_precision("auto", "cpu") == ("bf16" if fast else "fp32")
        monkeypatch.undo()
    assert not machine.cpu_has_fast_bf16(tmp_path / "absent")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the variable names instruction sets of x86")
def test_bf16_is_not_chosen_where_the_environment_keeps_kernels_from_it():
    """Emulated bf16 is ten times slower than fp32 (3.1 s a fine-tuning step)."""
    code = "from recipes.runs import machine as m; m.cpu_has_fast_bf16 = lambda: True; print(m.resolve_precision())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["fp32"]


def test_what_a_command_is_asked_for_stands_alone_in_stdout():
    """So that `slm transcribe a.wav > a.txt` holds the text and no log line."""
    code = "from recipes.runs.logs import log, setup_logging; setup_logging(); log.info('model: x'); print('a text')"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "a text\n" and "model: x" in said.stderr


def test_a_warning_of_our_own_is_a_line_of_the_log(tmp_path):
    """And not the place in the code where it was raised, with that line of Python."""
    (tmp_path / "others.py").write_text("import warnings; warnings.warn('theirs')")
    code = (
        "import warnings; from recipes.runs import logs; logs.setup_logging(); import others; "
        "warnings.warn_explicit('random weights', UserWarning, logs.__file__, 1)"
    )
    paths = [str(Path(logs.__file__).parents[2]), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"^\d\d:\d\d:\d\d random weights$", said.stderr, re.MULTILINE)
    assert "others.py:1: UserWarning: theirs" in said.stderr


def test_a_log_that_goes_to_a_file_has_a_message_on_a_line():
    """Batch systems keep it so, and who searches it for a path must find the path whole."""
    message = "the corpus " + "/a/long/path" * 20 + " is complete"
    code = f"from recipes.runs.logs import log, setup_logging; setup_logging(); log.info({message!r})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(rf"\d\d:\d\d:\d\d {message}\n", said.stderr)


def test_precision_and_device_are_checked():
    assert resolve_precision("fp32", "cpu") == "fp32"
    with pytest.raises(ConfigError, match="int8.*auto, fp32, bf16"):
        resolve_precision("int8")
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        resolve_precision("fp16", "cpu")
    with pytest.raises(ConfigError, match="device"):
        resolve_device("toaster")


def test_metrics_past_a_checkpoint_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_metrics(file, step, {"loss": float("nan") if step == 1 else step})
    with file.open("a") as stream:
        stream.write('{"step": 4, "lo')  # cut off in the middle of a line
    drop_metrics_after(file, 2)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, None), (2, 2)]


def test_texts_with_line_separators_of_unicode_do_not_tear_the_files_that_hold_them(tmp_path):
    """U+2028, U+2029, U+0085 and others end a line for `str.splitlines`, and JSON leaves them as they are."""
    odd = "one\u2028two\u2029three\x85four\x1cfive\nsix"
    prediction = {"id": odd, "task": "asr", "reference": odd, "hypothesis": odd}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(prediction, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_predictions(str(tmp_path)).lines == {odd: prediction}
    rows = [{"id": name, "audio": "a.wav", "text": odd, "duration": 1800.0} for name in ("a", "b")]
    manifest = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "manifest.jsonl").write_text(manifest, encoding="utf-8")
    run = PastRun(tmp_path, "encode", {"data": [{"path": str(tmp_path)}]}, {}, {}, tmp_path)
    (row,) = data_rows([run])
    assert (row.n, row.hours) == (2, 1.0)
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "note": odd, "loss": 1.0}, ensure_ascii=False) + "\n" for step in (1, 2, 3)]
    metrics.write_text("".join(lines), encoding="utf-8")
    drop_metrics_after(metrics, 2)
    assert metrics.read_text(encoding="utf-8") == "".join(lines[:2])
    assert [row["step"] for row in _lines(metrics)] == [1, 2]
