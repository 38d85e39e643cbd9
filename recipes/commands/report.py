"""``slm report``: the tables and the page of results that are there already; with ``--serve`` a page to try models on.

``slm report RUN_DIR`` reads ``results.json`` and writes ``report.html`` and ``results.md`` anew, as this version draws
them; nothing is scored again. ``text_lengths`` adds tables by length of text, for which no stage runs.

``--serve`` opens a page on this machine: transcribe a recording, say a sentence, and listen to the models side by side,
with the report in a tab where one was named. It needs gradio (the extra `serve`) and nothing else does.

Errors: ConfigError where there is nothing to show, or gradio is not installed.
"""

from __future__ import annotations

import html
import importlib.util
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.report.documents import write_documents
from eval.report.page import write_report
from eval.report.terminal import format_table
from eval.results_file import load_results
from eval.schema import Results
from eval.text.lengths import LENGTHS_HELP, LengthBin, in_order
from recipes.commands import synthesize, transcribe
from recipes.config import ConfigError, Problems
from recipes.runs.logs import log
from recipes.runs.own_folders import refuse_unwritable
from slm.embedded import SPEECH_LMS
from slm.model.modeling import describe_llm


@dataclass
class Config:
    """Which results are shown, and whether a page is served."""

    results: str = field(default="", metadata={"help": "results.json, or the folder that holds it"})
    output: str = field(default="", metadata={"help": "folder of the page and tables (-o); empty: beside the results"})
    text_lengths: list[LengthBin] = field(default_factory=list, metadata={"help": LENGTHS_HELP})
    serve: bool = field(default=False, metadata={"help": "--serve: a page to transcribe, speak and listen on"})
    models: list[str] = field(
        default_factory=lambda: list(SPEECH_LMS), metadata={"help": "serve: SLMs, by name or folder, side by side"}
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "serve: who may open the page: this machine alone; 0.0.0.0: any"}
    )
    port: int = field(default=7860, metadata={"help": "serve: the page's port"})
    device: str = field(default="auto", metadata={"help": "serve: auto, cpu, cuda"})

    def __post_init__(self) -> None:
        in_order(self.text_lengths)
        if not 0 < self.port < 65536:
            raise ValueError(f"port: {self.port} must be from 1 to 65535")
        if self.serve and not self.models:
            raise ValueError("models: name at least one to serve")


def _check(config: Config) -> Results | None:
    """The results, where some are named. Raises ConfigError, FileNotFoundError, ModelError: all that is wrong."""
    problems = Problems("slm report")
    if not config.results and not config.serve:
        raise ConfigError("nothing to show: name a folder with a results.json (slm report RUN_DIR), or --serve")
    results = problems.attempt(load_results, config.results) if config.results else None
    if results is not None:
        problems.attempt(refuse_unwritable, _folder(config), "output (-o)")
    if config.serve:
        problems.attempt(_need_gradio)
        for model in config.models:
            problems.attempt(_check_model, model)
    problems.raise_all()
    if results is not None and config.text_lengths:
        results.text_lengths = in_order(config.text_lengths)
    return results


def _need_gradio() -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("--serve needs gradio, which is not installed: pip install 'lmspt-slm[serve]'")


def _check_model(name: str) -> None:
    if describe_llm(name).vocabulary is None:
        raise ConfigError(f"models: {name} is a text LM without speech; name what `slm finetune` made")


def _folder(config: Config) -> Path:
    """Where the page goes."""
    place = Path(config.results)
    return Path(config.output) if config.output else place if place.is_dir() else place.parent


def plan(config: Config) -> dict[str, object]:
    """What would be shown; raises what would stop it."""
    results = _check(config)
    facts: dict[str, object] = {}
    if results is not None:
        facts |= {"rows": len(results.rows), "result": str(_folder(config) / "report.html")}
    return facts | ({"page": f"http://{config.host}:{config.port}", "models": config.models} if config.serve else {})


def run(config: Config) -> Path | None:
    """Print the tables and write the page; serve until interrupted where asked to. Returns the page."""
    results, page = _check(config), None
    if results is not None:
        page = write_report(results, _folder(config))
        write_documents(results, _folder(config))
        print(format_table(results), flush=True)
    if config.serve:
        log.info("http://%s:%d; ctrl-c ends it", config.host, config.port)
        launch(make_page(config, page), config)
    return page


