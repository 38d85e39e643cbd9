"""``slm evaluate`` of much audio: bounded memory, nothing read twice, one clip that fails stops nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from eval.judges.config import JudgeConfig, JudgeError
from eval.judges.judge import conditions_of
from eval.results_file import load_results
from recipes.commands import evaluate
from recipes.runs.pipeline import PipelineConfig, Stage, make_steps
from recipes.scoring import evaluation
from recipes.scoring.answer_cache import AnswerCache
from recipes.scoring.evaluation import Config
from tests.conftest import tone
from tokenizer import load_tokenizer
from tokenizer.data.utterances import DataSource

RATE = 16_000


class Ear:
    """A judge whose text is the loudness of the clip; it counts what it reads and can be told to fail."""

    sampling_rate, name = RATE, "ear"
    identity = {"name": "ear", "kind": "test", "revision": "1", "decoding": "none"}

    def __init__(self) -> None:
        self.n_read, self.longest_s, self.dies_after = 0, None, None

    def transcribe(self, audios: list[np.ndarray], sampling_rate: int) -> list[str]:
        texts = []
        for audio in audios:
            if self.longest_s is not None and len(audio) > self.longest_s * sampling_rate:
                raise IndexError("position 448 is out of range")
            if self.n_read == self.dies_after:
                raise KeyboardInterrupt  # as a kill: nothing of ours catches it
            self.n_read += 1
            texts.append(f"one {int(1e6 * float(np.abs(audio).mean()))}")
        return texts


class Cheap:
    """The codec protocol with next to no arithmetic; it states no receptive field."""

    trained, decode_paths = True, ("reconstruction", "semantic_reconstruction", "resynthesis")

    def __init__(self) -> None:
        self.config = SimpleNamespace(
            sampling_rate=RATE, auxiliary_sampling_rate=RATE, frame_rate=12.5, codebook_sizes=[4, 4], hop_length=1280
        )

    def to(self, device: str) -> Cheap:
        return self

    def fingerprint(self, precision: str = "fp32", sound: bool = False) -> str:
        return "f"

    def encode(self, input_values, padding_mask):
        frames = padding_mask.sum(1).add(1279) // 1280
        mask = torch.arange(int(frames.max())) < frames[:, None]
        codes = torch.where(mask[:, None], torch.ones(1, 2, 1, dtype=torch.int64), -1)
        return SimpleNamespace(audio_codes=codes, audio_codes_mask=mask)

    def decode(self, audio_codes, lengths=None):
        level = 0.1 * audio_codes.shape[1]  # each way back has a sound of its own
        return SimpleNamespace(audio_values=torch.full((len(audio_codes), 1, audio_codes.shape[-1] * 1280), level))

    def resynthesize(self, audio_codes, lengths=None):
        return SimpleNamespace(audio_values=self.decode(audio_codes).audio_values / 5)


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Ear:
    judge = Ear()
    monkeypatch.setattr(evaluation, "check_judge", lambda config: Ear.identity)
    monkeypatch.setattr("recipes.scoring.judges.load_judge", lambda config, device: judge)
    return judge


def corpus(folder: Path, durations: list[float], files: int | None = None) -> Path:
    """Recordings of these lengths, of which the first ``files`` are written and the others name them again."""
    folder.mkdir()
    lines = []
    for i, duration in enumerate(durations):
        number = i if files is None else i % files
        if i == number:
            soundfile.write(folder / f"{i}.wav", tone(duration, RATE, 150 + 10 * i), RATE)
        lines.append({"id": f"u{i}", "audio": f"{number}.wav", "text": "one two", "split": "test"})
        lines[-1]["duration"] = duration
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "manifest.jsonl"


def configure(run_dir: Path, manifest: Path, **changes: Any) -> Config:
    settings = {
        "run_dir": str(run_dir),
        "judges": [JudgeConfig(name="ear")],
        "data": [DataSource(path=str(manifest))],
        "bootstrap_samples": 20,
        "samples": 1,
        "precision": "fp32",
        "quality": False,
    }
    return Config(**settings | changes)


def rows_of(run_dir: str | Path) -> list[tuple]:
    return [(row.name, row.wer, row.n_failed, row.utterances) for row in load_results(run_dir).rows]


def test_a_killed_evaluation_goes_on_to_the_results_of_one_that_was_not(tmp_path, ear, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "load_tokenizer", lambda name: Cheap())
    manifest = corpus(tmp_path / "mini", [0.5, 0.7, 0.9, 1.1, 1.3])
    settings = {"tokenizer": "cheap", "batch_seconds": 1.5}
    whole = rows_of(evaluate.run(configure(tmp_path / "whole", manifest, **settings)))
    in_all = ear.n_read
    assert in_all == 5 * 4  # recordings, and three outputs
    ear.n_read, ear.dies_after = 0, 13
    cut_off = configure(tmp_path / "cut", manifest, **settings)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(cut_off)
    (kept,) = (tmp_path / "cut" / "transcripts").glob("*.jsonl")
    before = kept.read_bytes()
    n_kept = before.count(b'"key"')
    assert 5 < n_kept <= 13
    kept.write_bytes(before[:-9])  # and the kill tore the last line
    ear.n_read, ear.dies_after = 0, None
    assert rows_of(evaluate.run(cut_off)) == whole
    assert ear.n_read == in_all - n_kept + 1
    assert kept.read_bytes().count(b'"key"') == in_all + 1  # the torn one stands there twice


def test_cells_of_a_comparison_read_the_same_recordings_once(tmp_path, ear) -> None:
    manifest = corpus(tmp_path / "mini", [0.5, 0.7, 0.9])
    data = f"data=[{{path: {manifest}}}]"
    stage = Stage("evaluate", set=[data, "judges=[{name: ear}]", "quality=false", "samples=0", "bootstrap_samples=20"])
    pipeline = PipelineConfig(run_dir=str(tmp_path / "cmp"), stages=[stage])
    for cell in ("25hz", "12.5hz", "6.25hz"):
        (step,) = make_steps(pipeline, cell)
        evaluate.run(step.config)
    assert ear.n_read == 3
    assert len(list((tmp_path / "cmp" / "transcripts").glob("*.jsonl"))) == 1
    assert rows_of(tmp_path / "cmp" / "25hz" / "evaluate") == rows_of(tmp_path / "cmp" / "6.25hz" / "evaluate")
    (alone,) = make_steps(pipeline)
    assert alone.config.transcripts_dir is None


def test_transcripts_hold_for_what_made_them_alone(tmp_path, ear, monkeypatch) -> None:
    identity = {"name": "a", "kind": "seq2seq", "weights_sha256": "ab", "decoding": "attention", "num_beams": 1}
    same = conditions_of(identity, "cpu")
    assert same == conditions_of(identity | {"name": "called otherwise"}, "cpu")
    for change in ({"weights_sha256": "cd"}, {"num_beams": 2}, {"language": "de"}, {"decoding": "joint"}):
        assert conditions_of(identity | change, "cpu") != same
    assert conditions_of(identity, "cuda:1") != same
    assert same["precision"] == "fp32" and set(same["libraries"]) >= {"torch", "transformers"}
    monkeypatch.setattr("eval.judges.judge.READING_RULE", 99)
    assert conditions_of(identity, "cpu") != same
    unknown = {"name": "hub/model", "kind": "ctc", "revision": None, "decoding": "ctc"}
    assert conditions_of(unknown, "cpu") is None
    # Another judge, and one of which nobody knows what it is, read anew.
    manifest = corpus(tmp_path / "mini", [0.5, 0.7])
    for revision, n_read, n_files in (("1", 2, 1), ("2", 4, 2), (None, 6, 2), (None, 8, 2), ("1", 8, 2)):
        monkeypatch.setattr(Ear, "identity", Ear.identity | {"revision": revision})
        name = f"run{len(list(tmp_path.iterdir()))}"
        evaluate.run(configure(tmp_path / name, manifest, transcripts_dir=str(tmp_path / "kept")))
        assert (ear.n_read, len(list((tmp_path / "kept").iterdir()))) == (n_read, n_files)


def test_lines_survive_a_kill_and_several_writers(tmp_path) -> None:
    file = tmp_path / "deep" / "kept.jsonl"
    script = (
        "import sys, time; from pathlib import Path; from recipes.scoring.answer_cache import AnswerCache\n"
        "kept, n = AnswerCache(Path(sys.argv[1]), {'a': 1}), 0\n"
        "while True:\n kept.add({f'{sys.argv[2]}{n}': 'grün ' * 20_000}); n += 1; time.sleep(0.001)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(file), name]) for name in "ab"]
    try:
        while not {"a0", "b0"} <= set(AnswerCache(file)):
            assert all(writer.poll() is None for writer in writers)
            time.sleep(0.05)
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    with file.open("ab") as torn:
        torn.write(b'{"key": "torn", "val')
    kept = AnswerCache(file)
    assert "torn" not in kept and {"a0", "b0"} <= set(kept) and set(kept.values()) == {"grün " * 20_000}
    for prefix in "ab":  # all that a writer added before its last line are there
        numbers = [int(key[1:]) for key in kept if key[0] == prefix]
        assert sorted(numbers) == list(range(len(numbers)))
    kept.add({"next": "line"})
    assert AnswerCache(file) == dict(kept) and AnswerCache(file)["next"] == "line"
    kept.forget()
    assert not file.exists() and not AnswerCache(file)


def test_memory_does_not_grow_with_the_number_of_recordings(tmp_path, ear, monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "load_tokenizer", lambda name: Cheap())
    peaks = []
    for minutes in (4, 16):
        manifest = corpus(tmp_path / f"{minutes}", [20.0] * (3 * minutes), files=3)
        tracemalloc.start()
        evaluate.run(configure(tmp_path / f"run{minutes}", manifest, tokenizer="cheap"))
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    # 12 minutes more are 44 MiB of recordings, and three times as much of what comes back of them.
    assert peaks[1] < peaks[0] + 8, peaks
    assert peaks[0] < 60, peaks  # a batch of 60 s is 3.7 MiB


def test_a_long_recording_goes_through_in_chunks(tmp_path, tiny_tokenizer, ear, monkeypatch) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer)
    longest: dict[str, float] = {}

    def watch(name: str, samples_of: float) -> None:
        original = getattr(tokenizer, name)

        def watched(values, *rest, **more):
            longest[name] = max(longest.get(name, 0.0), values.shape[-1] * samples_of)
            return original(values, *rest, **more)

        monkeypatch.setattr(tokenizer, name, watched)

    watch("encode", 1 / RATE)
    watch("decode", 1 / 12.5)
    watch("resynthesize", 1 / 12.5)
    monkeypatch.setattr(evaluation, "load_tokenizer", lambda name: tokenizer)
    manifest = corpus(tmp_path / "long", [12.0, 1.0])
    config = configure(tmp_path / "run", manifest, tokenizer=str(tiny_tokenizer), batch_seconds=4.0)
    results = load_results(evaluate.run(config))
    reach_s = max(tokenizer.receptive_field_frames, tokenizer.decoder_receptive_field_frames) / 12.5
    assert set(longest) == {"encode", "decode", "resynthesize"}
    assert max(longest.values()) <= 4.0 + 2 * reach_s + 0.1 < 12.0
    assert [row.n_scored for row in results.rows] == [2] * 4 and results.codes[0].n_frames == 150 + 13


def test_a_clip_that_a_judge_cannot_read_is_counted_and_named(tmp_path, ear) -> None:
    manifest = corpus(tmp_path / "mini", [0.5, 0.7, 3.0])
    ear.longest_s = 1.0
    results = load_results(evaluate.run(configure(tmp_path / "run", manifest)))
    (row,) = results.rows
    assert (row.n_failed, row.n_scored, row.deletions) == (1, 2, 2)
    assert [u.id for u in row.utterances if u.hypothesis is None] == ["u2"]
    (note,) = [note for note in results.notes if "failed" in note]
    assert "ground truth u2 (3.0 s): judge 'ear' cannot read it: IndexError: position 448" in note
    # A failure is not kept: once the judge can read it, it does.
    ear.longest_s, ear.n_read = None, 0
    kept = {"transcripts_dir": str(tmp_path / "run" / "transcripts")}
    again = load_results(evaluate.run(configure(tmp_path / "again", manifest, **kept)))
    assert again.rows[0].n_failed == 0 and ear.n_read == 1
    ear.longest_s = 1.0
    with pytest.raises(JudgeError, match=r"u2 \(3.0 s\)"):
        evaluate.run(configure(tmp_path / "strict", manifest, strict=True))
    ear.longest_s = 0.1
    with pytest.raises(JudgeError, match=r"can read no clip at all; the first: ground truth u0"):
        evaluate.run(configure(tmp_path / "broken", manifest))


def test_a_judge_that_cannot_be_loaded_stops_before_any_other_work(tmp_path, ear, monkeypatch) -> None:
    def absent(config: JudgeConfig, device: str) -> Ear:
        if config.label == "second":
            raise JudgeError("judge 'second' is incomplete: model.safetensors is torn")
        return ear

    monkeypatch.setattr("recipes.scoring.judges.load_judge", absent)
    monkeypatch.setattr(evaluation, "check_judge", lambda config: Ear.identity | {"name": config.label or "ear"})
    config = configure(tmp_path / "run", corpus(tmp_path / "mini", [0.5]))
    with pytest.raises(JudgeError, match="torn"):
        evaluate.run(replace(config, judges=[JudgeConfig(name="ear"), JudgeConfig(name="ear", label="second")]))
    assert ear.n_read == 0 and not (tmp_path / "run").exists()
