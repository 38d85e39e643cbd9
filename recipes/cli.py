"""The command ``slm``: every recipe with ``--config``, ``key=value``, ``--dry-run`` and a ``--help`` that teaches.

Recipes are imported only when they run, so that ``slm --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import re
import textwrap
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from recipes.command_list import COMMANDS, STRICT_FILES, TOPICS, Command


class CommandsByTopic(typer.core.TyperGroup):
    """``slm --help`` with a section for each topic."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = formatter.width - 6 - max(len(command.name) for command in COMMANDS)
        for topic, commands in TOPICS.items():
            rows = [(command.name, self.get_command(ctx, command.name)) for command in commands]
            with formatter.section(topic):
                formatter.write_dl([(name, found.get_short_help_str(width)) for name, found in rows])


app = typer.Typer(
    name="slm",
    cls=CommandsByTopic,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Speech language models on LM-SPT tokens: from speech to a scored comparison.\n\n"
    "Start with `slm quickstart`. Each command takes --config FILE (a YAML, or the name of a shipped one) and any "
    "number of key=value; `slm COMMAND --help` lists its keys.",
    epilog="Exit status: 0, done; 2, something given cannot be used, and the message says what and why (of several "
    "files that are named the others are made); 130, interrupted; 1, a fault of the program. A --dry-run ends as the "
    "run would, so far as reading what is given tells it.",
)


# A key=value starts like an identifier; write ./a=b for a file of that name.
# The names under a key may have a hyphen, as tasks' do: task_weights.tts-aligned=1.
OVERRIDE = re.compile(r"^[A-Za-z_]\w*(\.[\w-]+)*=")
KEY_WIDTH = 36  # of key=default in one line of --help


def load_recipe(command: Command) -> Any:
    """Import a recipe's module."""
    return importlib.import_module(command.module)


def build_config(
    command: Command,
    arguments: list[str],
    config: str | None,
    output: str | None = None,
    strict: bool = False,
    backwards: bool = False,
    voice: str | None = None,
) -> tuple[Any, Any]:
    """Returns (recipe module, typed configuration). Raises ConfigError naming all that is wrong."""
    from recipes.config import ConfigError, command_of, load_config, yaml_scalar

    recipe = load_recipe(command)
    overrides = [item for item in arguments if OVERRIDE.match(item)]
    plain = [item for item in arguments if not OVERRIDE.match(item)]
    if plain and command.positional is None:
        raise ConfigError(f"{plain[0]!r} is not a key=value (`slm {command.name} --help` lists the keys)")
    if plain:
        fields = {field.name: field for field in dataclasses.fields(recipe.Config)}
        many = "list" in str(fields[command.positional].type)
        if not many and len(plain) > 1:
            raise ConfigError(f"{len(plain)} texts were given; put the words in quotes: {' '.join(plain)!r}")
        overrides.append(f"{command.positional}={yaml_scalar(plain if many else plain[0])}")
    if output is not None:
        overrides.append(f"{command.output}={yaml_scalar(output)}")
    if voice is not None:
        overrides.append(f"{command.voice}={yaml_scalar(voice)}")
    if strict:
        overrides.append("strict=true")
    if backwards:
        overrides.append(f"{command.backwards}=true")
    try:
        return recipe, load_config(recipe.Config, config or command.config, overrides)
    except ConfigError as error:
        meant = command_of(config) if config and "unknown key" in str(error) else ""
        if meant in ("", command.name):
            raise
        raise ConfigError(
            f"{error}\n{config} is a configuration of `slm {meant}`, not of `slm {command.name}`"
        ) from None


def execute(
    command: Command,
    arguments: list[str],
    config: str | None,
    *,
    dry_run: bool = False,
    restart: bool = False,
    output: str | None = None,
    strict: bool = False,
    backwards: bool = False,
    voice: str | None = None,
) -> None:
    """Run one command, or print its plan."""
    from recipes.plugins import import_plugins
    from recipes.runs.logs import hide_loading_bars, log, setup_logging
    from recipes.runs.process_settings import keep_compiled_kernels, keep_freed_memory
    from recipes.runs.restart import start_over

    setup_logging()
    keep_freed_memory()
    keep_compiled_kernels()
    recipe, settings = build_config(command, arguments, config, output, strict, backwards, voice)
    import_plugins(settings)
    hide_loading_bars()
    if restart and not dry_run and (aside := start_over(recipe, settings)):
        log.info("the earlier %s is now %s", settings.run_dir, aside)
    if dry_run:
        show_plan(command, recipe.plan(settings))
        return
    started = time.perf_counter()
    result = recipe.run(settings)
    where = f": {result}" if isinstance(result, str | Path) else ""
    log.info("%s done in %.0f s%s", command.name, time.perf_counter() - started, where)


def show_plan(command: Command, plan: dict[str, Any]) -> None:
    """Print a plan as a table of dotted names and values."""
    from recipes.config import flatten

    # A long path goes on in the next line: a reader copies it.
    columns = (Column(name, overflow="fold") for name in ("what", "value"))
    table = Table(*columns, title=f"slm {command.name}: the plan (nothing was run)", title_justify="left")
    for key, value in flatten(plan).items():
        table.add_row(Text(key), Text(f"{value:,}" if type(value) is int else str(value)))
    Console().print(table)


