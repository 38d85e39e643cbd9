"""The configurations of the paper's own scale, dry-run on stand-ins: other names of data and models, small sizes."""

from __future__ import annotations

import importlib
import io
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from conftest import tone
from slm_tiny import SENTENCES, save_llm
from test_teacher import tiny_whisper

from recipes.commands import encode, finetune, train_tokenizer
from recipes.comparison.running import make_cells
from recipes.config import CONFIGS, load_config
from recipes.runs.pipeline import Step
from slm.corpus import CodedCorpus
from tokenizer.model.configuration import preset_config

DOC = Path(__file__).resolve().parents[1] / "docs" / "reproducing-the-paper.md"
RATES = {"25": 25.0, "12.5": 12.5, "6.25": 6.25}
# The split names that the two sets have on the hub, by subset.
LIBRISPEECH = {
    "clean": {"train.100", "train.360", "validation", "test"},
    "other": {"train.500", "validation", "test"},
}
LIBRITTS = {
    "clean": {"train.clean.100", "train.clean.360", "dev.clean", "test.clean"},
    "other": {"train.other.500", "dev.other", "test.other"},
}
SMALL_MODEL = {
    "latent_dim": 32, "head_dim": 16, "semantic_encoder_width": 4, "acoustic_encoder_width": 4, "decoder_width": 32,
    "auxiliary_decoder_width": 32, "semantic_encoder_layers": 1, "acoustic_encoder_layers": 1,
}  # fmt: skip


def load(name: str, *overrides: str) -> Any:
    """A shipped configuration of its own command, which its first line names."""
    command = re.match(r"# slm ([\w-]+)", (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))[1]
    recipe = importlib.import_module(f"recipes.commands.{command.replace('-', '_')}")
    return load_config(recipe.Config, name, list(overrides))


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as LibriSpeech is downloaded: each part one chapter of two recordings."""
    root = tmp_path_factory.mktemp("data") / "LibriSpeech"
    parts = [
        "train-clean-100",
        "train-clean-360",
        "train-other-500",
        "dev-clean",
        "dev-other",
        "test-clean",
        "test-other",
    ]
    for speaker, part in enumerate(parts, start=1):
        folder = root / part / str(speaker) / "7"
        folder.mkdir(parents=True)
        lines = []
        for number in range(2):
            name = f"{speaker}-7-{number:04d}"
            soundfile.write(folder / f"{name}.flac", tone(0.8 + 0.2 * number, pitch_hz=100 + 20 * speaker), 16000)
            lines.append(f"{name} {SENTENCES[(speaker + number) % len(SENTENCES)].upper()}\n")
        (folder / f"{speaker}-7.trans.txt").write_text("".join(lines), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def libritts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as LibriTTS is downloaded, at 24 kHz."""
    root = tmp_path_factory.mktemp("data") / "LibriTTS"
    for speaker, part in enumerate(("train-clean-100", "dev-clean", "test-clean"), start=1):
        folder = root / part / str(speaker) / "7"
        folder.mkdir(parents=True)
        for number in range(2):
            stem = folder / f"{speaker}_7_000001_{number:06d}"
            soundfile.write(f"{stem}.wav", tone(0.8, 24000, 100 + 20 * speaker), 24000)
            Path(f"{stem}.normalized.txt").write_text(SENTENCES[number], encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper-small")
    tiny_whisper(positions=400).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llms")
    return {kind: save_llm(folder / kind, kind, chat=True) for kind in ("qwen2", "llama")}


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory, librispeech: Path, tiny_tokenizer: Path) -> Path:
    """The corpus that librispeech/encode makes of the folder."""
    folder = tmp_path_factory.mktemp("runs") / "codes"
    config = load("librispeech/encode", f"run_dir={folder}", f"tokenizer={tiny_tokenizer}", local(librispeech))
    return encode.run(config)


