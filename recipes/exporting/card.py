"""The model card of an exported model: Markdown with YAML front matter, filled from the run folders behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import yaml

from eval.codes import CodeStatistics, nominal_bitrate
from eval.merging import merge_results
from eval.report.markdown import results_markdown
from eval.schema import Results, Row
from eval.systems import is_task
from recipes.config import ConfigError
from recipes.exporting.check import Agreement
from recipes.exporting.discriminators import DISCRIMINATORS
from recipes.runs.embedded import EMBEDDED
from recipes.runs.lineage import NOT_STATED, DataRow, Lineage, PastRun, data_rows, lineage
from recipes.runs.machine import machine_text
from recipes.scoring.labels import label_of_path

CARD_FILE = "README.md"
PAPER = "arXiv 2506.16738"
WHAT = {
    "tokenizer": f"An LM-SPT speech tokenizer ({PAPER}): speech at {{rate}} Hz becomes {{frame_rate:g}} code frames a "
    "second of one semantic and {acoustic} acoustic codebooks, and sound again. It was trained by semantic "
    "speech-resynthesis distillation: what an auxiliary decoder makes of the semantic codes alone has to sound to a "
    "frozen speech recogniser as the recording does.",
    "supervised-tokenizer": "A supervised semantic speech tokenizer: a quantizer inside a recogniser's encoder. It "
    "makes codes of speech and has no way back to sound.",
    "recogniser": "A small English speech recogniser with Whisper's architecture, characters as its text, and a CTC "
    "head on its encoder (ctc_head.safetensors). Its encoder is the teacher of LM-SPT tokenizers; it is a judge of "
    "synthesised speech beside that.",
    "text-lm": "A small text LM (byte-level BPE, Qwen2 architecture), to be fine-tuned on speech tokens where no "
    "larger pretrained LLM can be had.",
    "slm": "A speech language model: an LLM fine-tuned on LM-SPT speech tokens for speech recognition and synthesis.",
}
USE = {
    "tokenizer": 'from tokenizer import load_tokenizer\n\ntokenizer = load_tokenizer("{name}")\n'
    "codes = tokenizer.encode(waveform).audio_codes  # waveform (B, 1, S) at {rate} Hz -> (B, K, F)\n"
    "audio = tokenizer.decode(codes).audio_values  # codes[:, :1]: the semantic book alone",
    "supervised-tokenizer": 'from tokenizer import load_tokenizer\n\ntokenizer = load_tokenizer("{name}")\n'
    "codes = tokenizer.encode(waveform).audio_codes  # waveform (B, 1, S) at {rate} Hz -> (B, 1, F)",
    "recogniser": "slm train-tokenizer teacher.name={name} ...       # as the teacher\n"
    'slm evaluate "judges=[{{name: {name}}}]" ...     # as the judge',
    "text-lm": "slm finetune model={name} corpus=runs/codes run_dir=runs/slm",
    "slm": "slm transcribe recording.wav model={name}\n"
    'slm synthesize "set white at b four now" -o out.wav model={name}',
}
TASK = {"tokenizer": "audio-to-audio", "recogniser": "automatic-speech-recognition", "text-lm": "text-generation"}
LIMITS = {
    "tokenizer": [
        "What lies above half the sampling rate is lost, and so are channels: input is mono.",
        "The teacher is a biased judge of this tokenizer: the distillation optimises what it hears.",
    ],
    "supervised-tokenizer": ["It has no decoder."],
    "recogniser": [
        "It writes a to z, apostrophe and space: numbers and abbreviations come out as they are spoken.",
        "It is a biased judge of tokenizers that it taught: score them with another recogniser as well.",
    ],
    "text-lm": ["It knows the sentences of its corpora and hardly any other language."],
    "slm": ["It speaks the codes of its own tokenizer only (fingerprint in speech_vocabulary.json)."],
}
# Row kinds that say something of a kind of model; of others all do.
ROWS = {"recogniser": ("ground_truth",)}

GOING_ON = """## Going on

`{folder}/` holds the discriminators that it was trained against. A training that starts from both goes on with them:

```bash
slm train-tokenizer --config MINE init_from=path/to/{name} init_discriminators=true
```

