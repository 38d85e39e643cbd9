"""Typed configurations from YAML files and ``a.b=value`` overrides.

A recipe's ``Config`` is a plain dataclass; pydantic coerces and checks the values. Everything that is wrong is
reported at once, each problem with its dotted key.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from recipes.suggestions import did_you_mean, one_of

CONFIGS = Path(__file__).resolve().parent / "configs"
MOST_NAMES = 6  # of configurations in a message
ConfigT = TypeVar("ConfigT")
ResultT = TypeVar("ResultT")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every problem with its key."""


class Problems:
    """Collects what would stop a command, so that all of it is told at once.

    Checks that do not depend on each other go through `attempt`; `raise_all` stands before what needs their results.

    >>> problems = Problems("slm example")
    >>> problems.attempt(int, "12")
    12
    >>> problems.attempt(int, "x"), problems.attempt(float, "y")
    (None, None)
    >>> problems.raise_all()
    Traceback (most recent call last):
        ...
    recipes.config.ConfigError: slm example cannot run, 2 problems:
      - invalid literal for int() with base 10: 'x'
      - could not convert string to float: 'y'
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.errors: dict[str, Exception] = {}

    def attempt(self, check: Callable[..., ResultT], *args: Any, **kwargs: Any) -> ResultT | None:
        """What `check` returns; None where it raises a user's mistake, which is kept."""
        try:
            return check(*args, **kwargs)
        except (ValueError, OSError, ModuleNotFoundError) as error:
            self.errors.setdefault(str(error), error)
            return None

    def raise_all(self) -> None:
        """Raises what there is: a single error as it came, of several a ConfigError that lists them."""
        if len(self.errors) == 1:
            raise next(iter(self.errors.values()))
        if self.errors:
            head = f"{self.command} cannot run, {len(self.errors)} problems:"
            raise ConfigError("\n  - ".join([head, *(text.replace("\n", "\n    ") for text in self.errors)]))


