"""The command ``slm``: every recipe with ``--config``, ``key=value``, ``--dry-run`` and a ``--help`` that teaches.

Recipes are imported only when they run, so that ``slm --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import re
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(
    name="slm",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Speech language models on LM-SPT tokens: from speech to a scored comparison.\n\n"
    "Start with `slm quickstart`. Each command takes --config FILE (a YAML, or the name of a shipped one) and any "
    "number of key=value; `slm COMMAND --help` lists its keys.",
)


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line knows of a recipe without importing it."""

    name: str
    about: str
    example: str
    details: str = ""  # a paragraph more, in its --help alone
    positional: str | None = None  # the Config field that plain arguments go to
    metavar: str = "KEY=VALUE"
    config: str | None = None  # the shipped configuration where no --config is given
    output: str | None = None  # the Config field of -o
    strict: str | None = None  # what --strict does, where it is taken
    voice: str | None = None  # the Config field of --voice
    backwards: str | None = None  # the Config field of --to-published
    from_scratch: str | None = None  # the shipped configuration of --train-tokenizer
    serves: str | None = None  # the Config field of --serve
    goes_on: bool = True  # whether an interrupted start leaves something that the next one uses
    restart: bool = True  # whether it keeps a folder that --restart could set aside

    @property
    def module(self) -> str:
        return "recipes.commands." + self.name.replace("-", "_")


