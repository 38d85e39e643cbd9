"""Configurations: coercion, unknown keys, all problems at once, bases, overrides, round trips."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

from recipes.config import (
    ConfigError,
    apply_override,
    describe_fields,
    dump_config,
    from_values,
    load_config,
    read_yaml,
)


@dataclass
class Optimizer:
    learning_rate: float = 1e-3
    steps: int = field(default=5, metadata={"help": "how long"})
    schedule: Literal["cosine", "linear"] = "cosine"


@dataclass
class Source:
    path: str
    limit: int | None = None


@dataclass
class Config:
    run_dir: str = "runs/x"
    # Differs from the class's own default: a partly given mapping must keep it.
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(steps=77))
    lora: Optimizer | None = None
    data: list[Source] = field(default_factory=list)
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    weights: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=lambda: {"a": 1.0, "b": 1.0})
    betas: tuple[float, float] = (0.9, 0.98)

    def __post_init__(self) -> None:
        if 13 in self.sizes:
            raise ValueError("sizes: 13 is unlucky")


@dataclass
class Guard:
    rule: Literal["v2", "off"] = "v2"


@dataclass
class Nested:
    inner: Config = field(default_factory=Config)


def write(path, text):
    path.write_text(text)
    return str(path)


def test_values_are_coerced_and_nested_defaults_kept(tmp_path):
    file = write(tmp_path / "a.yaml", "run_dir: 12.5\noptimizer: {learning_rate: 1e-4}\ndata: [{path: x}]\n")
    config = load_config(Config, file, ["data.0.limit=3", "lora.steps=2", "weights={a: 1}", "betas=[0.5, 1]"])
    assert config.run_dir == "12.5"
    assert config.optimizer == Optimizer(1e-4, 77)
    assert config.lora == Optimizer(steps=2)
    assert config.data == [Source("x", 3)]
    assert config.weights == {"a": 1.0} and config.betas == (0.5, 1.0)


def test_every_problem_is_reported_at_once_with_its_key():
    wrong = ["optimizer.lerning_rate=1", "optimizer.steps=abc", "data=[{pth: a}]", "nope=1", "lora.schedule=square"]
    with pytest.raises(ConfigError) as caught:
        load_config(Config, None, wrong)
    message = str(caught.value)
    assert "optimizer.lerning_rate: unknown key; did you mean `learning_rate`?" in message
    assert "known here: learning_rate, steps, schedule" in message
    assert "optimizer.steps: " in message and "'abc'" in message
    assert "data.0.pth: unknown key" in message and "data.0.path: missing" in message
    assert "nope: unknown key; known here: run_dir" in message
    assert "lora.schedule: input should be 'cosine' or 'linear'" in message
    assert message.startswith("6 problems")


def test_a_class_s_own_check_is_reported():
    with pytest.raises(ConfigError, match="- sizes: 13 is unlucky"):  # no "(whole): " before it
        load_config(Config, None, ["sizes=[13]"])


def test_base_is_merged_under_the_file(tmp_path):
    write(tmp_path / "base.yaml", "run_dir: b\noptimizer: {steps: 1, learning_rate: 2}\nsizes: [1, 2, 3]\n")
    (tmp_path / "sub").mkdir()
    child = write(tmp_path / "sub" / "child.yaml", "base: ../base.yaml\noptimizer: {steps: 9}\nsizes: [4]\n")
    assert read_yaml(child) == {"run_dir": "b", "optimizer": {"steps": 9, "learning_rate": 2}, "sizes": [4]}


def test_base_in_a_circle_is_refused(tmp_path):
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match="circle.*a.yaml.*b.yaml.*a.yaml"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2]", "must hold a mapping"), ("a: [", "not a YAML file"), ("a: 1\na: 2\n", "given twice")],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(write(tmp_path / "odd.yaml", text))
    assert "odd.yaml" in str(caught.value)


def test_a_missing_file_names_the_shipped_ones():
    with pytest.raises(ConfigError, match="no configuration file quickstart/encod; did you mean `quickstart/encode`"):
        load_config(Config, "quickstart/encod")


@pytest.mark.parametrize(
    ("text", "overrides", "wanted"),
    [
        ("", ["shares.a=2"], {"a": 2.0, "b": 1.0}),
        ("", ["shares.b=0", "shares.c=3"], {"a": 1.0, "b": 0.0, "c": 3.0}),
        ("", ["shares={a: 2}"], {"a": 2.0}),
        ("shares: {c: 1}", ["shares.a=2"], {"a": 2.0, "c": 1.0}),
        ("shares: {c: 1}", [], {"c": 1.0}),
        ("shares:", ["shares.a=2"], {"a": 2.0, "b": 1.0}),
    ],
)
def test_an_override_of_one_key_of_a_mapping_leaves_the_others(tmp_path, text, overrides, wanted):
    """`task_weights.asr=2` weights ASR and leaves TTS in."""
    path = write(tmp_path / "config.yaml", text)
    assert load_config(Config, path, overrides).shares == wanted
    assert load_config(Nested, write(tmp_path / "n.yaml", ""), ["inner.shares.a=2"]).inner.shares == {
        "a": 2.0,
        "b": 1.0,
    }


def test_the_first_entry_of_a_list_may_come_from_an_override_alone():
    values = {}
    for override in ("data.0.path=a", "data.0.limit=5"):
        apply_override(values, override)
    assert values == {"data": [{"path": "a", "limit": 5}]}


def test_the_index_after_the_last_adds_an_entry(tmp_path):
    file = write(tmp_path / "a.yaml", "data: [{path: a}]\n")
    assert load_config(Config, file, ["data.1.path=b", "data.1.limit=2"]).data == [Source("a"), Source("b", 2)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("no", "no"),  # Norwegian, which YAML reads as false
        ("010", "010"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("he said: no", "he said: no"),
        ("number # 5", "number # 5"),
        ("...", "..."),
        ("", ""),
        ("'quoted'", "quoted"),
        ("'tis fine", "'tis fine"),
    ],
)
def test_text_on_the_command_line_is_taken_as_it_is_written(text, wanted):
    assert load_config(Config, None, [f"run_dir={text}"]).run_dir == wanted
    assert load_config(Nested, None, [f"inner.data.0.path={text}"]).inner.data[0].path == wanted


def test_a_word_that_yaml_reads_as_a_truth_value_is_no_text_and_no_other_word(tmp_path):
    with pytest.raises(ConfigError, match="run_dir: YAML reads no.*in quotes"):
        load_config(Config, write(tmp_path / "a.yaml", "run_dir: no\n"))
    assert load_config(Guard, write(tmp_path / "b.yaml", "rule: off\n")).rule == "off"
    assert load_config(Guard, None, ["rule=off"]).rule == "off"


@pytest.mark.parametrize(
    ("override", "way_out"),
    [
        ("data=a.jsonl", "data.0.path=a.jsonl"),
        ("data.path=a.jsonl", "data.0.path=..."),
        ("data=[a.jsonl]", "data.0.path=a.jsonl"),
        ("sizes=3", "sizes=[3]"),
        ("lora=true", "lora.learning_rate=..."),
    ],
)
def test_a_list_or_a_mapping_given_as_something_else_says_how_it_is_written(override, way_out):
    with pytest.raises(ConfigError) as caught:
        load_config(Config, None, [override])
    assert way_out in str(caught.value)


@pytest.mark.parametrize("override", ["a", "=3", "a..b=1", "a=[", "data.2.path=x", "data.x=1"])
def test_a_malformed_override_is_named(override):
    with pytest.raises(ConfigError, match="override"):
        apply_override({"data": [{"path": "a"}]}, override)


def test_dump_loads_to_an_equal_configuration(tmp_path):
    config = load_config(Config, None, ["data=[{path: 'a: b'}]", "lora.learning_rate=3e-5", "weights={x: .inf}"])
    text = dump_config(config)
    assert from_values(Config, yaml.safe_load(text)) == config
    assert load_config(Config, write(tmp_path / "c.yaml", text)) == config


def test_fields_are_described_for_help():
    rows = {row[0]: row[1:] for row in describe_fields(Config)}
    assert rows["optimizer.steps"] == ("int", "77", "how long")  # what this field starts from, not its class
    assert rows["lora.steps"] == ("int", "5", "how long")
    assert rows["optimizer.schedule"][0] == "cosine | linear"
    assert rows["data.<n>.path"][:2] == ("str", "required")
    assert rows["sizes"][:2] == ("list[int]", "[1, 2]")