def local(folder: Path) -> str:
    """The override that the files' first lines give for a folder."""
    return f"data=[{{path: {folder}}}]"


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("processes", [1, 8])
def test_the_tokenizer_s_dry_run_says_what_it_would_do(tmp_path, monkeypatch, librispeech, teacher, rate, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    name = "train-tokenizer" if rate == "12.5" else f"train-tokenizer-{rate}hz"
    sizes = [f"model.{key}={value}" for key, value in SMALL_MODEL.items()]
    sizes += ["discriminator.period_channels=4", "discriminator.band_channels=4"]
    accumulation = f"training.accumulation={8 // processes}"
    config = load(
        f"librispeech/{name}",
        f"run_dir={tmp_path}/run",
        local(librispeech),
        f"teacher.name={teacher}",
        accumulation,
        *sizes,
    )
    plan = train_tokenizer.plan(config)
    assert plan["frame rate (Hz)"] == RATES[rate]
    assert plan["codebooks"] == [{"25": 1024, "12.5": 2048, "6.25": 4096}[rate]] + [2048] * 7
    assert plan["crops per step"] == "128, 16 in one forward pass of one process"
    assert plan["training recordings"].startswith("6, ") and plan["steps"] == 43_944
    assert plan["teacher"] == f"{teacher}, window 8 s" and plan["distillation"] == "resynthesis"
    assert plan["hours of crops seen"] == round(43_944 * 128 * 6 / 3600, 2)


@pytest.mark.parametrize("rate", RATES)
def test_the_tokenizers_are_the_paper_s_sizes_by_the_published_rules(rate):
    config = load(f"librispeech/train-tokenizer{'' if rate == '12.5' else f'-{rate}hz'}")
    published = load("published/12.5hz")
    sizes = preset_config(config.preset, **config.model)
    assert (sizes.frame_rate, sizes.sampling_rate, sizes.num_codebooks) == (RATES[rate], 16_000, 8)
    assert config.teacher.name == "openai/whisper-small" and config.weights.distillation == 100
    assert config.training.steps * config.training.batch_size == pytest.approx(20 * 281_241, rel=1e-4)
    for section in ("discriminator", "augmentation", "distillation", "mel_padding", "precision"):
        assert getattr(config, section) == getattr(published, section), section


def test_a_local_folder_is_encoded(codes):
    corpus = CodedCorpus.open(codes)
    assert {split: corpus.count(split) for split in corpus.splits} == {"train": 6, "valid": 4}


def test_the_encoding_s_dry_run_counts_hours_and_frames(tmp_path, librispeech, libritts, tiny_tokenizer):
    for name, folder, n in (("librispeech/encode", librispeech, 6), ("libritts/encode", libritts, 2)):
        config = load(name, f"run_dir={tmp_path}/run", f"tokenizer={tiny_tokenizer}", local(folder))
        plan = encode.plan(config)
        assert plan["train"]["utterances"] == n and plan["train"]["headers that cannot be read"] == 0
        assert plan["frame rate (Hz)"] == 12.5 and "test" not in plan


@pytest.mark.parametrize(
    ("name", "kind", "tasks"),
    [
        ("librispeech/finetune", "qwen2", {"asr", "tts"}),
        ("librispeech/finetune-lora", "qwen2", {"asr", "tts"}),
        ("librispeech/finetune-llama", "llama", {"asr", "tts"}),
        ("librispeech/finetune-llama-lora", "llama", {"asr", "tts"}),
        ("libritts/finetune", "qwen2", {"tts"}),
    ],
)
def test_the_fine_tuning_s_dry_run_says_what_it_would_do(tmp_path, codes, llms, name, kind, tasks):
    sizes = ["training.steps=3", "training.tokens_per_step=2048"]
    config = load(name, f"run_dir={tmp_path}/run", f"model={llms[kind]}", f"corpus={codes}", *sizes)
    plan = finetune.plan(config)
    assert plan["training"] == ("LoRA" if "lora" in name else "full") and set(plan["tokens"]) == tasks
    assert plan["precision"] == "bf16" and plan["chat template"] and plan["left out as too long"] == 0
    assert config.weights == ("bf16" if "lora" in name else "fp32")


def test_from_codes_to_the_evaluation_s_dry_run(tmp_path, librispeech, tiny_tokenizer, tiny_teacher, codes, llms):
    """One training step stands for ten thousand: transcripts and speech are made, and the evaluation reads them."""
    slm, test_clean = tmp_path / "slm", librispeech / "test-clean"
    sizes = ["training.steps=1", "training.tokens_per_step=512", "precision=fp32"]
    finetune.run(load("librispeech/finetune", f"run_dir={slm}", f"model={llms['qwen2']}", f"corpus={codes}", *sizes))
    model, data = f"model={slm}/model", f"data={{path: {test_clean}}}"
    for name in ("transcribe", "synthesize"):
        config = load(f"librispeech/{name}", f"run_dir={tmp_path}/{name}", model, data)
        recipe = importlib.import_module(f"recipes.commands.{name}")
        plan = recipe.plan(config)
        assert plan.get("utterances", plan.get("texts")) == 2
        recipe.run(config)
    evaluate = importlib.import_module("recipes.commands.evaluate")
    config = load(
        "librispeech/evaluate", f"run_dir={tmp_path}/evaluate", local(test_clean), f"tokenizer={tiny_tokenizer}",
        f"judges.0.name={tiny_teacher}", f"judges.1.name={tiny_teacher}",
        f'predictions=["{tmp_path}/transcribe", "{tmp_path}/synthesize"]',
    )  # fmt: skip
    plan = evaluate.plan(config)
    assert plan["utterances"] == 2 and set(plan["judges"]) == {"whisper-large-v3", "hubert-large"}
    assert plan["normaliser"].startswith("whisper-english")
    assert plan[f"predictions {tmp_path}/transcribe"] == "asr, 2 utterances"
    assert plan[f"predictions {tmp_path}/synthesize"] == "tts, 2 utterances"


def cell_config(cells: dict[str, list[Step]], cell: str, stage: str) -> Any:
    return next(step.config for step in cells[cell] if step.stage.name == stage)


def test_the_comparison_finds_what_the_single_commands_made():
    """Trainings are started by torchrun, each by itself; the comparison must take their folders for its own stages."""
    cells = make_cells(load("librispeech/compare"))
    assert list(cells) == [f"{rate}hz" for rate in RATES]
    for rate in RATES:
        here = f"runs/librispeech/{rate}hz"
        tokenizer = load(f"librispeech/train-tokenizer{'' if rate == '12.5' else f'-{rate}hz'}")
        codes = load("librispeech/encode", f"run_dir={here}/codes", f"tokenizer={here}/tokenizer/model")
        slm = load("librispeech/finetune", f"run_dir={here}/slm", f"corpus={here}/codes")
        for stage, config in (("tokenizer", tokenizer), ("codes", codes), ("slm", slm)):
            assert cell_config(cells, f"{rate}hz", stage) == config, f"{rate} Hz, {stage}"
    other = cell_config(cells, "12.5hz", "transcribe-other")
    assert (other.data.path, other.data.subset) == ("openslr/librispeech_asr", "other")


def hub_row(index: int, **texts: str) -> dict[str, Any]:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(16_000, np.float32), 16_000, format="FLAC")
    return {"id": f"row-{index}", "audio": {"bytes": file.getvalue(), "path": None}, "speaker_id": 7, **texts}


