"""slm export: a folder that loads as its source did, a card filled from the runs behind it, never half a folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from slm_tiny import CODES, FINGERPRINT, save_llm
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.codes import code_statistics
from eval.protocol import Protocol, TestSet
from eval.results_file import load_results, save_results
from eval.schema import Results, make_row
from eval.systems import is_task
from eval.text.normalisers import get_normaliser
from eval.text.wer import score_pairs
from recipes.commands import export
from recipes.commands.export import Config
from recipes.config import ConfigError
from recipes.exporting.card import Export, own_results
from recipes.runs.lineage import data_rows, lineage, read_run
from recipes.runs.machine import machine_text
from recipes.runs.times import wall_seconds
from slm.model.modeling import DTYPES, load_llm, save_slm
from slm.model.speech_rows import extend_with_speech
from slm.vocabulary import SpeechVocabulary, add_speech
from tokenizer import LMSPTModel, load_tokenizer

MACHINE = {"cpu": "Test CPU @ 3 GHz", "cores": 2, "threads": 1}


def write_run(folder: Path, settings: dict, *, complete: bool = True, model: Path | None = None, **record) -> Path:
    """A run folder as the recipes leave it, with a model folder copied into it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"run_dir": str(folder), **settings}))
    record = {"command": ["slm"], "machine": MACHINE, "starts": ["2026-01-01T10:00:00+0000"], **record}
    (folder / "run.json").write_text(json.dumps(record))
    if complete:
        marker = {"finished": "2026-01-01T11:30:00+0000", "summary": {"steps": 7, "valid/mel": 1.25}}
        (folder / "complete.json").write_text(json.dumps(marker))
    if model is not None:
        shutil.copytree(model, folder / "model")
    return folder


@pytest.fixture
def runs(tmp_path, tiny_tokenizer, tiny_teacher, make_corpus) -> Path:
    """A tokenizer run and the teacher's run that it names, on one corpus; returns the tokenizer's folder."""
    manifest = make_corpus(3)
    make_corpus(2, "test")
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    for line in lines:
        line |= {"duration": 1800.0, "license": "CC-BY-4.0", "source": "example.org/corpus"}
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = [{"path": str(manifest), "split": None, "limit": None}]
    teacher = write_run(
        tmp_path / "teacher",
        {"data": data, "training": {"steps": 5, "batch_size": 8, "accumulation": 2}},
        model=tiny_teacher,
        recipe="train-teacher",
        command=["slm", "train-teacher", "--config", "mine/teacher", "--debug"],
    )
    return write_run(
        tmp_path / "tokenizer",
        {
            "data": data,
            "teacher": {"name": str(teacher / "model")},
            "crops": {"crop_s": 2.0},
            "training": {"steps": 7, "batch_size": 8},
            "init_from": "embedded-12.5hz",
        },
        model=tiny_tokenizer,
        command=["cli.py", "train-tokenizer", "seed=3"],  # of an older record: it does not name its recipe
        commit="abc123",
    )


def scores(tmp_path: Path, rows: list[tuple[str, str, str, float]] | None = None, codes=()) -> Path:
    """results.json with rows of (name, system, model, frame rate) beside the recordings'; `codes`: name, frame rate."""
    protocol = Protocol(
        "speech", {"name": "ear"}, "basic", "1", TestSet("corpus test", "0" * 64, 2), bootstrap_samples=50
    )
    rates = score_pairs(["one two", "three"], ["one too", "three"], get_normaliser("basic"), ["a", "b"])
    speeds = (("fast: reconstruction", 25.0), ("slow: reconstruction", 12.5))
    wanted = rows or [(name, "reconstruction", name, rate) for name, rate in speeds]
    found = [make_row("ground truth", "ground_truth", "", protocol, rates)]
    for name, system, model, rate in wanted:
        cell, _, own = name.rpartition(": ")
        found.append(make_row(own, system, model, protocol, rates, frame_rate_hz=rate, cell=cell))
        if is_task(system):  # as transcribe and synthesize leave it: the SLM, and its tokenizer
            found[-1].model, found[-1].generation = "slm", {"tokenizer": model}
    statistics = []
    for name, rate in codes:
        cell, _, own = name.rpartition(": ")
        statistics.append(replace(code_statistics([np.zeros((1, 9), int)], [4], rate, own), cell=cell))
    save_results(Results("Scores", found, codes=statistics), tmp_path / "scores")
    return tmp_path / "scores" / "results.json"