def hear(model: str, recording: str, device: str = "auto") -> str:
    """What a model hears in a file, as `slm transcribe` does it.

    Raises:
        AudioError, ConfigError: the file cannot be used.
    """
    found = transcribe.run(transcribe.Config(model=model, files=[recording], device=device))
    return next(iter(found.values())) or ""


def say(model: str, text: str, folder: Path | str, device: str = "auto") -> str:
    """The file with what a model says, as `slm synthesize` does it. Raises ConfigError where it cannot say it."""
    target = Path(tempfile.mkdtemp(dir=folder)) / f"{label_of(model)}.wav"
    return str(synthesize.run(synthesize.Config(model=model, text=text, output=str(target), device=device)))


def label_of(model: str) -> str:
    """A model's name on the page.

    >>> label_of("embedded-slm-12.5hz"), label_of("runs/quickstart/12.5hz/finetune/model")
    ('12.5hz', '12.5hz-finetune')
    """
    if model in SPEECH_LMS:
        return model.removeprefix("embedded-slm-")
    parts = [part for part in Path(model).parts if part not in ("model", "/")]
    return "-".join(parts[-2:]) or model


# gradio's white on its buttons, and its greys and accents on white, have contrasts of 1.9 to 3.7; 4.5 is needed.
_READABLE = """
body {--button-primary-background-fill: #1d4ed8; --button-primary-background-fill-hover: #1e40af}
body:not(.dark) {--neutral-400: #6b6b76; --body-text-color-subdued: #6b6b76; --color-accent: #1d4ed8}
"""


def launch(page: Any, config: Config, **settings: Any) -> Any:
    """Serves a page of `make_page` until interrupted. Returns what gradio's ``launch`` does, whose other settings may
    be given.
    """
    import gradio

    look = {"theme": gradio.themes.Default(primary_hue="blue"), "css": _READABLE}
    return page.launch(server_name=config.host, server_port=config.port, quiet=True, **look, **settings)


def make_page(config: Config, report: Path | None = None) -> Any:
    """The page, not served yet: a gradio Blocks.

    Args:
        config: which models.
        report: a page of results to show in a tab of its own.
    """
    import gradio  # of the extra `serve`; nothing else needs it

    folder = tempfile.mkdtemp(prefix="slm-report-")

    def answers(one: Any, given: Any, what: str) -> Any:
        """Each model's answer; what a user can mend is shown on the page."""
        if not given or (isinstance(given, str) and not given.strip()):
            raise gradio.Error(f"give {what} first", print_exception=False)
        found, errors = [], []
        for model in config.models:
            try:
                found.append(one(model, given))
            except (ValueError, OSError) as error:  # the others answer all the same
                found.append(None)
                errors.append(f"{label_of(model)}: {error}")
        if len(errors) == len(found):
            raise gradio.Error(html.escape(errors[0]), print_exception=False)
        for error in errors:
            gradio.Warning(html.escape(error))
        return found if len(found) > 1 else found[0]  # to gradio the value of a single output is no list

    def on_hear(recording: str | None) -> Any:
        return answers(lambda model, given: hear(model, given, config.device), recording, "a recording")

    def on_say(text: str) -> Any:
        return answers(lambda model, given: say(model, given, folder, config.device), text, "a sentence")

    labels = [label_of(model) for model in config.models]
    with gradio.Blocks(title="Speech language models side by side", analytics_enabled=False) as page:
        gradio.Markdown("# Speech language models side by side")
        with gradio.Tab("Speak"):
            sentence = gradio.Textbox(label="What to say", value="the weather is fine today")
            start = gradio.Button("Speak", variant="primary")
            with gradio.Row():
                player = {"type": "filepath", "interactive": False, "buttons": ["download"]}  # and no sharing elsewhere
                spoken = [gradio.Audio(label=label, **player) for label in labels]
            start.click(on_say, sentence, spoken, api_name="speak")
        with gradio.Tab("Transcribe"):
            given = {"type": "filepath", "sources": ["upload", "microphone"], "buttons": ["download"]}
            recording = gradio.Audio(label="Recording", **given)
            begin = gradio.Button("Transcribe", variant="primary")
            with gradio.Row():
                heard = [gradio.Textbox(label=label, interactive=False) for label in labels]
            begin.click(on_hear, recording, heard, api_name="transcribe")
        if report is not None:
            with gradio.Tab("Report"):
                source = html.escape(report.read_text(encoding="utf-8"))
                style = "width: 100%; height: 80vh; border: 0"
                gradio.HTML(f'<iframe title="Report" style="{style}" srcdoc="{source}"></iframe>')
    return page
