"""`slm encode` in several processes on CPU: the bytes of one, nobody hangs, one's error ends all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import exit_codes, start

from recipes.cli import guarded
from recipes.commands import encode
from recipes.commands.encode import Config
from recipes.config import ConfigError, dump_config, load_config
from recipes.encoding import encoder
from recipes.runs.logs import setup_logging
from recipes.runs.processes import Processes

ROOT = Path(__file__).resolve().parents[1]
# gloo takes CUDA's place where a GPU is seen: the processes would share it
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def encode_all(files: list[str]) -> None:
    """Runs the jobs one after the other; in one called `spoilt` the second process fails, which ends the list."""
    setup_logging()
    real = encoder.encode_batch

    def slow(*arguments):
        if "spoilt" in file and os.environ["RANK"] == "1":
            raise ValueError("spoilt in the second process")
        time.sleep(0.1)
        return real(*arguments)

    encoder.encode_batch = slow
    for file in files:
        guarded(lambda file=file: encode.run(load_config(encode.Config, file)), debug=False)


def start_many(n: int, folder: Path, *jobs: Config) -> tuple[list[int | None], str]:
    """Runs the jobs in `n` processes; returns their exit codes and what they said."""
    files = []
    for job in jobs:
        files.append(f"{job.run_dir}.yaml")
        Path(files[-1]).write_text(dump_config(job))
    codes = exit_codes(start(encode_all, files, log=folder / "log", world=n))
    return codes, " ".join((folder / "log").read_text().split())


@pytest.fixture
def job(tmp_path, tiny_tokenizer, make_corpus):
    """Five shards of twenty recordings, one of them empty, one no audio."""
    manifest = make_corpus(20)
    (manifest.parent / "train7.flac").write_bytes(b"")
    (manifest.parent / "train11.flac").write_text("no audio")
    overrides = [f"tokenizer={tiny_tokenizer}", f"data=[{{path: {manifest}}}]", "shard_size=4", "batch_seconds=3"]

    def make(name: str, *more: str) -> Config:
        return load_config(Config, None, [f"run_dir={tmp_path / name}", *overrides, "precision=fp32", *more])

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".parquet", ".jsonl")} | {
        "index.json": (folder / "index.json").read_bytes()
    }


def cut_off(folder: Path, keep: int) -> None:
    """A finished folder as a kill leaves it with `keep` shards."""
    index = json.loads((folder / "index.json").read_text())
    begun = {"format": index["format"], "metadata": index["metadata"]}
    (folder / "begun.json").write_text(json.dumps(begun))
    for path in [folder / "index.json", folder / "complete.json", *sorted(folder.glob("*.parquet"))[keep:]]:
        path.unlink()


def test_three_processes_write_the_bytes_of_one_and_one_s_error_ends_all(job, tmp_path):
    """One start for four runs: all shards; the rest of a run that one process began; one shard for three; an error."""
    whole = contents(encode.run(job("one")))
    assert len(whole) == 7 and len(whole["skipped.jsonl"].splitlines()) == 2
    single = contents(encode.run(job("single-one", "shard_size=100")))
    encode.run(job("resumed"))
    cut_off(tmp_path / "resumed", keep=2)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "resumed").glob("*.parquet")}

    jobs = job("three"), job("resumed"), job("single-three", "shard_size=100"), job("spoilt")
    codes, said = start_many(3, tmp_path, *jobs)
    assert contents(tmp_path / "three") == whole, said[-4000:]
    assert (tmp_path / "three" / "complete.json").exists()
    assert contents(tmp_path / "resumed") == whole
    assert len(kept) == 2 and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert contents(tmp_path / "single-three") == single and len(single) == 3
    assert "3 processes, but 1 shards: 2 have nothing to encode" in said

    assert codes == [2, 2, 2], said[-4000:]
    assert said.count("process 1 of 3 stopped: spoilt in the second process") == 2
    assert not (tmp_path / "spoilt" / "index.json").exists()
    assert contents(encode.run(job("spoilt"))) == whole  # it can go on


@pytest.mark.slow
def test_torchrun_starts_it_and_a_setting_that_cannot_work_ends_it(job, tmp_path):
    """Slow: torchrun twice."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    settings = tmp_path / "settings.yaml"
    settings.write_text(dump_config(job("two")))
    command = [*launcher, "recipes.cli", "encode", "--config", str(settings)]

    def torchrun(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *more], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
        )

    done = torchrun()
    assert done.returncode == 0, done.stderr[-4000:]
    assert contents(tmp_path / "two") == contents(encode.run(job("one")))
    refused = torchrun("copies=2")
    assert refused.returncode != 0 and "copies: was 1, is now 2" in " ".join(refused.stderr.split())


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch, tmp_path):
    """accelerate takes WORLD_SIZE without torchrun's other variables for one process."""
    from accelerate import PartialState

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(PartialState, "__init__", lambda self, cpu, timeout: None)
    monkeypatch.setattr(PartialState, "num_processes", 1, raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE=2, but accelerate found 1 process: start them with torchrun"):
        Processes("cpu", tmp_path)


def test_one_process_needs_no_group_and_raises_what_was_raised(tmp_path):
    alone = Processes("cpu", tmp_path)
    assert alone.is_main and alone.together(lambda: 3) == [3]
    with pytest.raises(KeyError):
        alone.together(lambda: {}["absent"])
