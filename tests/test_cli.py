"""The command line: help that teaches, clean messages, plans."""

import re
import shlex
import subprocess
import sys
import types
from dataclasses import dataclass, field

import pytest
from typer.testing import CliRunner

from recipes import cli
from recipes.command_list import TOPICS
from recipes.commands import encode, finetune, synthesize
from recipes.config import ConfigError, load_config
from recipes.runs.inputs import source_name

RAN = []


@dataclass
class FakeConfig:
    run_dir: str = ""
    steps: int = field(default=5, metadata={"help": "how many steps to take"})
    files: list[str] = field(default_factory=list)
    text: str = ""
    output: str = "out.wav"
    strict: bool = False
    weights: dict[str, float] = field(default_factory=dict)


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
    sections = dict(zip(TOPICS, re.split("|".join(f"\n{topic}:" for topic in TOPICS), found.stdout)[1:], strict=True))
    for topic, commands in TOPICS.items():
        assert all(re.search(rf"^  {command.name} ", sections[topic], re.MULTILINE) for command in commands)


def test_a_command_s_help_teaches_its_keys_and_an_example(slm):
    result = slm("encode", "--help")
    assert result.exit_code == 0
    assert "slm encode --config quickstart/encode" in result.stdout
    assert "steps=5" in result.stdout and "how many steps to take" in result.stdout and "(int)" in result.stdout


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["task_weights.asr=0", "task_weights.tts=0"], "task_weights: .* one must be above"),
        (["training.eval_steps=-1"], "training.eval_steps and training.warmup_steps: -1 and 100 must be 0 or more"),
        (["training.learning_rate=0"], "training.learning_rate: 0 must be above 0"),
    ],
)
def test_a_training_that_could_not_learn_is_refused_before_anything_is_read(keys, message):
    with pytest.raises(ConfigError, match=message):
        load_config(finetune.Config, None, ["corpus=nowhere", "model=nowhere", *keys])


def test_an_encoding_without_data_says_so_once(tmp_path):
    with pytest.raises(ConfigError, match="^data: missing; give at least one source, e.g. data.0.path="):
        encode.plan(load_config(encode.Config, None, [f"run_dir={tmp_path / 'codes'}", "tokenizer=embedded-12.5hz"]))


def test_a_source_is_called_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["corpora/grid/manifest.jsonl", "corpora/grid", "owner/name", "manifest.jsonl", "."]
    assert [source_name(name) for name in names] == ["grid", "grid", "name", tmp_path.name, tmp_path.name]


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_the_example_of_a_command_can_be_pasted(command):
    for line in command.example.splitlines():
        words = shlex.split(line)
        assert words[:2] == ["slm", command.name] and all("{" not in word and "[" not in word for word in words)


