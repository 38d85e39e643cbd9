"""``slm measure-codes``: what a tokenizer's codes cost, what they tell of the text, and how steady they are.

Features: reads a coded corpus, or encodes recordings first; bitrates (nominal, by entropy), use and entropy of each
book; n-gram perplexity on utterances that the model has not seen; mutual information with the characters of an aligned
manifest; a small recogniser on the codes, chosen on the valid split and scored once on the test split; the share of
frames whose code outlives noise, gain, a shift, the codec itself, batching and bf16. Everything goes to
``run_dir/codes.json`` and, as tables, to the terminal.

Each measure is kept when it is done: the same command after an interruption goes on with the next. A measure that
cannot be had is a gap with its reason; the others stand.

Errors: ConfigError for settings that do not fit, CorpusError for a corpus that is missing or of another tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.codes.measures import MEASURES, NO_SNMI, CodeMeasures
from eval.codes.probe import ProbeConfig
from eval.report.code_tables import code_measure_tables
from eval.report.terminal import format_measures
from eval.text.normalisers import get_normaliser
from recipes.commands import encode
from recipes.config import ConfigError, Problems
from recipes.plugins import plugins_key
from recipes.runs.files import atomic_write_text, read_json
from recipes.runs.inputs import digest, refuse_other_inputs
from recipes.runs.logs import log
from recipes.runs.machine import resolve_device
from recipes.runs.run_folder import RunFolder
from recipes.scoring.code_measures import TEST, Gap, characters_of, predictability_of, probe_of, use_of
from recipes.scoring.code_robustness import measure_robustness
from recipes.scoring.labels import model_label
from recipes.scoring.protocols import made_with
from recipes.suggestions import did_you_mean
from slm.corpus import CodedCorpus
from tokenizer.data.manifest import read_source
from tokenizer.data.utterances import DataSource
from tokenizer.loading import load_tokenizer

RESULT_FILE = "codes.json"


@dataclass
class Config:
    """Whose codes are measured, and by what."""

    run_dir: str = field(default="runs/code-measures", metadata={"help": f"run folder; {RESULT_FILE} goes there"})
    corpus: str = field(
        default="", metadata={"help": "a coded corpus (slm encode); empty: data is encoded into run_dir/corpus first"}
    )
    tokenizer: str = field(
        default="", metadata={"help": "that of the codes; empty: as the corpus names it. For robustness"}
    )
    data: list[DataSource] = field(
        default_factory=list,
        metadata={"help": "the recordings: for robustness, and aligned manifests for characters"},
    )
    measures: list[str] = field(
        default_factory=list, metadata={"help": f"some of {', '.join(MEASURES)}; empty: all of them"}
    )
    split: str = field(default="train", metadata={"help": "of use, entropy and characters: the largest tells most"})
    orders: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "lengths of n-grams"})
    probe: ProbeConfig = field(default_factory=ProbeConfig, metadata={"help": "the small recogniser on codes"})
    normaliser: str = field(default="basic", metadata={"help": "of the probe's texts: basic, basic:de, none ..."})
    recordings: int = field(default=64, metadata={"help": "of the test split, for robustness; the first ones"})
    batch_seconds: float = field(default=60.0, metadata={"help": "seconds of padded audio in a batch"})
    seed: int = field(default=0, metadata={"help": "of the probe and of the noise"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    plugins: list[str] = plugins_key()

    def __post_init__(self) -> None:
        if unknown := [name for name in self.measures if name not in MEASURES]:
            guess = did_you_mean(unknown[0], MEASURES)
            raise ValueError(f"measures: {', '.join(unknown)} unknown; {guess}there are {', '.join(MEASURES)}")
        if self.recordings < 1 or self.batch_seconds <= 0 or not self.orders or min(self.orders) < 1:
            raise ValueError("recordings must be at least 1, batch_seconds above 0, orders some numbers from 1")

    @property
    def chosen(self) -> list[str]:
        """The measures that are made, in their order."""
        return [name for name in MEASURES if name in self.measures or not self.measures]


@dataclass
class Job:
    """A coded corpus and what measures it."""

    config: Config
    corpus: CodedCorpus
    device: str

    @cached_property
    def label(self) -> str:
        return model_label(self.corpus.metadata.tokenizer or self.config.tokenizer)

    def make(self, name: str) -> dict[str, Any]:
        """One measure. Raises Gap, and what its reading raises."""
        config, corpus = self.config, self.corpus
        functions: dict[str, Callable[[], dict[str, Any]]] = {
            "use": lambda: use_of(corpus, config.split, self.label),
            "language_model": lambda: predictability_of(corpus, config.orders),
            "characters": lambda: characters_of(corpus, config.split, config.data),
            "probe": lambda: probe_of(corpus, config.probe, config.normaliser, config.seed, self.device),
            "robustness": self._robustness,
        }
        return functions[name]()

    def _robustness(self) -> dict[str, Any]:
        config = self.config
        utterances = [u for source in config.data for u in read_source(source, TEST, needs_text=False)]
        if not utterances:
            raise Gap(f"needs recordings: data=[...] with a {TEST} split")
        tokenizer = load_tokenizer(config.tokenizer or self.corpus.metadata.tokenizer)
        self.corpus.check_fingerprint(tokenizer.fingerprint(self.corpus.metadata.precision))
        if hasattr(tokenizer, "fold_weight_norm"):
            tokenizer.fold_weight_norm()
        some = utterances[: config.recordings]
        return measure_robustness(tokenizer.to(self.device), some, config.batch_seconds, self.device, config.seed)


def _encoding(config: Config) -> encode.Config:
    """The encoding of `data`, where no coded corpus is given."""
    return encode.Config(
        run_dir=str(Path(config.run_dir) / "corpus"),
        tokenizer=config.tokenizer,
        data=config.data,
        precision="fp32",
        device=config.device,
        batch_seconds=config.batch_seconds,
    )


def _check(config: Config) -> str:
    """The device; raises all that would stop the command, together."""
    problems = Problems("slm measure-codes")
    problems.attempt(RunFolder(config.run_dir).check, config)
    device = problems.attempt(resolve_device, config.device)
    problems.attempt(get_normaliser, config.normaliser)
    if config.corpus:
        corpus = problems.attempt(CodedCorpus.open, config.corpus)
        if corpus is not None:
            problems.attempt(_check_corpus, config, corpus)
    elif not config.data or not config.tokenizer:
        problems.attempt(_raise_nothing_to_measure)
    problems.raise_all()
    return device


def _check_corpus(config: Config, corpus: CodedCorpus) -> None:
    if not corpus.count(config.split):
        raise ConfigError(f"split: {config.corpus} has no {config.split!r}; it has {', '.join(corpus.splits)}")
    if config.probe.books > corpus.metadata.n_codebooks:
        raise ConfigError(f"probe.books={config.probe.books}: the corpus has {corpus.metadata.n_codebooks}")


def _raise_nothing_to_measure() -> None:
    raise ConfigError("nothing to measure: give corpus=FOLDER (slm encode), or tokenizer=NAME and data=[{path: ...}]")


def plan(config: Config) -> dict[str, object]:
    """What would be measured; raises all that would stop it, together."""
    device = _check(config)
    facts: dict[str, object] = {"measures": config.chosen, "device": device}
    if config.corpus:
        corpus = CodedCorpus.open(config.corpus)
        facts |= {"tokenizer": corpus.metadata.tokenizer, "codebooks": corpus.metadata.codebook_sizes}
        facts |= {f"{split} (utterances)": corpus.count(split) for split in corpus.splits}
    else:
        facts["encoded first"] = encode.plan(_encoding(config))
    return facts | {"result": str(Path(config.run_dir) / RESULT_FILE)}


def run(config: Config) -> Path:
    """Measures what is not measured yet, writes and prints; returns the result's file."""
    device = _check(config)
    folder = RunFolder(config.run_dir)
    result = folder.path(RESULT_FILE)
    where = Path(config.corpus) if config.corpus else encode.run(_encoding(config))
    corpus = CodedCorpus.open(where)
    _check_corpus(config, corpus)
    inputs = digest(where, *(Path(source.path).expanduser() for source in config.data))
    refuse_other_inputs(folder, inputs, "corpus or data")
    folder.start(config, inputs)
    job = Job(config, corpus, device)
    made = {name: _kept(folder.path("parts", f"{name}.json"), lambda n=name: job.make(n)) for name in config.chosen}
    measures = CodeMeasures(
        tokenizer=job.label,
        fingerprint=corpus.metadata.fingerprint,
        frame_rate_hz=corpus.metadata.frame_rate,
        codebook_sizes=list(corpus.metadata.codebook_sizes),
        versions=made_with(config),
    )
    for name, values in made.items():
        if "gap" in values:
            measures.gaps[name] = values["gap"]
        else:
            setattr(measures, name, values)
            measures.gaps |= {f"{name}: {part}": why for part, why in values.get("gaps", {}).items()}
    measures.gaps["snmi"] = NO_SNMI
    if not folder.complete:
        atomic_write_text(result, json.dumps(measures.as_dict(), indent=1, ensure_ascii=False) + "\n")
        folder.mark_complete()
    print(format_measures(code_measure_tables(measures)), flush=True)
    for name, why in measures.gaps.items():
        print(f"no {name}: {why}", flush=True)
    return result


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measure's values as its file has them, made first where it has none; `gap` alone where it cannot be had."""
    if found := read_json(path):
        log.info("%s: measured before", path.stem)
        return found
    try:
        values = make()
    except Gap as error:
        values = {"gap": str(error)}
    atomic_write_text(path, json.dumps(values, ensure_ascii=False) + "\n")
    return read_json(path)