def guarded(action: Any, debug: bool, goes_on: bool = True) -> None:
    """Run ``action``; a user's mistake becomes one clear message and exit code 2, without a traceback.

    ``goes_on`` says whether the same command, given again after an interruption, uses what this one had made.
    """
    try:
        action()
    except KeyboardInterrupt:
        again = "(without --restart or redo=) goes on from what was saved so far" if goes_on else "begins anew"
        fail(f"Interrupted. The same command {again}.", 130)
    except (
        ValueError,
        FloatingPointError,
        FileNotFoundError,
        NotADirectoryError,
        PermissionError,
        ModuleNotFoundError,
    ) as error:
        if debug:
            raise
        fail(f"{_message(error)}{_debug_hint(error)}", 2)
    except OSError as error:
        if debug:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) and "the same command goes on" not in str(error)
        tail = "\nFree some space and start the same command again: what was made so far is kept." if full else ""
        fail(f"{_message(error)}{tail}", 2)


def _debug_hint(error: BaseException) -> str:
    from recipes.inference.named_files import UnusableFiles

    return "" if isinstance(error, UnusableFiles) else "\n(--debug shows where this was raised)"


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def fail(message: str, code: int) -> None:
    """Print a message in red on standard error and exit."""
    Console(stderr=True, soft_wrap=True).print(Text(message, style="red"))
    raise SystemExit(code)


class RecipeCommand(typer.core.TyperCommand):
    """A command whose ``--help`` goes on with an example and the configuration's keys."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        command = next(item for item in COMMANDS if item.name == self.name)
        formatter.write(f"\nExample:\n  {command.example}\n\nKeys (key=value here, or in the YAML):\n")
        formatter.write(keys_table(load_recipe(command).Config))


def keys_table(config_class: type) -> str:
    """The configuration's keys with types, defaults and help, as text as wide as the terminal."""
    from recipes.config import describe_fields

    console = Console()
    table = Table("key=default", "what it does", box=None, pad_edge=False, padding=(0, 1))
    for key, kind, default, about in describe_fields(config_class):
        shown = f"{key} (required)" if default == "required" else f"{key}={default}"
        if len(shown) > KEY_WIDTH:  # a table of 80 columns would cut the default's word in two
            shown = f"{key}=\n{textwrap.indent(textwrap.fill(default, KEY_WIDTH - 4, break_on_hyphens=False), ' ' * 4)}"
        table.add_row(Text(f"  {shown}", overflow="fold"), Text(f"{about} ({kind})"))
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _register(command: Command) -> None:
    arguments_type = typer.Argument(None, metavar=command.metavar, show_default=False)
    config_option = typer.Option(None, "--config", "-c", help="A YAML file, or the name of a shipped one.")
    dry_run_option = typer.Option(False, "--dry-run", help="Check everything, print the plan, run nothing.")
    restart_option = typer.Option(
        False,
        "--restart",
        help="Start over: an existing run folder is set aside as <name>.old-N.",
        hidden=not command.restart,
    )
    debug_option = typer.Option(False, "--debug", help="Show the traceback of an error.")
    output_option = typer.Option(None, "-o", "--output", help="Where the result goes.", hidden=command.output is None)
    strict_option = typer.Option(False, "--strict", help=command.strict or STRICT_FILES, hidden=command.strict is None)
    voice_option = typer.Option(None, "--voice", help="A recording of the voice.", hidden=command.voice is None)
    backwards_option = typer.Option(
        False, "--to-published", help="From a tokenizer folder to the published layout.", hidden=not command.backwards
    )

    scratch_option = typer.Option(
        False,
        "--train-tokenizer",
        help="Train a teacher, a tokenizer and a text LM first, in place of the embedded ones.",
        hidden=not command.from_scratch,
    )

    serve_option = typer.Option(False, "--serve", help="Serve a page on this machine.", hidden=not command.serves)

    def body(
        arguments: list[str] = arguments_type,
        config: str = config_option,
        dry_run: bool = dry_run_option,
        restart: bool = restart_option,
        debug: bool = debug_option,
        output: str = output_option,
        strict: bool = strict_option,
        voice: str = voice_option,
        backwards: bool = backwards_option,
        from_scratch: bool = scratch_option,
        serve: bool = serve_option,
    ) -> None:
        if output is not None and command.output is None:
            raise typer.BadParameter(f"slm {command.name} takes no -o; name the folder with run_dir=...")
        if strict and command.strict is None:
            raise typer.BadParameter(f"slm {command.name} takes no --strict")
        if voice is not None and command.voice is None:
            raise typer.BadParameter(f"slm {command.name} takes no --voice")
        if restart and not command.restart:
            raise typer.BadParameter(f"slm {command.name} takes no --restart: it keeps no folder, each start is anew")
        if backwards and command.backwards is None:
            raise typer.BadParameter(f"slm {command.name} takes no --to-published")
        if from_scratch and (command.from_scratch is None or config is not None):
            why = "takes its own configuration: leave --config" if config else "goes with slm quickstart alone"
            raise typer.BadParameter(f"--train-tokenizer {why}")
        if serve and command.serves is None:
            raise typer.BadParameter(f"slm {command.name} takes no --serve")
        guarded(
            lambda: execute(
                command,
                [*(arguments or []), *([f"{command.serves}=true"] if serve else [])],
                command.from_scratch if from_scratch else config,
                dry_run=dry_run,
                restart=restart,
                output=output,
                strict=strict,
                backwards=backwards,
                voice=voice,
            ),
            debug,
            command.goes_on,
        )

    app.command(
        command.name, cls=RecipeCommand, help=f"{command.about}\n\n{command.details}".strip(), short_help=command.about
    )(body)


for _command in COMMANDS:
    _register(_command)


def main() -> None:
    """The entry point of ``slm``."""
    app()


if __name__ == "__main__":
    main()