Optimizers start anew; keep `discriminator.*` as in `{folder}/config.json`."""


@dataclass
class Export:
    """All that a card is made from."""

    name: str
    kind: str
    settings: dict[str, Any]  # config.json
    run: PastRun | None
    dtype: str
    license: str
    parameters: dict[str, int] = field(default_factory=dict)  # of each part
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of each file
    discriminators: bool = False  # whether those of the training lie beside it
    labels: list[str] = field(default_factory=list)  # what tables call it, beside its name
    fingerprint: str = ""
    agreement: Agreement | None = None
    results: list[Results] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def frame_rate(self) -> float | None:
        """Code frames a second, where there are codes."""
        if self.kind == "tokenizer":
            return self.settings["sampling_rate"] / math.prod(self.settings["strides"])
        return None


def model_card(export: Export) -> str:
    """The card's text."""
    past = lineage(export.run) if export.run else Lineage()
    data = data_rows(past.runs)
    rate = export.settings.get("sampling_rate", 16000)
    books = export.settings.get("codebook_sizes") or []
    what = WHAT[export.kind].format(rate=rate, frame_rate=export.frame_rate or 0, acoustic=max(0, len(books) - 1))
    use = USE[export.kind].format(name=export.name if export.name in EMBEDDED else f"path/to/{export.name}", rate=rate)
    language = "python" if "import" in use else "bash"
    parts = [
        _front_matter(export, data),
        f"# {export.name}\n\n{what}",
        f"```{language}\n{use}\n```",
        "## Sizes\n\n" + _sizes(export),
        "## Scores\n\n" + _scores(export),
        "## Data\n\n" + _data(data, past),
        "## Training\n\n" + _training(export, past),
        *([GOING_ON.format(name=export.name, folder=DISCRIMINATORS)] if export.discriminators else []),
        "## Limits\n\n" + "\n".join(f"- {item}" for item in _limits(export, data)),
    ]
    return "\n\n".join(parts) + "\n"


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def size_text(size: int) -> str:
    """Bytes for people: ``7654321`` -> ``7.65 MB``."""
    power = min(3, int(math.log10(max(size, 1)) / 3))
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"


def clock(seconds: float | None) -> str:
    """``4530`` -> ``1 h 16 min``."""
    if seconds is None:
        return "not recorded"
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _front_matter(export: Export, data: list[DataRow]) -> str:
    tags = ["speech", "lm-spt", "speech-tokenizer" if "tokenizer" in export.kind else export.kind]
    facts: dict[str, Any] = {"license": export.license, "language": "en", "tags": tags}
    if export.kind in TASK:
        facts["pipeline_tag"] = TASK[export.kind]
    if corpora := list(dict.fromkeys(row.corpus for row in data)):
        facts["datasets"] = corpora
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---"


def _sizes(export: Export) -> str:
    total = sum(export.parameters.values())
    facts: list[tuple[str, object]] = [("parameters", f"{total:,}")]
    facts += [(f"of these: {part}", f"{count:,}") for part, count in export.parameters.items()]
    for name, size in export.sizes.items():
        if name.endswith(".safetensors"):
            facts.append((name, f"{size_text(size)} ({size:,} bytes)"))
    held = "fp32" if export.dtype == "fp32" else f"{export.dtype} on disk; computed with in fp32"
    facts.append(("weights", held))
    settings = export.settings
    if export.kind == "tokenizer":
        books, rate = settings["codebook_sizes"], export.frame_rate or 0.0
        acoustic = ", ".join(str(size) for size in dict.fromkeys(books[1:]))
        facts += [
            ("sampling rate", f"{settings['sampling_rate']} Hz"),
            ("sampling rate of resynthesis", f"{settings['auxiliary_sampling_rate']} Hz"),
            ("frame rate", f"{rate:g} Hz"),
            ("codebooks", f"{books[0]} entries (semantic), {len(books) - 1} acoustic of {acoustic}"),
            ("bitrate, all books", f"{nominal_bitrate(rate, books):.0f} bit/s"),
            ("bitrate, semantic book", f"{nominal_bitrate(rate, books[:1]):.1f} bit/s"),
        ]
    if export.kind == "recogniser":
        facts.append(("longest input at once", f"{settings['max_source_positions'] / 50:g} s"))
    if export.fingerprint:
        facts.append(("fingerprint of its codes in fp32", f"`{export.fingerprint}`"))
    text = table(["", ""], facts)
    return text + (f"\n\n{export.agreement.text()}" if export.agreement else "")


def own_results(export: Export) -> Results:
    """What the card shows of its results: the rows that the patterns name, else those of this kind of model and rate.

    Where several models share the rate, only what is about the one of this name, or in the cell that is called so
    (`12.5hz` of `embedded-12.5hz`).

    Raises:
        ConfigError: there are several models and none is called as this one.
    """
    parts = [replace(part, rows=[row for row in part.rows if _fits(export, row)]) for part in export.results]
    codes = [item for part in parts for item in part.codes if item.frame_rate_hz == export.frame_rate]
    models = {_about(export, row) for part in parts for row in part.rows}
    models = (models | {_code_label(item) for item in codes}) - {""}
    if len(models) > 1 and not export.rows:
        names = {label_of_path(name) for name in (export.name, *export.labels)}
        cells = {*names, export.name.removeprefix("embedded-")}
        parts = [replace(part, rows=_own_rows(export, part, names & models, cells)) for part in parts]
        if not any(part.rows for part in parts):
            raise ConfigError(
                f"results: they hold several models ({', '.join(sorted(models))}) and none is called "
                f"{' or '.join(sorted(names))}: name the rows of this one by patterns, such as rows=['12.5hz:*']"
            )
    # Merged: the recordings' rows stand in each of several evaluations.
    found = merge_results(parts, export.name)
    about = {_about(export, row) for row in found.rows}
    shown = {(row.label, row.model) for row in found.rows}
    return Results(
        export.name,
        found.rows,
        [item for item in found.codes if item in codes and (len(models) < 2 or _code_label(item) in about)],
        [item for item in found.quality if (item.label, item.model) in shown] if export.frame_rate else [],
    )


