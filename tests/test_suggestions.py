"""A mistyped name is answered with the name that was meant, among few or as a guess, and never with a page of names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from eval.judges.config import JudgeConfig
from eval.judges.judge import check_judge
from eval.protocol_presets import get_preset
from eval.speech.measures.registry import chosen_measures
from eval.text.normalisers import get_normaliser
from recipes.commands.measure_codes import Config as MeasureCodes
from recipes.comparison.cells import Cell, check_stages
from recipes.comparison.config import Config as Comparison
from recipes.config import load_config, resolve_config_path
from recipes.runs.deepspeed import deepspeed_file
from recipes.runs.embedded import resolve
from recipes.runs.pipeline import PipelineConfig, Stage
from slm.embedded import embedded_folder
from slm.model.modeling import resolve_model
from slm.tasks import get_task
from tokenizer import load_tokenizer
from tokenizer.model.configuration import preset_config
from tokenizer.teacher.whisper import TeacherConfig, teacher_width

STAGES = [Stage("encode"), Stage("finetune")]
Slips = dict[str, tuple[Callable[[], object], str]]
GUESSED: Slips = {
    "--config": (lambda: resolve_config_path("quickstart/encod"), "quickstart/encode"),
    "--config without its folder": (lambda: resolve_config_path("quickstrat"), "quickstart/quickstart"),
    "--config by its beginning": (lambda: resolve_config_path("llm/qwen"), "llm/qwen2.5-0.5b-lora"),
    "--config by its folder": (lambda: resolve_config_path("llm"), "llm/gemma-3-270m-lora"),
    "key": (lambda: load_config(MeasureCodes, None, ["tokeniser=x"]), "tokenizer"),
    "measures of codes": (lambda: MeasureCodes(measures=["robustnes"]), "robustness"),
    "judge": (lambda: resolve("embedded-recognizer"), "embedded-recogniser"),
    "deepspeed": (lambda: deepspeed_file("deepspeed-zreo2"), "deepspeed-zero2"),
    "redo": (lambda: PipelineConfig(stages=STAGES, redo="fintune"), "finetune"),
    "set": (lambda: PipelineConfig(stages=STAGES, set=["encod.seed=3"]), "encode"),
    "only": (lambda: Comparison(stages=STAGES, cells=[Cell("12.5hz-s0")], only=["12.5hz-s"]), "12.5hz-s0"),
    "a cell's stages": (lambda: check_stages([Cell("a", stages=["encod"])], ["encode", "finetune"]), "encode"),
}
LISTED: Slips = {
    "measures of audio": (lambda: chosen_measures(["stio"]), "stoi"),
    "tokenizer": (lambda: load_tokenizer("nano-12hz"), "nano-12.5hz"),
    "embedded tokenizer": (lambda: load_tokenizer("embedded-12hz"), "embedded-12.5hz"),
    "embedded LLM": (lambda: embedded_folder("embedded-slm-12hz"), "embedded-slm-12.5hz"),
    "preset": (lambda: preset_config("nano-6hz"), "nano-6.25hz"),
    "task": (lambda: get_task("continuaton"), "continuation"),
    "protocol": (lambda: get_preset("f5-tts-wer"), "f5-tts"),
    "normaliser": (lambda: get_normaliser("whisper_english"), "whisper-english"),
}


@pytest.mark.parametrize("slip", GUESSED)
def test_a_mistyped_name_is_told_what_was_meant(slip) -> None:
    mistyped, meant = GUESSED[slip]
    with pytest.raises(ValueError, match="did you mean") as error:
        mistyped()
    assert f"`{meant}`" in str(error.value)


@pytest.mark.parametrize("slip", LISTED)
def test_of_a_few_names_the_message_holds_all(slip) -> None:
    mistyped, meant = LISTED[slip]
    with pytest.raises(ValueError, match=re.escape(meant)):
        mistyped()


@pytest.mark.parametrize(
    "load",
    [
        resolve_model,
        load_tokenizer,
        lambda name: teacher_width(TeacherConfig(name)),
        lambda name: check_judge(JudgeConfig(name)),
    ],
    ids=["model", "tokenizer", "teacher", "judge"],
)
@pytest.mark.parametrize("name", ["notes.txt", "owner/weights.safetensors"])
def test_a_file_in_place_of_a_model_s_folder_is_told_so_and_no_hub_is_asked(load, name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner").mkdir()
    Path(name).write_text("x")
    with pytest.raises(ValueError, match=r": a file; give the folder of a saved (model|one) \(RUN_DIR/model\)"):
        load(name)


def test_a_tokenizer_that_is_not_made_yet_is_told_who_makes_it() -> None:
    with pytest.raises(ValueError, match="no such folder.*`slm train-tokenizer` writes RUN_DIR/model") as error:
        load_tokenizer("runs/tokenizer/model")
    assert "nano-12.5hz" not in str(error.value)


def test_a_mistyped_configuration_is_no_page_of_names() -> None:
    for name in ("quickstart/encod", "nothing-like-it", "embedded"):
        with pytest.raises(ValueError, match="no configuration file") as error:
            resolve_config_path(name)
        assert len(str(error.value)) < 500 and "configs" in str(error.value)
