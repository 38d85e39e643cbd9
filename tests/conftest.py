"""Fixtures that several test files share: a tiny tokenizer and short recordings, made in process, no network."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before anything imports a Hugging Face library: no test reaches for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import soundfile
import torch

if TYPE_CHECKING:
    from slm.generation import SpeechLM

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_finish() -> None:
    """Leaves what the imports made to no later garbage collection.

    The libraries leave millions of objects that live to the end; each `gc.collect()`, which a pipeline's stage and a
    Trainer's end call, walked over all of them for a quarter of a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real speech beside the checkout; tests that want it are skipped where it is not."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real speech at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LM-SPT tokenizer that counts as trained."""
    from tokenizer import LMSPTModel
    from tokenizer.model.configuration import preset_config

    torch.manual_seed(0)
    widths = {f"{part}_width": 32 for part in ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder")}
    sizes = {"latent_dim": 32, "head_dim": 16, "codebook_sizes": [32, 16, 16], "trained": True}
    folder = tmp_path_factory.mktemp("tokenizer")
    LMSPTModel(preset_config("nano-12.5hz", **widths, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny recogniser with random weights, whose encoder can teach."""
    from tokenizer.teacher.recogniser import Recogniser, RecogniserConfig, save_recogniser

    torch.manual_seed(0)
    sizes = RecogniserConfig(hidden_size=64, encoder_layers=2, decoder_layers=1, window_s=2.0)
    folder = tmp_path_factory.mktemp("teacher")
    save_recogniser(Recogniser.from_scratch(sizes), folder)
    return folder


def tone(seconds: float, rate: int = 16000, pitch_hz: float = 200.0) -> np.ndarray:
    """(S,) a voiced sound with a little noise, the same in every run."""
    time_s = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(round(pitch_hz)).normal(scale=0.01, size=len(time_s))
    return (0.3 * np.sin(2 * np.pi * pitch_hz * time_s) + noise).astype(np.float32)


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with `n` short FLAC files in a manifest; returns the manifest."""

    def make(n: int = 6, split: str = "train", name: str = "corpus") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        rows = []
        for number in range(n):
            soundfile.write(
                folder / f"{split}{number}.flac", tone(0.3 + 0.1 * number, pitch_hz=150 + 20 * number), 16000
            )
            rows.append({"id": f"{split}{number}", "audio": f"{split}{number}.flac", "text": f"text {number}"})
            rows[-1] |= {"speaker": "anna", "split": split}
        with (folder / "manifest.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return folder / "manifest.jsonl"

    return make


@pytest.fixture(scope="session")
def untrained_slm(tmp_path_factory: pytest.TempPathFactory) -> SpeechLM:
    """A tiny speech LM with random weights, of one codebook."""
    from slm_standin import make_slm

    return make_slm(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="session")
def trained_slm(tmp_path_factory: pytest.TempPathFactory) -> SpeechLM:
    """A tiny speech LM that has learnt four sentences and their codes by heart."""
    from slm_standin import learnt_by_heart

    return learnt_by_heart(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def recipe(tmp_path: Path, untrained_slm: SpeechLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Loads the configuration of transcribe or synthesize: a model in `slm`, codes in `codes`, the stand-in codec."""
    from slm_standin import StandIn
    from slm_tiny import write_corpus

    from recipes.config import load_config
    from recipes.inference import setup
    from slm.model.modeling import save_slm

    monkeypatch.setattr(setup, "load_tokenizer", lambda name, device=None: StandIn())
    save_slm(untrained_slm.model, untrained_slm.text_tokenizer, untrained_slm.vocabulary, tmp_path / "slm")
    write_corpus(tmp_path / "codes")

    def config(module: Any, *overrides: str) -> Any:
        return load_config(module.Config, None, [f"model={tmp_path / 'slm'}", "device=cpu", *overrides])

    return config
