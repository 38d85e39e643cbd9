"""The plans of the field's benchmarks, dry-run unchanged where folders stand for what their names mean on the hub."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import soundfile
from conftest import tone
from slm_tiny import SENTENCES, save_llm
from test_codecs import dac, encodec, mimi, xcodec, xcodec2
from test_librispeech_configs import LIBRISPEECH, LIBRITTS, cell_config, hub_row, load
from transformers import DacModel, EncodecModel, HubertConfig, MimiModel, WhisperConfig, XcodecModel

from eval.judges import packages
from eval.protocol_presets import PRESETS
from recipes.commands import compare, encode, evaluate, finetune
from recipes.comparison.running import make_cells
from recipes.config import CONFIGS
from recipes.scoring import evaluation
from tokenizer import load_tokenizer, loading
from tokenizer.data.manifest import read_sources

DOC = Path(__file__).resolve().parents[1] / "docs" / "evaluation.md"
PLANS = sorted(file.stem for file in (CONFIGS / "benchmarks").glob("*.yaml"))
CODECS = [name for name in PLANS if name.endswith("-codecs")] + ["codec-superb"]
TTS = ["librispeech-pc-tts", "seed-tts-eval"]
# The books that the hub models have, of which a plan may take the first ones.
BOOKS = {
    "kyutai/mimi": 32,
    "descript/dac_16khz": 12,
    "facebook/encodec_24khz": 32,
    "hf-audio/xcodec-hubert-librispeech": 8,
    "HKUSTAudio/xcodec2-hf": 1,
}


loaded_once = functools.cache(load_tokenizer)


def codec(name: str) -> Any:
    """A tiny model of the kind, with as many books as the one of that name has on the hub."""
    n = BOOKS[name]
    if "mimi" in name:
        config = mimi().config
        config.num_quantizers = n
        return MimiModel(config)
    if "dac" in name:
        config = dac().config
        config.n_codebooks = n
        return DacModel(config)
    if "xcodec2" in name:
        return xcodec2()
    # The other two count their books in kbit/s: 4.8 and 0.2 a book at these sizes.
    config, a_book, kind = xcodec().config, 0.2, XcodecModel
    if "encodec" in name:
        config, a_book, kind = encodec().config, 4.8, EncodecModel
    config.target_bandwidths = [a_book, a_book * n]
    return kind(config)


def speech(file: Path, text: Path | None = None, rate: int = 16_000) -> None:
    """A short sound, and its transcript in a file beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, tone(0.6, rate, 120), rate)
    if text is not None:
        text.write_text(SENTENCES[0], encoding="utf-8")


def write_data(root: Path) -> None:
    """The test sets: those of the hub as folders of their names, the others as they are downloaded."""
    for speaker, part in enumerate(("train-clean-100", "dev-clean", "test-clean", "test-other"), start=1):
        chapter = root / "openslr" / "librispeech_asr" / part / str(speaker) / "7"
        for number in range(2):
            speech(chapter / f"{speaker}-7-000{number}.flac")
        lines = [f"{speaker}-7-000{number} {SENTENCES[number].upper()}\n" for number in range(2)]
        (chapter / f"{speaker}-7.trans.txt").write_text("".join(lines), encoding="utf-8")
    stem = root / "mythicinfinity" / "libritts" / "test-clean" / "61" / "7" / "61_7_000001_000000"
    speech(stem.with_suffix(".wav"), stem.with_suffix(".normalized.txt"), 24_000)
    speech(root / "voidful" / "codec-superb-tiny" / "test-clean" / "a.wav")  # the name says the split; no transcript
    ljspeech = root / "data" / "LJSpeech-1.1"
    speech(ljspeech / "wavs" / "LJ001-0001.wav", rate=22_050)
    (ljspeech / "metadata.csv").write_text("LJ001-0001|Bin 1|bin one\n", encoding="utf-8")
    seed_tts = root / "data" / "seedtts_testset" / "en"
    speech(seed_tts / "wavs" / "a-b.wav")
    speech(seed_tts / "prompt-wavs" / "a.wav")
    (seed_tts / "meta.lst").write_text("a-b|A prompt.|prompt-wavs/a.wav|Bin blue.\n", encoding="utf-8")
    chosen = root / "data" / "librispeech_pc_test_clean_cross_sentence.lst"
    chosen.write_text("3-7-0000\t0.6\tA prompt.\t3-7-0001\t0.6\tLay red, please.\n", encoding="utf-8")


