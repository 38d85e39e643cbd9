"""The command line: help that teaches, clean messages, plans."""

import subprocess
import sys
import types
from dataclasses import dataclass, field

import pytest
from typer.testing import CliRunner

from recipes import cli
from recipes.config import ConfigError

RAN = []


@dataclass
class FakeConfig:
    run_dir: str = ""
    steps: int = field(default=5, metadata={"help": "how many steps to take"})
    files: list[str] = field(default_factory=list)
    text: str = ""
    output: str = "out.wav"
    strict: bool = False


def fake_run(config):
    if config.steps < 0:
        raise ConfigError("steps: must not be negative")
    if config.steps == 0:
        raise KeyboardInterrupt
    if config.steps == 13:
        raise RuntimeError("a bug")
    RAN.append(config)


@pytest.fixture
def slm(monkeypatch):
    """Runs the command line over a recipe that only takes notes."""
    recipe = types.SimpleNamespace(
        Config=FakeConfig, run=fake_run, plan=lambda config: {"steps": {"all": config.steps}}
    )
    monkeypatch.setattr(cli, "load_recipe", lambda command: recipe)
    RAN.clear()
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli.app, list(arguments))


def test_help_answers_at_once_without_torch():
    code = "import sys, recipes.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_lists_every_command_and_runs_as_a_module():
    found = subprocess.run([sys.executable, "-m", "recipes.cli", "--help"], capture_output=True, text=True, check=True)
    for command in cli.COMMANDS:
        assert command.name in found.stdout


def test_a_command_s_help_teaches_its_keys_and_an_example(slm):
    result = slm("encode", "--help")
    assert result.exit_code == 0
    assert "slm encode --config quickstart/encode" in result.stdout
    assert "steps=5" in result.stdout and "how many steps to take" in result.stdout and "(int)" in result.stdout


def test_overrides_files_and_output_reach_the_configuration(slm):
    assert slm("transcribe", "a b.wav", "steps=7", "./c=d.wav").exit_code == 0
    assert RAN[-1] == FakeConfig(steps=7, files=["a b.wav", "./c=d.wav"])
    assert slm("synthesize", "he said: no", "-o", "x.wav").exit_code == 0
    assert RAN[-1] == FakeConfig(text="he said: no", output="x.wav")
    assert slm("encode", "--strict").exit_code == 0
    assert RAN[-1].strict


def test_a_dry_run_prints_the_plan_and_runs_nothing(slm):
    result = slm("encode", "steps=1234567", "--dry-run")
    assert result.exit_code == 0 and "steps.all" in result.stdout and "1,234,567" in result.stdout
    assert not RAN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "steps=-1"], "steps: must not be negative"),
        (["encode", "setps=1"], "did you mean `steps`"),
        (["encode", "words"], "'words' is not a key=value"),
        (["synthesize", "two", "words"], "put the words in quotes"),
        (["finetune", "--strict"], "takes no --strict"),
        (["encode", "-o", "x"], "takes no -o"),
        (["encode", "--config", "absent.yaml"], "no configuration file absent.yaml"),
    ],
)
def test_mistakes_end_in_one_message_and_exit_code_2(slm, arguments, message):
    result = slm(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split()) and "Traceback" not in result.output


def test_debug_raises_and_bugs_are_not_hidden(slm):
    assert isinstance(slm("encode", "steps=-1", "--debug").exception, ConfigError)
    assert isinstance(slm("encode", "steps=13").exception, RuntimeError)


def test_interruption_says_how_to_go_on(slm):
    result = slm("encode", "steps=0")
    assert result.exit_code == 130 and "goes on where this one stopped" in result.stderr


def test_restart_sets_the_folder_aside(slm, tmp_path):
    (tmp_path / "run").mkdir()
    assert slm("encode", f"run_dir={tmp_path / 'run'}", "--restart").exit_code == 0
    assert (tmp_path / "run.old-1").is_dir() and not (tmp_path / "run").exists()