def test_an_exported_tokenizer_is_half_the_size_and_loads_in_fp32(runs, tmp_path, tiny_tokenizer, make_corpus, caplog):
    manifest = str(make_corpus(2, "valid", "checked"))
    config = Config(str(runs), str(tmp_path / "out"), check=manifest, results=[str(scores(tmp_path))])
    config.notes = ["It was made for a test."]
    out = export.run(config)
    before, after = tiny_tokenizer / "model.safetensors", out / "model.safetensors"
    assert after.stat().st_size < 0.6 * before.stat().st_size and after.stat().st_mode & 0o044 == 0o044
    stored, source = load_file(after), load_file(before)
    assert all(torch.equal(stored[name], value.half()) for name, value in source.items())
    model = load_tokenizer(out)
    assert isinstance(model, LMSPTModel) and model.dtype == torch.float32
    assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "model.safetensors", "training.yaml"}
    assert (out / "training.yaml").read_text() == (runs / "config.yaml").read_text()
    assert not list(tmp_path.glob(".out*"))

    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["datasets"] == ["corpus"] and "lm-spt" in front["tags"]
    for text in (
        "# out\n",
        f"`{model.fingerprint()}`",
        "| corpus | train | 3 | 1.50 | 1 | CC-BY-4.0 | example.org/corpus | train-teacher, train-tokenizer |",
        "| train-teacher | 5 | 8 utterances | 1 h 30 min | Test CPU @ 3 GHz, 2 cores, 1 torch threads |",
        "| train-tokenizer | 7 | 8 crops of 2 s | 1 h 30 min |",
        "slm train-teacher --config mine/teacher\nslm train-tokenizer seed=3\n",
        "commit abc123",
        "| valid/mel | 1.25 |",
        "| bitrate, semantic book | 62.5 bit/s |",
        "share of the codes is the same, per book: ",
        "2 recordings of checked valid",
        "| slow: reconstruction | 33.3 [",
        "- It was made for a test.",
        "1.5 hours of English",
    ):
        assert text in card, text
    assert "fast: reconstruction" not in card  # another frame rate
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"| parameters | {total:,} |" in card


def test_fp32_keeps_every_bit_and_rows_can_be_chosen(runs, tmp_path, tiny_tokenizer):
    config = Config(
        str(runs / "model"), str(tmp_path / "out"), dtype="fp32", check=str(tmp_path / "corpus/manifest.jsonl")
    )
    config.results, config.rows = [str(scores(tmp_path))], ["ear: fast*"]
    out = export.run(config)
    assert load_tokenizer(out).fingerprint() == load_tokenizer(tiny_tokenizer).fingerprint()
    card = (out / "README.md").read_text()
    assert "per book: 100.00, 100.00, 100.00 %" in card and "fast: reconstruction" in card
    assert "slow: reconstruction" not in card and "ground truth" not in card


def shown(tmp_path: Path, rows, codes=(), *, name: str, labels=(), patterns=()) -> tuple[list[str], list[str]]:
    """Names of the rows and code figures that the card of a tokenizer of 12.5 Hz would show."""
    results = [load_results(scores(tmp_path, rows, codes))]
    settings = {"sampling_rate": 16000, "strides": [1280]}
    export = Export(name, "tokenizer", settings, None, "fp16", "", labels=list(labels), results=results)
    export.rows = list(patterns)
    found = own_results(export)
    return [row.label for row in found.rows], [item.label for item in found.codes]


def cell_rows(cell: str, model: str, rate: float = 12.5, tokenizer: str = "") -> list[tuple[str, str, str, float]]:
    """The rows of one cell of `slm compare`: speech of its tokenizer, and an SLM on its codes."""
    speech = [(f"{cell}: reconstruction", "reconstruction", model, rate)]
    return [*speech, (f"{cell}: SLM ASR", "asr", tokenizer or model, rate)]


def test_a_card_shows_no_rows_of_another_tokenizer_at_its_rate(tmp_path):
    rows = cell_rows("ours", "ours/train-tokenizer", tokenizer="/gone/compare/ours/train-tokenizer/model")
    rows += cell_rows("pooled", "pooled/train-tokenizer") + cell_rows("slower", "slower/train-tokenizer", 6.25)
    codes = [("ours/train-tokenizer", 12.5), ("pooled/train-tokenizer", 12.5)]
    mine = ["ground truth", "ours: reconstruction", "ours: SLM ASR"], ["ours/train-tokenizer"]
    labels = ["ours/train-tokenizer", "out"]
    assert shown(tmp_path, rows, codes, name="out", labels=labels) == mine
    assert shown(tmp_path, rows, codes, name="pooled/train-tokenizer")[0][1:] == [
        "pooled: reconstruction",
        "pooled: SLM ASR",
    ]
    with pytest.raises(ConfigError, match=r"several models \(ours/train-tokenizer, pooled/train-tok.*patterns.*rows="):
        shown(tmp_path, rows, codes, name="out")
    assert shown(tmp_path, rows, codes, name="out", patterns=["ours: rec*"]) == (["ours: reconstruction"], mine[1])