def _fits(export: Export, row: Row) -> bool:
    """Whether a row is named by the patterns, else whether it is about this kind of model and rate."""
    if export.rows:
        names = (row.label, f"{row.protocol.judge.get('name', '')}: {row.label}")
        return any(fnmatchcase(name, pattern) for name in names for pattern in export.rows)
    if row.system not in ROWS.get(export.kind, (row.system,)):
        return False
    return None in (export.frame_rate, row.frame_rate_hz) or abs(row.frame_rate_hz - export.frame_rate) < 1e-6


def _own_rows(export: Export, part: Results, own: set[str], cells: set[str]) -> list[Row]:
    """A part's rows that are about one of the models `own`, or in one of the `cells` where none is known.

    Beside them, in the same cell, what does not say whose it is, and the recordings' rows.
    """
    sure = [_about(export, row) in own if own else row.cell in cells for row in part.rows]
    beside = {row.cell for row, is_sure in zip(part.rows, sure, strict=True) if is_sure}
    return [
        row
        for row, is_sure in zip(part.rows, sure, strict=True)
        if is_sure or (row.system == "ground_truth" and beside) or (not _about(export, row) and row.cell in beside)
    ]


def _about(export: Export, row: Row) -> str:
    """Which model of the exported one's kind a row is about; empty where it does not say."""
    by_slm = is_task(row.system)
    if export.kind == "slm":
        return label_of_path(row.model) if by_slm else ""
    if export.kind not in ("tokenizer", "supervised-tokenizer"):
        return ""
    return label_of_path(str(row.generation.get("tokenizer") or "") if by_slm else row.model)


def _code_label(item: CodeStatistics) -> str:
    return label_of_path(item.name)


def _scores(export: Export) -> str:
    found = own_results(export)
    if not found.rows:
        return "None are recorded here: `slm evaluate` makes them."
    text = results_markdown(found)
    return text.removeprefix(f"# {export.name}\n").replace("\n## ", "\n### ").strip()


def _hours(row: DataRow) -> str:
    return "?" if row.hours is None else f"{row.hours:.2f}"


def _data(data: list[DataRow], past: Lineage) -> str:
    if not data:
        return "Not recorded: there was no run folder beside the model."
    rows = [
        [row.corpus, row.split, row.n if row.n is not None else "?", _hours(row), row.n_speakers or "?"]
        + [", ".join(row.licences) or NOT_STATED, "; ".join(row.sources) or NOT_STATED, ", ".join(row.read_by)]
        for row in data
    ]
    headings = ["corpus", "split", "utterances", "hours", "speakers or voices", "licence", "source", "read by"]
    text = table(headings, rows)
    if any(row.n is None for row in data):
        text += "\n\n`?`: that source was not at hand when this card was written."
    if past.outside:
        text += f"\n\nFurther inputs without a run folder at hand: {', '.join(past.outside)}."
    return text


def _training(export: Export, past: Lineage) -> str:
    if export.run is None:
        return "Not recorded: there was no run folder beside the model."
    rows = []
    for run in past.runs:
        steps = run.settings.get("training", {}) if isinstance(run.settings.get("training"), dict) else {}
        rows.append([run.recipe, steps.get("steps", ""), _batch(run), clock(run.wall_s), machine_text(run.record)])
    own = export.run
    commit = own.record.get("commit") or "not recorded"
    versions = own.record.get("versions", {})
    measured = {key: value for key, value in own.summary.items() if "/" in key and isinstance(value, int | float)}
    lines = [
        table(["stage", "steps", "batch", "wall-clock", "machine"], rows),
        "These commands make it again, in this order (with the data in the same places):",
        "```bash\n" + "\n".join(run.command for run in past.runs) + "\n```",
        f"The whole configuration is in training.yaml. Seed {own.settings.get('seed', own.record.get('seed'))}, commit "
        f"{commit}, torch {versions.get('torch', '?')}, transformers {versions.get('transformers', '?')}.",
    ]
    if measured:
        ends = [(key, f"{value:.4g}") for key, value in measured.items()]
        lines += ["At its end:", table(["measure", "value"], ends)]
    return "\n\n".join(lines)


def _batch(run: PastRun) -> str:
    training, crops = run.settings.get("training"), run.settings.get("crops")
    if not isinstance(training, dict):
        return ""
    if "tokens_per_step" in training:
        return f"{training['tokens_per_step']} tokens"
    size = training.get("batch_size", "")
    return f"{size} crops of {crops['crop_s']:g} s" if isinstance(crops, dict) else f"{size} utterances"


def _limits(export: Export, data: list[DataRow]) -> list[str]:
    used = [row for row in data if row.split == "train"]
    items = []
    if used and export.kind != "text-lm":
        hours = sum(row.hours or 0.0 for row in used)
        n = sum(row.n_speakers or 0 for row in used)
        items.append(
            f"Its training has seen {hours:.1f} hours of English (speakers and synthetic voices: at most {n}). Other "
            "languages, noise, music and overlapping speech were not in it, and other voices may fare worse."
        )
    return [*items, *LIMITS[export.kind], *export.notes]
