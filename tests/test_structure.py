"""The project's own rules: who imports whom, how long files are, that every shipped configuration loads."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from recipes.command_list import COMMANDS
from recipes.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tokenizer", "slm", "eval", "recipes")
MAY_IMPORT = {"tokenizer": set(), "slm": set(), "eval": set(), "recipes": {"tokenizer", "slm", "eval"}}
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
MOST_LINES = 600


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of all absolute imports, those inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_there_is_something_to_check():
    assert len(SOURCES) > 20 and CONFIGS
    assert {file.relative_to(ROOT).parts[0] for file in SOURCES} == set(PACKAGES)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_islands_do_not_import_each_other(file):
    package = file.relative_to(ROOT).parts[0]
    wrong = imported(ast.parse(file.read_text())) & (set(PACKAGES) - {package} - MAY_IMPORT[package])
    assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Module -> our modules that it imports anywhere: at its top, in a function, or under TYPE_CHECKING."""
    modules = {module_name(file): file for file in SOURCES}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        found: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names}
        graph[name] = found & set(modules) - {name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which can be reached from each other."""

    def reached(start: str) -> set[str]:
        found, todo = set(), [start]
        while todo:
            for other in graph[todo.pop()] - found:
                found.add(other)
                todo.append(other)
        return found

    reach = {name: reached(name) for name in graph}
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in graph}
    return [list(group) for group in sorted(groups) if group]


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_no_module_imports_itself_in_a_circle():
    """A late import or one for types alone hides a circle and does not open it."""
    graph = import_graph()
    assert "tokenizer.model.layers" in graph["tokenizer.model.modeling"]
    assert circles(graph) == []


def test_every_folder_says_what_lives_there():
    for folder in {file.parent for file in SOURCES}:
        page = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert page and len(page) > 40, f"{folder.relative_to(ROOT)}/__init__.py: a folder is one idea; which?"


def test_the_architecture_page_names_what_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:tokenizer|slm|eval|recipes|tests|docs)/[\w./]*)`", page))
    assert len(named) > 15
    assert not [path for path in named if "NAME" not in path and not (ROOT / path).exists()]


def test_the_architecture_page_s_tree_is_the_tree():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named, top = set(), ""
    for line in page.split("## The tree")[1].split("```")[1].splitlines()[1:]:
        folders = re.match(r"(?: *[\w/]+/(?= |$))*", line)[0].split()
        top = top if line.startswith(" ") else folders[0]
        named |= {ROOT / top / name for name in folders} if line.startswith(" ") else {ROOT / name for name in folders}
    there = {file.parent for file in SOURCES}  # and folders that hold no code, where they are of the first rank
    there |= {folder for package in PACKAGES for folder in (ROOT / package).glob("[!_]*") if any(folder.glob("[!_]*"))}
    assert there - named == set() and {folder for folder in named if not folder.is_dir()} == set()


def test_the_architecture_page_names_the_files_that_lie_in_no_room():
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("## The tree")[1].split("```")[1]
    for package in PACKAGES:
        lines = re.search(rf"^{package}/(.*?)\n  [\w/]+/", tree, re.DOTALL | re.MULTILINE)[1]
        there = {file.name for file in (ROOT / package).glob("[!_]*.py")}
        assert set(re.findall(r"\w+\.py", lines)) == there, package


def test_a_file_in_an_open_folder_is_found_by_itself():
    """No list elsewhere names the codecs, tasks and measures that are files of their folder."""
    folders = ("tokenizer/codecs", "slm/tasks", "eval/speech/measures")
    packages = [folder.replace("/", ".") for folder in folders]
    program = f"import json, sys, {', '.join(packages)}; print(json.dumps(list(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    files = {file for folder in folders for file in (ROOT / folder).glob("[!_]*.py")}
    assert len(files) > 8
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    assert modules - set(json.loads(ran.stdout)) == set()


def test_commands_are_files_of_their_own():
    files = {file.stem for file in (ROOT / "recipes" / "commands").glob("*.py")} - {"__init__"}
    assert files == {command.name.replace("-", "_") for command in COMMANDS}


def test_only_recipes_read_yaml_arguments_and_the_environment():
    for file in SOURCES:
        if file.relative_to(ROOT).parts[0] == "recipes":
            continue
        tree = ast.parse(file.read_text())
        assert "yaml" not in imported(tree), file
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                assert name not in ("os.environ", "os.getenv", "sys.argv"), f"{file}: {name}"


def test_files_are_short():
    files = [*SOURCES, *(ROOT / "tests").glob("*.py")]
    long = {str(file.relative_to(ROOT)): n for file in files if (n := len(file.read_text().splitlines())) > MOST_LINES}
    assert not long, f"over {MOST_LINES} lines: does one hold two ideas? {long}"


def test_every_source_says_what_it_is():
    for file in SOURCES:
        assert ast.get_docstring(ast.parse(file.read_text())), f"{file} has no docstring"


def test_text_files_are_opened_with_their_encoding():
    """Without one it is the machine's: a C locale, or Windows', cannot read what another wrote."""
    for file in [*SOURCES, *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            of = getattr(getattr(node.func, "value", None), "id", "")
            if name not in ("open", "read_text", "write_text") or of in ("CodedCorpus", "os", "webbrowser"):
                continue
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            words = [item.value for item in given if isinstance(item, ast.Constant) and isinstance(item.value, str)]
            binary = any("b" in word and set(word) <= set("rwabx+") for word in words)
            assert binary or {"utf-8", "utf-8-sig", "ascii"} & set(words), f"{file.name}, line {node.lineno}: {name}()"


def command_of(file: Path) -> list[str]:
    """The words of the command in a configuration's first line: ``# slm encode --config quickstart/encode``."""
    first = file.read_text().splitlines()[0]
    assert first.startswith("# "), f"{file}: the first line is to be a comment with its command"
    return shlex.split(first.removeprefix("# "))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_shipped_configuration_loads_by_its_own_command(file):
    words = command_of(file)
    words = words[words.index("slm") :]
    command = next((item for item in COMMANDS if item.name == words[1]), None)
    assert command is not None, f"{words[1]} is no command"
    name = words[words.index("--config") + 1]
    assert name == str(file.relative_to(ROOT / "recipes" / "configs").with_suffix("")), "the comment names another file"
    assert load_config(importlib.import_module(command.module).Config, name)


def config_classes() -> set[type]:
    """Every recipe's Config and the dataclasses that it holds."""
    found: set[type] = set()

    def add(hint: object) -> None:
        if is_dataclass(hint) and hint not in found:
            found.add(hint)
            for inner in get_type_hints(hint).values():
                add(inner)
        for inner in get_args(hint):
            add(inner)

    for command in COMMANDS:
        add(importlib.import_module(command.module).Config)
    return found


def test_every_key_is_read_somewhere_and_explained():
    read = set()
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
    classes = config_classes()
    assert len(classes) > len(COMMANDS)
    keys = {f"{item.__module__}.{item.__qualname__}.{field.name}": field for item in classes for field in fields(item)}
    dead = [key for key, field in keys.items() if field.name not in read]
    assert not dead, f"keys that nothing reads: {dead}"
