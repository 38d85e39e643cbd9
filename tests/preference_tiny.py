"""A tiny model that speaks, a codec whose sound can be read, and judges that read it: for preference optimisation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from slm_tiny import CODES, FINGERPRINT, save_llm

from eval.judges.config import JudgeConfig, JudgeError
from recipes.commands import train_preference
from recipes.config import load_config
from recipes.inference import setup
from slm.model.modeling import load_llm, save_slm
from slm.model.speech_rows import extend_with_speech
from slm.trained_on import TrainedOn
from slm.vocabulary import add_speech

TEXTS = ["abcabcab", "bcabcabc", "cabcabca", "aabbccaa", "bbccaabb", "ccaabbcc", "abababab", "bcbcbcbc"]
FRAME = 1280  # samples at 16 kHz, 12.5 Hz


class Codec:
    """The codec protocol whose every code is a level: what was said can be read off the sound."""

    decode_paths = ("reconstruction", "semantic_reconstruction")

    def __init__(self) -> None:
        self.config = SimpleNamespace(sampling_rate=16000, frame_rate=12.5, codebook_sizes=[CODES])

    def fingerprint(self, precision: str = "fp32", sound: bool = False) -> str:
        return FINGERPRINT

    def decode(self, audio_codes):
        levels = (audio_codes[:, 0].clamp_min(0) + 1) / (CODES + 1)
        return SimpleNamespace(audio_values=levels.repeat_interleave(FRAME, dim=-1)[:, None])


class Ear:
    """Hears a letter in each frame: a of the first level, b of the second ..."""

    def __init__(self, config: JudgeConfig, shift: int = 0) -> None:
        self.identity = {"name": config.name, "kind": "test", "revision": config.name}
        self.name, self.shift, self.heard = config.name, shift, 0

    def transcribe(self, audios, sampling_rate):
        assert sampling_rate == 16000
        self.heard += len(audios)
        codes = [np.round(audio[FRAME // 2 :: FRAME] * (CODES + 1)).astype(int) - 1 for audio in audios]
        return ["".join(chr(ord("a") + (code + self.shift) % 26) for code in item) for item in codes]


@pytest.fixture
def ears(monkeypatch) -> list[Ear]:
    """The judges `ear` and `other`, and the codec; every judge that was loaded, in order."""
    loaded: list[Ear] = []

    def check(config: JudgeConfig) -> dict:
        if config.name == "absent":
            raise JudgeError("judge 'absent' is not there")
        return {"name": config.name, "kind": "test", "revision": config.name}

    def load(config: JudgeConfig, device: str = "cpu") -> Ear:
        check(config)
        if config.name == "torn":
            raise JudgeError("judge 'torn' is incomplete or damaged")
        loaded.append(Ear(config, shift=int(config.name == "other")))
        return loaded[-1]

    monkeypatch.setattr(train_preference, "check_judge", check)
    monkeypatch.setattr(train_preference, "load_judge", load)
    monkeypatch.setattr(setup, "load_tokenizer", lambda name, device=None: Codec())
    return loaded


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """The folder of a model that speaks at random, six to ten letters for eight."""
    folder = tmp_path_factory.mktemp("start")
    model, tokenizer, _ = load_llm(str(save_llm(folder / "llm")))
    vocabulary = add_speech(tokenizer, [CODES], fingerprint=FINGERPRINT, tokenizer="tiny", normaliser="basic")
    known = TrainedOn("abc", 8, 1.0, (10.0, 12.5, 16.0), shortest_text=8, longest_loop_s=0.4, longest_text_loop=4)
    vocabulary = dataclasses.replace(vocabulary, trained_on=known)
    extend_with_speech(model, vocabulary, seed=0)
    save_slm(model, tokenizer, vocabulary, folder / "model")
    (folder / "texts.txt").write_text("\n".join(TEXTS) + "\n\n?!\n", encoding="utf-8")
    return folder


@pytest.fixture
def configure(start, ears, tmp_path):
    """A loader of configurations for the tiny model."""

    def config(run: str, *overrides: str):
        own = [f"run_dir={tmp_path / run}", f"model={start / 'model'}", f"texts={start / 'texts.txt'}"]
        own += ["judge.name=ear", "second_judge.name=other", "eval_texts=2", "device=cpu", "precision=fp32"]
        own += ["dpo.samples=4", "dpo.margin=0.05", "grpo.group_size=4", "sampling.batch_size=16"]
        settings = ["steps=4", "tokens_per_step=160", "pack_length=64", "save_steps=2", "eval_steps=2", "log_steps=1"]
        own += [f"training.{item}" for item in (*settings, "learning_rate=3e-3", "warmup_steps=1")]
        return load_config(train_preference.Config, None, [*own, *overrides])

    return config


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