class _Loader(yaml.SafeLoader):
    """SafeLoader which refuses a key given twice: YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key `{key_node.value}` is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


def load_config(config_class: type[ConfigT], path: str | Path | None = None, overrides: list[str] = ()) -> ConfigT:
    """Build ``config_class`` from its defaults, then a YAML file, then overrides.

    Args:
        config_class: a dataclass; nested dataclasses, lists and dicts of them are checked too.
        path: a YAML file, the name of a shipped one (``quickstart/encode``), or None for the defaults alone.
        overrides: ``a.b=value`` strings, the value read as YAML, but as it is written where the key holds text. A list
            takes ``data.0.limit=5`` (the index after the last one adds an entry) or a whole new value.

    Returns:
        The typed configuration.

    Raises:
        ConfigError: a file that is missing or is not YAML, an unknown key, a value of the wrong type; all at once.
    """
    values = read_yaml(path) if path is not None else {}
    for override in overrides:
        parts = override.partition("=")[0].strip().split(".")
        _put_default(config_class, values, parts)
        apply_override(values, override, hint_at(config_class, parts))
    return from_values(config_class, values, where=f"{path}" if path else "the command line")


@functools.cache
def _adapter(config_class: type) -> TypeAdapter:
    # pydantic builds its checks anew for each adapter, which takes longer than to use them.
    return TypeAdapter(config_class)


def from_values(config_class: type[ConfigT], values: dict[str, Any], where: str = "the configuration") -> ConfigT:
    """Check a mapping against ``config_class`` and build it. Raises ConfigError naming every problem."""
    problems: list[str] = []
    merged = _check(config_class, values, "", problems)
    unset = dataclasses.MISSING
    try:
        config = _adapter(config_class).validate_python(merged)
    except ValidationError as error:
        config = unset
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"] if not _is_branch_name(part))
            if item["type"] == "missing":
                problems.append(f"{key}: missing, and it has no default")
                continue
            given = "" if isinstance(item["input"], dict) or not key else f", got {item['input']!r}"
            message = item["msg"].removeprefix("Value error, ")
            if not key or message.startswith((f"{key}:", f"{key}.")):  # a class's own check, which names its keys
                problems.append(message)
            else:
                advice = _how_to_write(hint_at(config_class, key.split(".")), key, item["input"])
                problems.append(f"{key}: {message[:1].lower() + message[1:]}{given}{advice}")
    if problems or config is unset:
        problems = list(dict.fromkeys(problems))
        head = f"{len(problems)} problem{'s' * (len(problems) > 1)} in {where}:"
        raise ConfigError("\n  - ".join([head, *problems]))
    return config


def hint_at(config_class: type, parts: list[str]) -> Any:
    """The type of a key, by its dotted parts; None where there is no such key, or several types have one."""
    hint: Any = config_class
    for part in parts:
        held = _without_null(hint)
        arguments = typing.get_args(held)
        if dataclasses.is_dataclass(held):
            hint = typing.get_type_hints(held).get(part)
        elif typing.get_origin(held) in (list, tuple) and arguments and part.isdigit():
            hint = arguments[0]
        elif typing.get_origin(held) is dict and len(arguments) == 2:
            hint = arguments[1]
        else:
            return None
    return hint


def _without_null(hint: Any) -> Any:
    """``X`` of ``X | None``; any other type as it is."""
    branches = [item for item in typing.get_args(hint) if item is not type(None)] if _is_union(hint) else [hint]
    return branches[0] if len(branches) == 1 else hint


def _holds_text(hint: Any) -> bool:
    """Whether a value is text or one of several words; YAML would read ``no``, ``010``, ``12:30`` as other things."""
    held = _without_null(hint)
    words = typing.get_args(held) if typing.get_origin(held) is typing.Literal else ()
    return held is str or (bool(words) and all(isinstance(word, str) for word in words))


def _how_to_write(hint: Any, key: str, value: Any) -> str:
    """How a list, or the keys under a key, would be given on the command line; empty where that is not the problem."""
    held = _without_null(hint)
    inner = next(iter(typing.get_args(held)), None)
    if typing.get_origin(held) is list and not isinstance(value, list):
        if not dataclasses.is_dataclass(inner):
            return f"; a list is written [a, b]: {key}=[{value}]" if isinstance(value, str | int | float) else ""
        first = dataclasses.fields(inner)[0].name
        return f"; its entries are numbered: {key}.0.{first}={value if isinstance(value, str) else '...'}"
    if dataclasses.is_dataclass(held) and not isinstance(value, dict):
        first = dataclasses.fields(held)[0].name
        return f"; give its keys: {key}.{first}={value if isinstance(value, str) else '...'}"
    return ""


def _is_branch_name(part: str | int) -> bool:
    # pydantic adds the tried type of a union ("DataSource", "int", "list[int]") to the location.
    return isinstance(part, str) and (part[:1].isupper() or "[" in part or part in {"int", "str", "float", "bool"})


def dump_config(config: Any) -> str:
    """The YAML text of a configuration; `load_config` turns it into an equal one."""
    values = _adapter(type(config)).dump_python(config, mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=118)


def resolve_config_path(path: str | Path) -> Path:
    """A file as given, or the shipped configuration of that name. Raises ConfigError where neither exists."""
    given = Path(path)
    if given.is_file():
        return given
    # by the ending and not by a dot: the name of a rate has one, published/12.5hz
    shipped = CONFIGS / (str(path) if given.suffix in (".yaml", ".yml", ".json") else f"{path}.yaml")
    if not given.is_absolute() and shipped.is_file():
        return shipped
    names = sorted(file.relative_to(CONFIGS).with_suffix("").as_posix() for file in CONFIGS.rglob("*.yaml"))
    begun = [name for name in names if name.startswith(str(path))]
    if given.is_dir() and not begun:
        raise ConfigError(f"{path} is a folder; give a YAML file, or the name of a shipped one: quickstart/encode, ...")
    meant = one_of(begun[:MOST_NAMES]) if begun else did_you_mean(str(path), names)
    raise ConfigError(
        f"no configuration file {path}; {meant}give a YAML file, or the name of one of the {len(names)} that lie in "
        f"{CONFIGS}, without its ending, such as quickstart/encode"
    )


def command_of(path: str | Path) -> str:
    """The command that a shipped configuration is for, as its first line says it; empty of any other file.

    >>> command_of("quickstart/encode")
    'encode'
    """
    file = resolve_config_path(path)
    if CONFIGS not in file.resolve().parents:
        return ""
    with file.open(encoding="utf-8") as lines:
        words = lines.readline().split()
    return words[2] if words[:2] == ["#", "slm"] else ""


def read_yaml(path: str | Path, _children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML mapping with its optional ``base:`` parents merged under it (mappings deeply, lists replaced).

    Raises:
        ConfigError: No such file or shipped name, no YAML mapping, or parents that go round in a circle.
    """
    file = resolve_config_path(path).resolve()
    if file in _children:
        chain = " -> ".join(str(item) for item in (*_children, file))
        raise ConfigError(f"`base:` goes round in a circle: {chain}")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not a YAML file that can be read: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping of keys, not a {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{file}: `base:` names one parent file, got {base!r}")
    sibling = file.parent / base
    return merge(read_yaml(sibling if sibling.is_file() else base, (*_children, file)), values)


def merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """``child`` over ``parent``: mappings key by key, everything else replaced."""
    merged = dict(parent)
    for key, value in child.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _override_value(override: str, text: str, hint: Any) -> Any:
    """What an override sets: its YAML; of a key that holds text the text itself, but for null and YAML's quotes."""
    plain = _holds_text(hint) and text.strip() not in ("", "null", "~")
    if (plain and text.strip()[0] not in "'\"") or (hint is str and not text.strip()):
        return text.strip()
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        if plain:  # text that merely begins with a quotation mark
            return text.strip()
        raise ConfigError(f"override {override!r}: the value is not YAML ({error}); quote it") from error
    return value


def apply_override(values: dict[str, Any], override: str, hint: Any = None) -> None:
    """Set one ``a.b=value`` in place. Raises ConfigError where it is no such thing.

    ``hint`` is the key's type: where that is text the value is taken as it is written, not as YAML reads it.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form key=value or key.sub=value")
    value = _override_value(override, text, hint)
    here: Any = values
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, list):
            if not part.isdigit() or int(part) > len(here):
                name = ".".join(parts[:depth])
                raise ConfigError(
                    f"override {override!r}: `{name}` is a list of {len(here)}; give an index up to {len(here)}"
                )
            part = int(part)
            if part == len(here):
                here.append({})
        elif part not in here or (not last and not isinstance(here[part], dict | list)):
            # `data.0.path=...` where no YAML gave a list yet: the first entry
            here[part] = [{}] if not last and parts[depth + 1] == "0" else {}
        if last:
            here[part] = value
        elif isinstance(here[part], dict | list):
            here = here[part]
        else:
            raise ConfigError(f"override {override!r}: `{'.'.join(parts[: depth + 1])}` has no keys under it")


def _put_default(config_class: type, values: dict[str, Any], parts: list[str]) -> None:
    """Puts a mapping's default under an override of one of its keys: `task_weights.asr=2` leaves TTS as it was.

    A mapping that a YAML gives is what it says, and so is one that an override gives whole.
    """
    hints = typing.get_type_hints(config_class)
    field = next((field for field in dataclasses.fields(config_class) if field.name == parts[0]), None)
    if field is None or len(parts) == 1:
        return
    nested, given = _dataclass_in(hints[field.name]), values.get(field.name)
    if nested is None and values.get(field.name) is None and isinstance(default := default_of(field), dict):
        values[field.name] = dict(default)
    elif nested is not None and nested is hints[field.name] and (given is None or isinstance(given, dict)):
        inner = given or {}
        _put_default(nested, inner, parts[1:])
        if inner:
            values[field.name] = inner


def describe_fields(config_class: type, prefix: str = "", instance: Any = None) -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, help) of every leaf of a configuration class, for ``--help``.

    ``instance`` is what the owner of a nested class starts from, where that differs from the class's own defaults.
    """
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        key, hint = prefix + field.name, hints[field.name]
        nested = _dataclass_in(hint)
        default = default_of(field) if instance is None else getattr(instance, field.name)
        if nested is not None and nested is hint:
            own = default if dataclasses.is_dataclass(default) else None
            yield from describe_fields(nested, f"{key}.", own)
            continue
        shown = "required" if default is dataclasses.MISSING else yaml_scalar(default)
        yield key, type_name(hint), shown, field.metadata.get("help", "")
        if nested is not None:
            yield from describe_fields(nested, f"{key}.<n>." if _is_list(hint) else f"{key}.")


def default_of(field: dataclasses.Field) -> Any:
    """A field's default value, or ``dataclasses.MISSING``."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def yaml_scalar(value: Any) -> str:
    """A value on one line, as it would be written after ``key=``."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    elif isinstance(value, list | tuple):
        value = [dataclasses.asdict(item) if dataclasses.is_dataclass(item) else item for item in value]
    elif isinstance(value, Path):
        value = str(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def type_name(hint: Any) -> str:
    """A type as a reader writes it: ``float``, ``list[int]``, ``a | b``."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(item) for item in typing.get_args(hint))
    if _is_union(hint):
        return " | ".join(type_name(item) for item in typing.get_args(hint))
    if typing.get_origin(hint) is not None:
        arguments = ", ".join("..." if item is ... else type_name(item) for item in typing.get_args(hint))
        return f"{typing.get_origin(hint).__name__}[{arguments}]"
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _check(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    """Report unknown keys at every level; put a field's own default under a partly given nested configuration."""
    if _is_union(hint):
        if value is None:
            return None
        branches = [item for item in typing.get_args(hint) if item is not type(None)]
        fitting = [item for item in branches if _takes(item, value)]
        # A union without dataclasses is pydantic's to judge.
        return _check(fitting[0], value, key, problems) if len(fitting) == 1 else value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _check_dataclass(hint, value, key, problems)
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (list, tuple) and isinstance(value, list | tuple) and arguments:
        return [_check(arguments[0], item, f"{key}.{index}", problems) for index, item in enumerate(value)]
    if typing.get_origin(hint) is dict and isinstance(value, dict) and len(arguments) == 2:
        return {name: _check(arguments[1], item, f"{key}.{name}", problems) for name, item in value.items()}
    if hint is str and isinstance(value, bool):
        problems.append(f"{key}: YAML reads no, yes, off and on as false and true; write the word in quotes")
        return str(value)
    if typing.get_origin(hint) is typing.Literal and isinstance(value, bool):
        words = ("off", "no") if value is False else ("on", "yes")  # an unquoted `no_speech: off`
        return next((word for word in words if word in typing.get_args(hint)), value)
    if hint is str and isinstance(value, int | float):
        return yaml_scalar(value)  # an unquoted `name: 12.5` is text where text is asked for
    return value


def _check_dataclass(hint: type, value: dict[str, Any], key: str, problems: list[str]) -> dict[str, Any]:
    hints = typing.get_type_hints(hint)
    fields = {field.name: field for field in dataclasses.fields(hint) if field.init}
    merged: dict[str, Any] = {}
    for name, item in value.items():
        full = f"{key}.{name}".lstrip(".")
        if name not in fields:
            guess = did_you_mean(str(name), fields, most=1)
            problems.append(f"{full}: unknown key; {guess}known here: {', '.join(fields)}")
            continue
        default = default_of(fields[name])
        if isinstance(item, dict) and dataclasses.is_dataclass(default):
            own = _adapter(type(default)).dump_python(default)
            item = merge(own, item)
        merged[name] = _check(hints[name], item, full, problems)
    return merged


def _takes(hint: Any, value: Any) -> bool:
    if isinstance(value, dict):
        return dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict
    if isinstance(value, list | tuple):
        return typing.get_origin(hint) in (list, tuple)
    return not dataclasses.is_dataclass(hint) and typing.get_origin(hint) not in (list, tuple, dict)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_list(hint: Any) -> bool:
    return any(typing.get_origin(item) in (list, tuple) for item in (hint, *typing.get_args(hint)))


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a hint is or holds (``X | None``, ``list[X]``)."""
    if dataclasses.is_dataclass(hint):
        return hint
    return next((found for item in typing.get_args(hint) if (found := _dataclass_in(item)) is not None), None)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name: ``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    if isinstance(value, dict) and value:
        return {key: item for name, sub in value.items() for key, item in flatten(sub, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}