STRICT_FILES = "Stop at the first file that cannot be used."
COMMANDS = [
    Command(
        "quickstart",
        "The embedded models at three frame rates: a corpus, codes, an SLM for ASR and TTS, one scored table.",
        "slm quickstart",
        config="quickstart/quickstart",
        from_scratch="quickstart/from-scratch",
    ),
    Command(
        "prepare-corpus",
        "Synthesise a corpus (commands, digits, sentences, phrases) with espeak-ng, flite and Piper.",
        "slm prepare-corpus --config quickstart/prepare-corpus run_dir=runs/corpus",
    ),
    Command(
        "cipher-corpus",
        "Add translations into a made-up language, word for word, to a manifest: data to try st and mt on.",
        "slm cipher-corpus data.0.path=runs/corpus/manifest.jsonl run_dir=runs/cipher",
    ),
    Command(
        "describe-corpus",
        "Let a text LLM answer instructions about recordings that it knows by their metadata alone (DeSTA2).",
        "slm describe-corpus data.0.path=runs/corpus/manifest.jsonl run_dir=runs/described model=LLM",
    ),
    Command(
        "train-teacher",
        "Train a small recogniser from scratch: the teacher's encoder and a judge.",
        "slm train-teacher --config quickstart/train-teacher run_dir=runs/teacher",
    ),
    Command(
        "train-tokenizer",
        "Train an LM-SPT tokenizer by semantic speech-resynthesis distillation.",
        "slm train-tokenizer --config quickstart/train-tokenizer run_dir=runs/tokenizer",
    ),
    Command(
        "plot-training",
        "Draw the curves of one or several trainings, laid over each other, from their metrics.jsonl.",
        "slm plot-training runs/tokenizer runs/other-tokenizer -o curves.png",
        positional="runs",
        metavar="RUN_DIR... KEY=VALUE",
        output="output",
        restart=False,
        goes_on=False,
    ),
    Command(
        "convert",
        "Turn published LM-SPT weights into a tokenizer folder; --to-published goes back.",
        "slm convert kakaocorp/lmspt runs/lmspt-release",
        positional="paths",
        metavar="SOURCE OUT_DIR KEY=VALUE",
        backwards="to_published",
        goes_on=False,
    ),
    Command(
        "export",
        "A trained model as a folder to share: fp16 weights, what loads them, a model card from its run.",
        "slm export runs/tokenizer -o shared/my-tokenizer",
        positional="source",
        metavar="SOURCE KEY=VALUE",
        output="output",
        goes_on=False,
    ),
    Command(
        "resynthesize",
        "Your own recordings through tokenizers and back, with scores and a page to listen to.",
        "slm resynthesize recording.wav -o heard",
        "It makes three outputs: reconstruction (main decoder, all codebooks; elsewhere this is called resynthesis), "
        "semantic reconstruction (main decoder, the semantic codebook alone) and resynthesis, the paper's word for "
        "what the auxiliary decoder makes of the semantic codebook.",
        goes_on=False,
        positional="files",
        metavar="FILE... KEY=VALUE",
        output="output",
        strict=STRICT_FILES,
    ),
    Command(
        "encode",
        "Turn a speech corpus into codes: Parquet shards with the tokenizer's fingerprint.",
        "slm encode --config quickstart/encode tokenizer=embedded-25hz run_dir=runs/codes",
        strict=STRICT_FILES,
    ),
    Command(
        "align",
        "Align texts to their audio: each word, character and phone with its times, in a new manifest.",
        "slm align data.0.path=corpus/manifest.jsonl run_dir=runs/aligned plot=3",
    ),
    Command(
        "measure-prosody",
        "Measure each word of an aligned manifest: how long, high and loud it is said, for task tts-prosody.",
        "slm measure-prosody data.0.path=runs/aligned/manifest.jsonl run_dir=runs/prosody",
    ),
    Command(
        "train-lm",
        "Train a small text LM from scratch on a corpus's texts (where no pretrained one can be had).",
        "slm train-lm --config quickstart/train-lm run_dir=runs/lm",
    ),
    Command(
        "finetune",
        "Extend an LLM with speech tokens and fine-tune it for ASR and TTS, in full or by LoRA.",
        "slm finetune --config quickstart/finetune model=Qwen/Qwen2.5-0.5B-Instruct --dry-run",
        "task_weights.continuation=1 and task_weights.st=1 train two tasks more; those of your own are trained beside "
        "them: plugins=[my_tasks] task_weights.my_task=1, where my_tasks.py registers my_task "
        "(docs/architecture.md tells how).",
    ),
    Command(
        "finetune-continuous",
        "An LLM learns ASR from a frozen encoder's features, without codes: the topline of ASR from tokens.",
        "slm finetune-continuous --config baselines/speech-llama --dry-run",
    ),
    Command(
        "train-acoustic",
        "Train a second stage that fills the acoustic codebooks from semantic codes and a reference voice.",
        "slm train-acoustic --config embedded/train-acoustic corpus=runs/codes run_dir=runs/acoustic",
    ),
    Command(
        "train-text-aligned",
        "Train speech tokens aligned to text, one frame of codes per word, on a coded corpus (TASTE).",
        "slm train-text-aligned --config baselines/taste corpus=runs/codes",
    ),
    Command(
        "encode-text-aligned",
        "Turn a coded corpus into word codes, a corpus of one frame per word that an SLM is fine-tuned on.",
        "slm encode-text-aligned model=runs/baselines/taste/model corpus=runs/codes run_dir=runs/word-codes",
    ),
    Command(
        "reconstruct-text-aligned",
        "Rebuild speech from its text and its word codes, to hear and score what these carry.",
        "slm reconstruct-text-aligned model=runs/baselines/taste/model corpus=runs/codes run_dir=runs/rebuilt",
    ),
    Command(
        "train-preference",
        "Preference optimisation of a fine-tuned SLM's speech by a judge: DPO or GRPO, watched by a second judge.",
        "slm train-preference --config embedded/train-preference model=runs/finetune/model corpus=runs/codes --dry-run",
    ),
    Command(
        "transcribe",
        "Speech to text with a fine-tuned SLM: your own files, or a coded corpus.",
        "slm transcribe recording.wav",
        "Without model=... the embedded SLM of 12.5 Hz does it; your own: model=runs/quickstart/12.5hz/finetune/model. "
        "task=NAME runs another task that answers in text; plugins=[MODULE] brings tasks of your own.",
        positional="files",
        metavar="FILE... KEY=VALUE",
        goes_on=False,
    ),
    Command(
        "synthesize",
        "Text to speech with a fine-tuned SLM: your own words, or a coded corpus's texts.",
        'slm synthesize "the weather is fine today" -o out.wav',
        "Without model=... the embedded SLM of 12.5 Hz does it; your own: model=runs/quickstart/12.5hz/finetune/model. "
        "task=NAME runs another task that answers in speech; plugins=[MODULE] brings tasks of your own. "
        "--voice speaker.wav acoustic=runs/acoustic/model says it in that voice (slm train-acoustic).",
        positional="text",
        metavar="TEXT KEY=VALUE",
        output="output",
        strict="Refuse a text that holds what the model cannot say.",
        voice="voice",
        goes_on=False,
    ),
    Command(
        "generate",
        "Any task of a fine-tuned SLM by its name: transcribe and synthesize are the two that everyone knows.",
        "slm generate task=asr recording.wav\n"
        '  slm generate task=tts "the weather is fine today" -o out.wav\n'
        "  slm generate task=continuation model=RUN/model beginning.wav -o out.wav\n"
        "  slm generate task=st model=RUN/model corpus=runs/codes run_dir=runs/translations",
        "A task that answers in text runs as slm transcribe (asr, st), one that answers in speech as slm synthesize "
        "(tts, continuation), with their code and into the same files. It takes what their help tells: decoding.KEY as "
        "there, their further keys as options.KEY. docs/tasks.md has the table of tasks.",
        positional="inputs",
        metavar="FILE...|TEXT KEY=VALUE",
        output="output",
        goes_on=False,
    ),
    Command(
        "evaluate",
        "Score recordings, codecs and predictions into results.json and report.html.",
        "slm evaluate --config quickstart/evaluate",
        strict=STRICT_FILES,
    ),
    Command(
        "score",
        "Score any system's transcripts or audio against references: Kaldi, JSONL, CSV, TSV, sclite files.",
        "slm score reference=text hypothesis=other-system.txt",
        "hypothesis=[a.txt,b.txt] scores several and draws each one's difference from the first. A folder of audio "
        "or predictions of speech need a judge: judges.0.name=embedded-recogniser, or protocol=NAME.",
        goes_on=False,
        output="output",
        strict="Refuse hypotheses whose ids are not those of the reference.",
    ),
    Command(
        "report",
        "Tables and page of results that are there; --serve: a page to transcribe, speak and listen on.",
        "slm report runs/compare\n  slm report --serve",
        positional="results",
        metavar="RUN_DIR KEY=VALUE",
        output="output",
        serves="serve",
        restart=False,
        goes_on=False,
    ),
    Command(
        "export-versa",
        "An SLM's speech as input of VERSA, whose measures `slm evaluate versa=[FOLDER]` reads back.",
        "slm export-versa predictions=runs/synthesize data.0.path=runs/corpus/manifest.jsonl -o runs/versa",
        output="run_dir",
        goes_on=False,
    ),
    Command(
        "measure-codes",
        "Measure a tokenizer's codes: bitrates, perplexity, what they tell of the text, robustness, a probe.",
        "slm measure-codes --config embedded/measure-codes tokenizer=embedded-25hz run_dir=runs/code-measures-25hz",
        "corpus=FOLDER measures a coded corpus as it is; robustness wants its recordings besides (data=), characters "
        "an aligned manifest. What cannot be measured is said with its reason.",
    ),
    Command(
        "compare",
        "Run the cells of one YAML (frame rates, tokenizers) through the recipes into one table.",
        "slm compare --config quickstart/compare",
    ),
]
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
    from recipes.config import ConfigError, load_config, yaml_scalar

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
    return recipe, load_config(recipe.Config, config or command.config, overrides)


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
    from recipes.runs.logs import hide_loading_bars, log, setup_logging
    from recipes.runs.plugins import import_plugins
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

    table = Table("what", "value", title=f"slm {command.name}: the plan (nothing was run)", title_justify="left")
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
        fail(f"{_message(error)}\n(--debug shows where this was raised)", 2)
    except OSError as error:
        if debug:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) and "the same command goes on" not in str(error)
        tail = "\nFree some space and start the same command again: what was made so far is kept." if full else ""
        fail(f"{_message(error)}{tail}", 2)


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
            shown = f"{key}=\n    {default}"
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