def test_the_embedded_models_rows_need_no_settings(tmp_path):
    cells = cell_rows("12.5hz", "embedded-12.5hz") + cell_rows("6.25hz", "embedded-6.25hz", 6.25)
    ours = ["ground truth", "12.5hz: reconstruction", "12.5hz: SLM ASR"]
    codes = [("12.5hz: embedded-12.5hz", 12.5), ("6.25hz: embedded-6.25hz", 6.25)]
    embedded = {"name": "embedded-12.5hz", "labels": ["12.5hz-long"]}
    assert shown(tmp_path, cells, codes, **embedded) == (ours, ["12.5hz: embedded-12.5hz"])
    # Beside others at the rate: by its name, by that of the folder it was exported from, by the cell's name.
    others = [*cells, *cell_rows("other", "other-12.5hz"), ("reconstruction", "reconstruction", "12.5hz-long", 12.5)]
    assert shown(tmp_path, others, **embedded)[0] == [*ours, "reconstruction"]
    unnamed = cell_rows("12.5hz", "a") + cell_rows("12.5hz-pooled", "b")
    assert shown(tmp_path, unnamed, **embedded)[0] == ours


def make_slm(folder: Path, kind: str) -> Path:
    """An SLM with random weights."""
    model, tokenizer, _ = load_llm(str(save_llm(folder / "llm", kind)))
    vocabulary = add_speech(tokenizer, [CODES], fingerprint=FINGERPRINT, tokenizer="tiny")
    extend_with_speech(model, vocabulary, seed=0)
    return save_slm(model, tokenizer, vocabulary, folder / "model")


def test_an_slm_s_card_shows_its_own_rows_and_its_tokenizer_s(tmp_path):
    results = load_results(scores(tmp_path, cell_rows("a", "tok-a") + cell_rows("b", "tok-b", 25.0)))
    for row in results.rows[1:]:
        row.model = f"{row.cell}/finetune" if row.system == "asr" else row.model
    export = Export("out", "slm", {}, None, "fp16", "", labels=["b/finetune"], results=[results])
    assert [row.label for row in own_results(export).rows] == ["ground truth", "b: reconstruction", "b: SLM ASR"]
    export.labels = ["c/finetune"]
    with pytest.raises(ConfigError, match="a/finetune, b/finetune"):
        own_results(export)


def test_cards_show_the_rows_of_further_tasks(tmp_path):
    rows = [*cell_rows("a", "tok-a"), ("a: SLM st", "slm-st", "tok-a", 12.5)]
    assert shown(tmp_path, rows, name="tok-a")[0] == ["ground truth", *(name for name, _, _, _ in rows)]
    export = Export("slm", "slm", {}, None, "fp16", "", results=[load_results(scores(tmp_path, rows))])
    assert own_results(export).rows[-1].label == "a: SLM st"


def test_an_export_whose_rows_are_unclear_stops_before_it_begins(runs, tmp_path):
    rows = cell_rows("a", "tok-a") + cell_rows("b", "tok-b")
    config = Config(str(runs), str(tmp_path / "out"), results=[str(scores(tmp_path, rows))])
    with pytest.raises(ConfigError, match="several models"):
        export.plan(config)
    config.name = "tok-b"
    assert export.plan(config)["result"] == str(tmp_path / "out")


def test_a_recogniser_and_its_ctc_head_travel_together(runs, tmp_path, tiny_teacher):
    check = str(tmp_path / "corpus" / "manifest.jsonl")
    out = export.run(Config(str(runs.parent / "teacher"), str(tmp_path / "ear"), check=check, name="my ear"))
    assert load_file(out / "ctc_head.safetensors")["weight"].dtype == torch.float16
    assert {path.name for path in tiny_teacher.iterdir()} | {"README.md", "training.yaml"} == {
        p.name for p in out.iterdir()
    }
    card = (out / "README.md").read_text()
    assert card.split("---")[2].startswith("\n\n# my ear\n") and "of the transcripts are the same" in card
    assert "| of these: CTC head |" in card and "| longest input at once | 2 s |" in card


