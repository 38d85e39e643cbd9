"""What README and docs tell a reader to type: every command has keys that exist, every example of code runs."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recipes import cli
from slm.corpus import CodedCorpus
from slm.tasks import registry
from tokenizer.loading import CODECS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = {command.name: command for command in cli.COMMANDS}
# What stands for a reader's own: dots, a shell's variable, a configuration of theirs.
OWN = re.compile(r"\.\.\.|\$|--config (mine|new-language|[\w-]+\.yaml)\b")
LAUNCHERS = re.compile(r"^torchrun .*?-m recipes\.cli ")


def command_lines(page: Path) -> Iterator[str]:
    """The words behind `slm` of a page's indented and fenced lines, a line's continuation put to it."""
    lines = iter(page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines())
    for line in lines:
        while line.strip().startswith("slm ") and not ends(line):
            line += next(lines)
        line = LAUNCHERS.sub("slm ", line.strip())
        if line.startswith("slm ") and not OWN.search(line):
            yield line.removeprefix("slm ")


def ends(line: str) -> bool:
    """Whether all quotation marks of a command are closed, but for those of its comment."""
    try:
        return bool(shlex.split(line, comments=True))
    except ValueError:
        return False


def loaded(line: str) -> None:
    """Builds the configuration of one command. Raises what a reader would see."""
    words = shlex.split(line, comments=True)
    command, arguments, given = COMMANDS[words[0]], [], {}
    rest = iter(words[1:])
    for word in rest:
        if word in ("--config", "-o", "--voice"):
            given[{"-o": "output"}.get(word, word.strip("-"))] = next(rest)
        elif not word.startswith("--"):
            arguments.append(word)
    cli.build_config(command, arguments, given.pop("config", None), **given)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_command_of_the_pages_has_keys_that_exist(page):
    wrong = []
    for line in command_lines(page):
        try:
            loaded(line)
        except (ValueError, KeyError) as error:
            wrong.append(f"slm {line}: {error}")
    assert not wrong, "\n".join(wrong)


def test_there_are_commands_to_check():
    assert sum(len(list(command_lines(page))) for page in PAGES) > 100


def example_of(page: str, name: str) -> str:
    """The block of Python of a page that begins with `# NAME`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if block.startswith(f"# {name}\n"))


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    """An empty one, from which plugins are imported; what they register is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    registry._TASKS.pop("topic", None)
    CODECS.pop("loudness", None)
    for name in ("my_tasks", "my_codec"):
        sys.modules.pop(name, None)


def run(*words: str) -> str:
    found = CliRunner().invoke(cli.app, list(words))
    assert found.exit_code == 0, found.output
    return found.output


def test_the_task_of_docs_tasks_is_planned(working_directory, make_corpus, tiny_tokenizer):
    manifest = make_corpus(3)
    manifest.write_text(manifest.read_text().replace('"id"', '"topic": "weather", "id"'))
    (working_directory / "my_tasks.py").write_text(example_of("tasks.md", "my_tasks.py"))
    run("encode", f"tokenizer={tiny_tokenizer}", f"data.0.path={manifest}", "data.0.columns=[topic]", "run_dir=codes")
    plan = run(
        "finetune", "corpus=codes", "model=embedded-lm", "plugins=[my_tasks]", "task_weights.topic=1", "--dry-run"
    )
    assert "tokens.topic.sequences" in plan


def test_the_codec_of_docs_codecs_encodes(working_directory, make_corpus):
    (working_directory / "my_codec.py").write_text(example_of("codecs.md", "my_codec.py"))
    import my_codec

    my_codec.Loudness(my_codec.LoudnessConfig()).save_pretrained("loudness")
    run("encode", "tokenizer=loudness", "plugins=[my_codec]", f"data.0.path={make_corpus(2)}", "run_dir=codes")
    assert CodedCorpus.open("codes").metadata.codebook_sizes == [16]