def prepare_librispeech_pc() -> None:
    """The page's own lines, in the folder of this test."""
    block = re.search(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8").split("## 6. Benchmarks")[1], re.DOTALL)
    exec(block[1].replace("data/LibriSpeech/test-clean", "openslr/librispeech_asr/test-clean"), {})


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """A folder in which every name of the plans is a folder: tokenizers, judges, test sets, trained models."""
    root = tmp_path_factory.mktemp("hub")
    write_data(root)
    for name in BOOKS:
        codec(name).save_pretrained(root / name)
    for rate in ("25hz", "12.5hz", "6.25hz"):
        place = root / "runs" / "librispeech" / rate / "tokenizer"
        place.mkdir(parents=True)
        (place / "model").symlink_to(tiny_tokenizer)
    sizes = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64}
    for name in ("whisper-small", "whisper-large-v3"):
        WhisperConfig(**sizes).save_pretrained(root / "openai" / name)
    HubertConfig(hidden_size=8, num_hidden_layers=1).save_pretrained(root / "facebook" / "hubert-large-ls960-ft")
    return root


@pytest.fixture
def here(hub: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(hub)
    monkeypatch.setattr(evaluation, "load_tokenizer", loaded_once)
    monkeypatch.setattr(loading, "load_published", lambda name: load_tokenizer(tiny_tokenizer))
    monkeypatch.setattr(packages.metadata, "version", lambda name: "1.0")  # faster-whisper's
    return hub


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_of_a_plan_would_be_scored(here, name):
    cells = make_cells(load(f"benchmarks/{name}"))
    bits = {}
    for cell, steps in cells.items():
        plans = {step.stage.name: evaluate.plan(step.config) for step in steps}
        assert set(plans) == ({"dwer"} if name == "codec-superb" else {"wer", "dwer"})
        assert list(plans["dwer"]["judges"]) == ["whisper-small"]
        assert all(plan["utterances"] > 0 for plan in plans.values())
        assert len({step.config.tokenizer for step in steps}) == 1, cell
        bits[steps[0].config.tokenizer] = plans["dwer"]["tokenizer"]["codebooks"]
    assert {"kakaocorp/lmspt", "kyutai/mimi:8", "facebook/encodec_24khz:8"} < bits.keys() and len(bits) == len(cells)
    for tokenizer, books in bits.items():
        hub_name, _, n = tokenizer.partition(":")
        assert hub_name not in BOOKS or len(books) == int(n or BOOKS[hub_name])


def test_codec_superb_needs_no_transcripts(here):
    config = load("benchmarks/codec-superb", "only=[mimi-8]")
    assert compare.plan(config)["release-12.5hz"] == "not run (only): dwer is not complete"
    (step,) = make_cells(config)["mimi-8"]
    plan = evaluate.plan(step.config)
    assert plan["utterances"] == 1 and plan["reference words"] == 0
    step.config.protocol = "whisper-large-v3"
    with pytest.raises(ValueError, match="no utterance has a transcript"):
        evaluate.plan(step.config)


def predicted(folder: Path, task: str, line: dict[str, str]) -> None:
    """What a run of `slm transcribe` or `slm synthesize` leaves, for one utterance."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions.jsonl").write_text(json.dumps({"task": task} | line) + "\n", encoding="utf-8")


def test_the_asr_plan_is_one_llm_on_several_tokenizers(here):
    config = load("benchmarks/librispeech-asr", 'set=["codes.data=[{path: openslr/librispeech_asr}]"]')
    assert compare.plan(config).keys() == {cell.name for cell in config.cells} | {"result"}  # the coding, of each
    cells = make_cells(config)
    for cell in cells:
        slm = cell_config(cells, cell, "slm")
        own = {"run_dir": slm.run_dir, "corpus": cell_config(cells, cell, "codes").run_dir}
        assert slm == load("librispeech/finetune", *(f"{key}={value}" for key, value in own.items()))
        assert set(slm.task_weights) == {"asr", "tts"} and slm.n_codebooks == 1
    for stage, subset in (("clean", "clean"), ("other", "other")):
        scored = cell_config(cells, "mimi", stage)
        heard = cell_config(cells, "mimi", f"transcribe-{stage}")
        assert scored.data[0].subset == heard.data.subset == subset and scored.predictions == [heard.run_dir]
        scored.data[0].path = f"openslr/librispeech_asr/test-{stage}"
        (utterance, _) = read_sources(scored.data, "test")
        predicted(Path(heard.run_dir), "asr", {"id": utterance.id, "reference": utterance.text, "hypothesis": "bin"})
        plan = evaluate.plan(scored)
        assert (plan["utterances"], plan["judges"]) == (2, {}) and plan["normaliser"].startswith("whisper-english")


@pytest.mark.parametrize("name", TTS)
def test_the_tts_plans_speak_with_what_the_asr_plan_trains(here, name):
    cells = make_cells(load(f"benchmarks/{name}"))
    trained = make_cells(load("benchmarks/librispeech-asr"))
    assert list(cells) == list(trained)
    for cell in cells:
        model = Path(cell_config(cells, cell, "synthesize").model)
        assert model == Path(cell_config(trained, cell, "slm").run_dir, "model")
        stage = "hubert" if name == "librispeech-pc-tts" else "evaluate"
        assert cell_config(cells, cell, stage).tokenizer == cell_config(trained, cell, "codes").tokenizer


@pytest.fixture(scope="module")
def slm(tmp_path_factory: pytest.TempPathFactory, hub: Path) -> Path:
    """One training step of a tiny LLM on the codes of a tiny tokenizer stands for every cell of the ASR plan."""
    root = tmp_path_factory.mktemp("slm")
    data = f"data=[{{path: {hub}/openslr/librispeech_asr}}]"
    tokenizer = f"tokenizer={hub}/runs/librispeech/12.5hz/tokenizer/model"
    encode.run(load("librispeech/encode", f"run_dir={root}/codes", tokenizer, data, "num_workers=0"))
    settings = [f"model={save_llm(root / 'llm', 'qwen2', chat=True)}", f"corpus={root}/codes", "precision=fp32"]
    sizes = ["training.steps=1", "training.tokens_per_step=512", "training.gradient_accumulation=1"]
    finetune.run(load("librispeech/finetune", f"run_dir={root}/slm", *settings, *sizes))
    return root / "slm" / "model"


@pytest.mark.parametrize("name", TTS)
def test_the_tts_plans_would_speak_and_be_scored(here, slm, name):
    prepare_librispeech_pc()
    config = load(f"benchmarks/{name}")
    for cell in config.cells:
        place = here / "runs" / "benchmarks" / "librispeech-asr" / cell.name / "slm" / "model"
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(slm)
    assert compare.plan(config).keys() == {cell.name for cell in config.cells} | {"result"}
    spoken, *scored = make_cells(config)["lmspt-12.5hz"]
    (utterance,) = read_sources([spoken.config.data], "test")
    assert utterance.text == ("Lay red, please." if name == "librispeech-pc-tts" else "Bin blue.")
    line = {"id": utterance.id, "text": utterance.text, "audio": "a.wav"}
    predicted(Path(spoken.config.run_dir), "tts", line)
    judges = {step.config.protocol: list(evaluate.plan(step.config)["judges"]) for step in scored}
    assert judges == (
        {"librispeech-hubert": ["hubert-large-ls960-ft"], "f5-tts": ["faster-whisper:large-v3"]}
        if name == "librispeech-pc-tts"
        else {"seed-tts-eval": ["whisper-large-v3"]}
    )


def test_hub_splits_are_those_that_the_sets_have(monkeypatch):
    known = {"openslr/librispeech_asr": LIBRISPEECH, "mythicinfinity/libritts": LIBRITTS}
    known["voidful/codec-superb-tiny"] = {None: {"Speech", "Audio", "Music"}}
    asked = set()

    def load_dataset(path, subset, split):
        assert split in known[path][subset], f"{path}, {subset} has no split {split}"
        asked.add((path, subset, split))
        texts = {"openslr/librispeech_asr": "text", "mythicinfinity/libritts": "text_normalized"}
        return datasets.Dataset.from_list([hub_row(len(asked), **({texts[path]: "SO"} if path in texts else {}))])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in PLANS:
        for step in next(iter(make_cells(load(f"benchmarks/{name}")).values())):
            data = getattr(step.config, "data", [])
            for source in data if isinstance(data, list) else [data]:
                if source.path in known and step.stage.name != "codes":
                    assert read_sources([source], "test", needs_text="superb" not in source.path)
    assert asked == {
        ("openslr/librispeech_asr", "clean", "test"),
        ("openslr/librispeech_asr", "other", "test"),
        ("mythicinfinity/libritts", "clean", "test.clean"),
        ("voidful/codec-superb-tiny", None, "Speech"),
    }


def test_the_page_names_every_plan_and_no_other():
    assert set(re.findall(r"benchmarks/([\w-]+)", DOC.read_text(encoding="utf-8"))) == set(PLANS)


def test_published_figures_stand_beside_what_is_here():
    """Plans and protocols that the page of published results names are there, and each of its rows says its source."""
    page = (DOC.parent / "published-results.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`benchmarks/([\w-]+)`", page)) <= set(PLANS)
    protocols = set(re.findall(r"`protocol=([\w-]+)`", page))
    assert {"librispeech-hubert", "dwer-whisper-small", "seed-tts-eval"} <= protocols <= set(PRESETS)
    for section in re.split(r"\n##+ ", page.split("\n## Traps")[0])[1:]:
        for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
            heading, _, *rows = table.splitlines()
            sources = [row.split("|")[-2].strip() for row in rows] if "read in" in heading else [section]
            assert all(re.search(r"\b[abc]: |the same", source) for source in sources), heading