ALL = ["train-tokenizer", "encode", "transcribe", "synthesize", "evaluate", "evaluate-other"]


@pytest.mark.parametrize(
    ("names", "hub", "known", "text_column"),
    [
        (ALL, "librispeech", LIBRISPEECH, "text"),
        (["encode", "synthesize", "evaluate"], "libritts", LIBRITTS, "text_normalized"),
    ],
)
def test_hub_splits_are_those_that_the_sets_have(monkeypatch, names, hub, known, text_column):
    """Every split that the files name is one of the set's, and each of training and validation is asked for once."""
    from tokenizer.data.manifest import read_sources

    asked = []

    def load_dataset(path, subset, split):
        assert path == {"librispeech": "openslr/librispeech_asr", "libritts": "mythicinfinity/libritts"}[hub]
        assert split in known[subset], f"{subset} has no split {split}"
        asked.append((subset, split))
        return datasets.Dataset.from_list([hub_row(len(asked), **{text_column: "SO IT WAS"})])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    training = {(subset, split) for subset, splits in known.items() for split in splits if split.startswith("train")}
    for name in names:
        config = load(f"{hub}/{name}")
        sources = config.data if isinstance(config.data, list) else [config.data]
        asked.clear()
        wanted = "train" if name in ("train-tokenizer", "encode") else "test"
        found = read_sources(sources, wanted)
        assert {utterance.text for utterance in found} == {"SO IT WAS"} and found[0].speaker == "7"
        if wanted == "train":
            assert set(asked) == training and len(asked) == len(training)
            asked.clear()
            assert read_sources(sources, "valid") and len(asked) == len(set(asked))


def test_the_page_walks_every_file_and_names_no_other():
    page = DOC.read_text(encoding="utf-8")
    named = set(re.findall(r"--config ((?:librispeech|libritts)/[\w.-]+)", page))
    there = {
        str(file.relative_to(CONFIGS).with_suffix(""))
        for folder in ("librispeech", "libritts")
        for file in (CONFIGS / folder).glob("*.yaml")
    }
    assert named == there


def test_the_comparison_reads_local_folders_where_the_page_sets_them(librispeech):
    """The page's own command, with the folder of this test: no stage of it is left at the hub."""
    page = DOC.read_text(encoding="utf-8")
    command = re.search(r"--config librispeech/compare '(set=\[.*?\])'", page, re.DOTALL)[1]
    config = load("librispeech/compare", command.replace("/data/LibriSpeech", str(librispeech)))
    for step in make_cells(config)["12.5hz"]:
        data = getattr(step.config, "data", [])
        for source in data if isinstance(data, list) else [data]:
            assert source.path.startswith(str(librispeech)) and source.subset is None, step.stage.name
