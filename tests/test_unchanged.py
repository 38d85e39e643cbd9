"""What must survive a reorganisation: fingerprints, and a short training's losses, as recorded before the last one.

A change that is meant to alter them records them anew: `python tests/test_unchanged.py`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from conftest import tone

from recipes.commands import train_tokenizer
from recipes.config import from_values
from tokenizer import load_tokenizer
from tokenizer.teacher.recogniser import Recogniser, RecogniserConfig, save_recogniser

RECORD = Path(__file__).with_name("unchanged.json")
NAMES = ("embedded-25hz", "embedded-12.5hz", "embedded-6.25hz", "dmel-25hz")
WIDTHS = {f"{part}_width": 32 for part in ("semantic_encoder", "acoustic_encoder", "decoder", "auxiliary_decoder")}


def short_training(folder: Path) -> list[dict[str, float]]:
    """Six steps with distillation, revival and, from the third on, discriminators; the losses of each."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    rows = []
    for split in ("train", "valid"):
        for number in range(6):
            name = f"{split}{number}"
            soundfile.write(corpus / f"{name}.flac", tone(0.3 + 0.1 * number, pitch_hz=150 + 20 * number), 16000)
            rows.append({"id": name, "audio": f"{name}.flac", "text": f"text {number}", "speaker": "a", "split": split})
    (corpus / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    torch.manual_seed(0)
    sizes = RecogniserConfig(hidden_size=64, encoder_layers=1, decoder_layers=1, window_s=2.0)
    save_recogniser(Recogniser.from_scratch(sizes), folder / "teacher")
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "data": [{"path": str(corpus / "manifest.jsonl")}],
        "model": WIDTHS | {"latent_dim": 32, "head_dim": 16, "codebook_sizes": [32, 16, 16]},
        "teacher": {"name": str(folder / "teacher")},
        "discriminator": {
            "periods": [2],
            "fft_sizes": [256],
            "period_channels": 2,
            "band_channels": 2,
            "start_step": 2,
        },
        "crops": {"crop_s": 0.5, "semantic_only": 0.3},
        "training": {"steps": 6, "batch_size": 2, "log_steps": 1, "validate_steps": 6, "revive_steps": 2},
        "precision": "fp32",
    }
    config = from_values(train_tokenizer.Config, values)
    torch.manual_seed(config.seed)
    train_tokenizer.run(config)
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        {name: value for name, value in row.items() if name.startswith("loss/")} for row in rows if "loss/mel" in row
    ]


@pytest.mark.parametrize("name", NAMES)
def test_fingerprints_are_those_recorded(name):
    """Codes that users keep are tied to them."""
    assert load_tokenizer(name).fingerprint() == json.loads(RECORD.read_text("utf-8"))["fingerprints"][name]


def test_a_short_training_s_losses_are_those_recorded(tmp_path):
    """To the bit on the machine that recorded them; elsewhere sums are made in another order."""
    recorded, found = json.loads(RECORD.read_text("utf-8"))["losses"], short_training(tmp_path)
    assert len(found) == len(recorded)
    for step, (ours, before) in enumerate(zip(found, recorded, strict=True)):
        assert ours == pytest.approx(before, rel=1e-3 if step < 3 else 1e-2), f"step {step + 1}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        record = {
            "fingerprints": {name: load_tokenizer(name).fingerprint() for name in NAMES},
            "losses": short_training(Path(scratch)),
        }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