@pytest.mark.parametrize(("kind", "dtype"), [("qwen2", "bf16"), ("llama", "bf16"), ("llama", "fp32")])
def test_an_exported_slm_is_a_plain_folder_that_other_engines_serve(tmp_path, kind, dtype) -> None:
    """Tensor by tensor the source's, rounded; the type that it holds is named; the same 200 tokens come out."""
    source = make_slm(tmp_path / "run", kind)
    config = json.loads((source / "config.json").read_text()) | {"use_cache": False}  # as older trainings left it
    (source / "config.json").write_text(json.dumps(config))
    out = export.run(export.Config(source=str(source), output=str(tmp_path / "out"), dtype=dtype))
    served = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    expected = AutoModelForCausalLM.from_pretrained(source).to(DTYPES[dtype])
    assert served.dtype == DTYPES[dtype] and served.config.use_cache
    names = {name for name, _ in served.named_parameters()}
    with safe_open(out / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names and ("lm_head.weight" in names) == (kind == "llama")
    for (name, a), b in zip(served.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name
    tokenizer, vocabulary = AutoTokenizer.from_pretrained(out), SpeechVocabulary.load(out)
    assert len(tokenizer) == vocabulary.size and tokenizer.convert_tokens_to_ids("<|speech|>") == vocabulary.speech_id
    assert vocabulary.end_id in served.generation_config.eos_token_id
    prompt = torch.tensor([[1, 40, 41, vocabulary.first_id]])
    settings = dict(max_new_tokens=200, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert torch.equal(served.generate(prompt, **settings), expected.generate(prompt, **settings))


def test_a_text_lm_is_exported_without_a_run_folder(tmp_path):
    folder = save_llm(tmp_path / "lm" / "model")
    (folder / "optimizer.pt").write_bytes(b"training state")
    out = export.run(Config(str(tmp_path / "lm"), str(tmp_path / "out")))
    card = (out / "README.md").read_text()
    assert "slm finetune model=path/to/out" in card and "Not recorded: there was no run folder" in card
    assert not (out / "optimizer.pt").exists() and not (out / "training.yaml").exists()
    with pytest.raises(ConfigError, match="check: compares codes or transcripts"):
        export.plan(Config(str(folder), str(tmp_path / "other"), check="manifest.jsonl"))


def test_what_may_not_be_shared_or_written_over_is_refused(runs, tmp_path, tiny_tokenizer):
    def refused(source, out, message, **more):
        with pytest.raises(ConfigError, match=message):
            export.run(Config(str(source), str(out), **more))

    out = tmp_path / "out"
    untrained = shutil.copytree(tiny_tokenizer, tmp_path / "untrained")
    settings = json.loads((untrained / "config.json").read_text())
    (untrained / "config.json").write_text(json.dumps(settings | {"trained": False}))
    refused(untrained, out, "its weights are random")
    (runs / "complete.json").rename(runs / "later.json")
    refused(runs, out, "is not finished")
    (runs / "later.json").rename(runs / "complete.json")
    refused(tmp_path, out, "neither a finished run .* nor a model folder")
    refused("", out, "give a run or model folder")
    refused(runs, runs / "model", "the model's own folder or above it")
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    refused(runs, out, "exists and is not empty; .*overwrite=true")
    refused(runs, out, "is no earlier export", overwrite=True)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (runs / "model" / "adapter_config.json").write_text("{}")
    refused(runs, out, "holds adapters")


def test_an_export_is_replaced_whole_or_not_at_all(runs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export.run(Config(str(runs), str(out)))
    (out / "stale.json").write_text("{}")
    before = sorted(path.name for path in out.iterdir())
    tensors = load_file(runs / "model" / "model.safetensors")
    large = dict(tensors) | {"quantizer.semantic.bias": torch.full((3,), 1e6)}
    save_file(large, runs / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match="quantizer.semantic.bias is beyond fp16's range: dtype=bf16 or fp32 keeps it"
    ):
        export.run(Config(str(runs), str(out), overwrite=True))
    assert sorted(path.name for path in out.iterdir()) == before and not list(tmp_path.glob(".out*"))
    save_file(tensors, runs / "model" / "model.safetensors", metadata={"format": "pt"})
    export.run(Config(str(runs), str(out), overwrite=True))
    assert not (out / "stale.json").exists() and not list(tmp_path.glob(".out*"))


def test_a_folder_goes_to_the_hub_once_it_is_whole(runs, tmp_path, monkeypatch, caplog):
    sent = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            sent.append((name, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            if repo_id == "mine/refused":
                raise ConnectionError("no route\nmore")
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("recipes.exporting.hub.HfApi", Hub)
    monkeypatch.setattr("recipes.exporting.hub.get_token", lambda: "token")
    monkeypatch.setattr("recipes.exporting.hub.constants.HF_HUB_OFFLINE", False)
    caplog.set_level("INFO")
    export.run(Config(str(runs), str(tmp_path / "out"), push_to_hub="mine/tokenizer"))
    files = ["README.md", "config.json", "model.safetensors", "training.yaml"]
    assert sent == [("mine/tokenizer", True, True), ("mine/tokenizer", files)]
    assert "sent to https://hub/mine/tokenizer" in caplog.text
    with pytest.raises(
        ConfigError, match=r"mine/refused was not sent \(ConnectionError: no route\).*hf upload mine/ref"
    ):
        export.run(Config(str(runs), str(tmp_path / "second"), push_to_hub="mine/refused", private=False))
    assert (tmp_path / "second" / "model.safetensors").is_file() and sent[-2] == ("mine/refused", False, True)
    # What would only show at the end is refused at the start.
    for name, way, message in (
        ("mine", "x", "is no name of a repository"),
        ("mine/third", None, "nobody is logged in"),
    ):
        monkeypatch.setattr("recipes.exporting.hub.get_token", lambda way=way: way)
        with pytest.raises(ConfigError, match=message):
            export.run(Config(str(runs), str(tmp_path / "third"), push_to_hub=name))
    assert not (tmp_path / "third").exists() and len(sent) == 4


def test_the_chain_goes_back_to_where_a_model_began(runs, tmp_path):
    slm = write_run(
        tmp_path / "slm",
        {"model": str(tmp_path / "gone" / "model"), "corpus": str(tmp_path / "codes"), "task_weights": {}},
        command=["slm", "compare", "--config", "mine/compare"],
    )
    write_run(tmp_path / "codes", {"tokenizer": str(runs / "model"), "copies": 1, "data": []})
    past = lineage(read_run(slm))
    assert [run.recipe for run in past.runs] == ["train-teacher", "train-tokenizer", "encode", "finetune"]
    assert past.runs[-1].command == f"slm compare --config mine/compare  # its stage {slm}"
    assert set(past.outside) == {"embedded-12.5hz", str(tmp_path / "gone" / "model")}
    assert [(row.corpus, row.split, row.n, row.hours) for row in data_rows(past.runs)] == [("corpus", "train", 3, 1.5)]


def test_a_manifest_that_a_run_made_of_data_stands_for_that_data(runs, tmp_path):
    """`slm align` takes its rows over without licences: apart, they would count twice, once as not stated."""
    corpus = yaml.safe_load((runs / "config.yaml").read_text())["data"][0]
    aligned = write_run(tmp_path / "aligned", {"data": [corpus], "aligner": "pocketsphinx"}, recipe="align")
    rows = [json.loads(line) for line in Path(corpus["path"]).read_text().splitlines()]
    for row in rows:
        del row["license"], row["source"]
    (aligned / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [{"path": str(aligned / "manifest.jsonl"), "split": None, "limit": None}]
    codes = write_run(tmp_path / "codes", {"data": data, "copies": 1}, recipe="encode")
    (row,) = data_rows(lineage(read_run(codes)).runs)
    assert (row.corpus, row.n, row.hours, row.licences) == ("corpus", 3, 1.5, ("CC-BY-4.0",))
    assert row.read_by == ["align", "encode"]


def test_relative_paths_start_where_the_run_was_started(tmp_path, tiny_tokenizer, monkeypatch):
    teacher = write_run(tmp_path / "project" / "runs" / "teacher", {"augmentation": {}})
    other = write_run(
        tmp_path / "project" / "runs" / "tokenizer", {"crops": {}, "teacher": {"name": "runs/teacher/model"}}
    )
    for folder in (teacher, other):
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(settings | {"run_dir": f"runs/{folder.name}"}))
    monkeypatch.chdir(tmp_path)  # not the project
    assert [run.recipe for run in lineage(read_run(other)).runs] == ["train-teacher", "train-tokenizer"]


def test_wall_clock_counts_each_start_up_to_its_last_sign_of_life(tmp_path):
    starts = ["2026-01-01T10:00:00+0000", "2026-01-01T12:00:00+0000"]
    first = 1767261600  # 10:00 UTC
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        "".join(json.dumps({"step": i, "time": first + t}) + "\n" for i, t in enumerate((60, 600, 7300)))
    )
    assert wall_seconds(starts, metrics, "2026-01-01T12:10:00+0000") == 600 + 600
    assert wall_seconds(starts[:1], metrics, "2026-01-01T12:10:00+0000") == 7800
    assert wall_seconds([], metrics, "2026-01-01T12:10:00+0000") is None
    assert wall_seconds(starts, metrics, "") is None
    assert machine_text({"cpus": 2}) == "2 CPU cores"
