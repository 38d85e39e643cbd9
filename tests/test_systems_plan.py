"""The shipped comparison of all systems, dry-run whole where a small folder stands for its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile
from conftest import tone

from recipes.commands import compare
from recipes.comparison.running import make_cells
from recipes.config import load_config

TEXTS = ["bin blue at f two now", "set white by g six please", "lay green with a nine soon"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``../shared`` of the working folder, with a few sounds of each split."""
    folder = tmp_path / "shared" / "data" / "grid-s1"
    (folder / "audio" / "grid-s1").mkdir(parents=True)
    lines = []
    for number in range(12):
        # Its name is that of the recording whose voice the acoustic stage takes.
        name = "grid_s1_bbaf2n" if number == 0 else f"grid_s1_{number}"
        audio = f"audio/grid-s1/{name}.flac"
        soundfile.write(folder / audio, tone(1.5, 16_000, 100 + number), 16_000)
        split = ("train", "valid", "test")[max(0, number - 9)]
        line = {"id": name, "audio": audio, "text": TEXTS[number % 3], "speaker": "grid-s1", "duration": 1.5}
        lines.append(json.dumps(line | {"split": split}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = tmp_path / "shared" / "text" / "prose.txt"
    text.parent.mkdir()
    text.write_text("It was a bright day.\n" * 100, encoding="utf-8")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_every_system_is_planned_without_the_shared_data(data: Path) -> None:
    config = load_config(compare.Config, "baselines/compare")
    plan = compare.plan(config)
    cells = [cell.name for cell in config.cells]
    assert {name.rpartition("-")[0] for name in cells} >= {"lm-spt", "speech-llama", "tts-aligned", "goat-tts", "dcma"}
    assert all(name.endswith(("-s0", "-s1")) for name in cells) and set(cells) < set(plan)
    assert plan["speech-llama-s1"].keys() == {"finetune-continuous", "transcribe", "evaluate"}
    # The second stage takes the codes and the LLM of lm-spt, and a second seed the codes of the first one.
    assert plan["soundstorm-s1"]["finetune"] == plan["lm-spt-s1"]["finetune"]
    assert plan["delay-4-s1"]["encode"] == plan["lm-spt-s0"]["encode"] != plan["dmel-s0"]["encode"]


def test_its_cells_are_seeds_of_methods_with_a_contrast_or_a_score_of_their_own(data: Path) -> None:
    config = load_config(compare.Config, "baselines/compare")
    contrasted = {
        cell for one in config.contrasts for cell in one.group([*one.a, *one.b], [c.name for c in config.cells])
    }
    for cell, steps in make_cells(config).items():
        seeds = {step.config.seed for step in steps if step.stage.name.startswith(("finetune", "train-"))}
        assert seeds == {int(cell[-1])}, f"{cell}: seeds {seeds}"
        asked = {step.config.task for step in steps if step.stage.command == "generate"}
        assert cell in contrasted or asked, f"{cell} is held against nothing"
        scored = next(step.config for step in steps if step.stage.command == "evaluate").predictions
        answering = ("transcribe", "synthesize", "generate", "reconstruct-text-aligned")
        made = [step.config.run_dir for step in steps if step.stage.command in answering]
        assert scored == made, f"{cell}: {scored} are scored of {made}"