def test_no_word_of_the_keys_of_a_command_is_cut(monkeypatch):
    """Where they are shown 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("synthesize", "encode", "finetune"):
        table = cli.keys_table(cli.load_recipe(next(one for one in cli.COMMANDS if one.name == name)).Config)
        assert "…" not in table
    assert "acoustic_decoding.confidence_noise=  " in cli.keys_table(synthesize.Config)


def test_overrides_files_and_output_reach_the_configuration(slm):
    assert slm("transcribe", "a b.wav", "steps=7", "./c=d.wav").exit_code == 0
    assert RAN[-1] == FakeConfig(steps=7, files=["a b.wav", "./c=d.wav"])
    assert slm("synthesize", "he said: no", "-o", "x.wav").exit_code == 0
    assert RAN[-1] == FakeConfig(text="he said: no", output="x.wav")
    assert slm("encode", "weights.tts-aligned=2").exit_code == 0  # a task's name has a hyphen
    assert RAN[-1].weights == {"tts-aligned": 2.0}
    assert slm("encode", "--strict").exit_code == 0
    assert RAN[-1].strict


def test_a_dry_run_prints_the_plan_and_runs_nothing(slm):
    result = slm("encode", "steps=1234567", "--dry-run")
    assert result.exit_code == 0 and "steps.all" in result.stdout and "1,234,567" in result.stdout
    assert not RAN


def test_a_configuration_of_another_command_is_named():
    found = CliRunner().invoke(cli.app, ["transcribe", "a.wav", "--config", "llm/lora"])
    assert found.exit_code == 2 and "lora: unknown key" in found.stderr
    assert "llm/lora is a configuration of `slm finetune`, not of `slm transcribe`" in found.stderr
    found = CliRunner().invoke(cli.app, ["encode", "--config", "quickstart/encode", "tokeniser=x"])
    assert "unknown key" in found.stderr and "is a configuration of" not in found.stderr


def test_the_exit_statuses_are_told_where_the_commands_are_listed(slm):
    said = " ".join(CliRunner().invoke(cli.app, ["--help"]).stdout.split())
    assert "Exit status: 0, done; 2, something given cannot be used" in said and "130, interrupted" in said


def test_a_long_default_stays_under_its_key(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = next(one for one in cli.COMMANDS if one.name == "resynthesize")
    lines = cli.keys_table(cli.load_recipe(command).Config).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("  tokenizers="))
    assert lines[first + 1].startswith("    [embedded-25hz,") and lines[first + 2].startswith("    embedded-6.25hz]")


def test_a_plan_cuts_no_path(capsys, monkeypatch):
    """Where it is shown 80 columns wide."""
    monkeypatch.setenv("COLUMNS", "80")
    path = "runs/" + "long-name/" * 12 + "report.html"
    cli.show_plan(cli.COMMANDS[0], {"result": path, "a-cell-of-a-long-name-s0" * 4: "slm encode"})
    cells = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    shown = ["".join(part.strip() for part in column) for column in zip(*cells, strict=True)]
    assert path in shown[1] and "…" not in "".join(shown)


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
    assert result.exit_code == 130 and "goes on from what was saved" in result.stderr
    result = slm("synthesize", "steps=0")  # which keeps nothing on the way
    assert result.exit_code == 130 and "begins anew" in result.stderr


def test_strict_is_explained_where_it_is_taken(slm):
    assert "what the model cannot say" in " ".join(slm("synthesize", "--help").stdout.split())
    assert slm("synthesize", "red", "--strict").exit_code == 0 and RAN[-1].strict
    assert "--strict" not in slm("transcribe", "--help").stdout


def test_restart_sets_the_folder_aside(slm, tmp_path):
    (tmp_path / "run").mkdir()
    assert slm("encode", f"run_dir={tmp_path / 'run'}", "--restart").exit_code == 0
    assert (tmp_path / "run.old-1").is_dir() and not (tmp_path / "run").exists()


# Command, several things that are wrong with it, and a word of each that its plan must name.
WRONG = {
    "train-tokenizer": (
        ["init_from=EMPTY", "data=[{path: nowhere/a.jsonl}, {path: nowhere/b.jsonl, weight: 1}]"]
        + ["teacher.name=./no-teacher", "precision=fp8"],
        ["init_from=", "a.jsonl", "b.jsonl", "no-teacher", "fp8"],
    ),
    "train-tokenizer ": (
        [
            "preset=huge",
            "init_from=EMPTY",
            "teacher.name=./no-teacher",
            "trackers=[wandb]",
            "data.0.path=nowhere/a.jsonl",
        ],
        ["huge", "init_from=", "no-teacher", "a.jsonl"],
    ),
    "train-teacher": (
        ["init_from=EMPTY", "data.0.path=nowhere/a.jsonl", "normaliser=shout", "precision=fp8"],
        ["init_from=", "a.jsonl", "shout", "fp8"],
    ),
    "train-lm": (
        ["normaliser=shout", "precision=fp8", "device=abacus", "data=[]"],
        ["shout", "fp8", "abacus", "no data"],
    ),
    "train-acoustic": (
        ["corpus=./no-corpus", "precision=fp8", "device=abacus"],
        ["no-corpus", "fp8", "abacus"],
    ),
    "encode": (
        ["tokenizer=./no-tokenizer", "precision=fp8", "data=[{path: nowhere/a.jsonl}, {path: nowhere/b.jsonl}]"],
        ["no-tokenizer", "fp8", "a.jsonl", "b.jsonl"],
    ),
    "finetune": (
        ["model=./no-model", "corpus=./no-corpus", "normaliser=shout", "device=abacus"],
        ["no-model", "no-corpus", "shout", "abacus"],
    ),
    "transcribe": (
        ["nothing.wav", "EMPTY_FILE", "model=./no-model", "device=abacus"],
        ["nothing.wav", "empty.wav", "no-model", "abacus"],
    ),
    "transcribe ": (
        ["corpus=./no-corpus", "model=./no-model", "device=abacus"],
        ["no-corpus", "no-model", "abacus"],
    ),
    "synthesize": (
        ["data.path=nowhere/a.jsonl", "model=./no-model", "device=abacus"],
        ["a.jsonl", "no-model", "abacus"],
    ),
    "evaluate": (
        ["data.0.path=nowhere/a.jsonl", "predictions=[nowhere]", "judges=[{name: ./no-judge}]", "normaliser=shout"]
        + ["tokenizer=./no-tokenizer", "codes=[./no-codes]"],
        ["a.jsonl", "predictions: nowhere", "no-judge", "shout", "no-tokenizer", "no-codes"],
    ),
    "score": (
        ["reference=nowhere/ref.txt", "hypothesis=[nowhere/a.txt, nowhere/b.csv]", "normaliser=shout", "device=abacus"],
        ["ref.txt", "a.txt", "b.csv", "shout", "abacus"],
    ),
    "prepare-corpus": (
        ["voices=[en-nowhere]", "n_phrases=3", "texts_from=[nowhere/a.jsonl]"],
        ["voice", "a.jsonl"],
    ),
    "plot-training": (["no-run", "no-other", "output=curves.txt"], ["no-run", "no-other", "curves.txt"]),
    "resynthesize": (
        ["nothing.wav", "tokenizers=[./no-tokenizer, ./no-other]", "judge=./no-judge", "device=abacus"],
        ["no-tokenizer", "no-other", "no-judge", "abacus"],
    ),
    "export": (["EMPTY", "output=FULL"], ["model/config.json", "FULL"]),
    "convert": (["EMPTY", "FULL"], ["FULL", "EMPTY"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_plan_tells_all_that_is_wrong_at_once(case, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "something").write_text("mine")
    (tmp_path / "empty.wav").touch()
    arguments, words = WRONG[case]
    for name in ("EMPTY_FILE", "EMPTY", "FULL"):
        place = tmp_path / ("empty.wav" if name == "EMPTY_FILE" else name)
        arguments = [item.replace(name, str(place)) for item in arguments]
    command = case.strip()
    if command not in ("plot-training", "resynthesize", "score", "export", "convert"):
        arguments = [*arguments, f"run_dir={tmp_path / 'run'}"]
    result = CliRunner().invoke(cli.app, [command, *arguments, "--dry-run"])
    message = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output
    assert not [word for word in words if word not in message], message
    assert not (tmp_path / "run").exists()
