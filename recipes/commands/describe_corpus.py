"""``slm describe-corpus``: what a text LLM says of recordings that it knows by their metadata alone.

DeSTA2 (arXiv 2409.20007): metadata and transcript of a recording become a description in words, an LLM
answers an instruction about it, and its own answer is what the speech LM then learns to give to the speech itself, so
that nothing has to be annotated and the answers are in the LLM's own manner.

The result, ``run_dir/manifest.jsonl``, holds the same recordings with the columns `instruction` and `answer`, which
the task `instruct` reads, and `messages`, the exchange as chat templates take it. An interrupted run goes on at the
first batch that is not answered.

Not here: codes (``slm encode data.0.columns=[instruction,answer]``) and the training (``slm finetune --config
baselines/desta2``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.config import ConfigError, Problems
from recipes.runs.embedded import model_path
from recipes.runs.inputs import digest
from recipes.runs.logs import log
from recipes.runs.machine import resolve_device
from recipes.runs.manifests import all_utterances, kept_rows, manifest_row, run_to_manifest
from recipes.runs.progress import Progress
from recipes.runs.run_folder import ADJUSTABLE, RunFolder
from slm.model.modeling import DTYPES, describe_llm, load_llm
from slm.tasks.instruct import ANSWER, INSTRUCTION
from slm.text_answers import Request, TextAnswer, answer_requests
from tokenizer.data.utterances import DataSource, Utterance

MESSAGES = "messages"


def _instructions() -> list[str]:
    return [
        "What can you hear in the audio?",
        "Describe the speech in one sentence.",
        "What does the speaker say?",
    ]


@dataclass
class Example:
    """A recording of the data that is asked about, and how it is to be answered."""

    id: str = field(default="", metadata={"help": "the utterance's"})
    instruction: str = field(default="", metadata={"help": "one of `instructions`; its rows are shown this example"})
    answer: str = field(default="", metadata={"help": "what should be said"})


@dataclass
class Config:
    """Which recordings are described to which LLM, and what it is asked."""

    run_dir: str = field(default="runs/described", metadata={"help": "run folder; the result is its manifest.jsonl"})
    data: list[DataSource] = field(default_factory=list, metadata={"help": "manifests or folders, all their splits"})
    limit: int | None = field(default=None, metadata={"help": "only the first N utterances of each split"})
    model: str = field(
        default="embedded-lm",
        metadata={"help": "the LLM that answers, a folder or hub name; best the instruct LLM that is fine-tuned later"},
    )
    facts: list[str] = field(
        default_factory=lambda: ["gender"],
        metadata={"help": "further columns of the data to be told, where a row has them: gender, accent, emotion, ..."},
    )
    instructions: list[str] = field(
        default_factory=_instructions, metadata={"help": "what is asked; one is drawn for each row by seed and id"}
    )
    examples: list[Example] = field(
        default_factory=list,
        metadata={
            "help": "answered requests shown in front of each row with the same instruction: for a base LLM, which "
            "without a chat template goes on with a text rather than answers it; all its answers then are one line"
        },
    )
    max_new_tokens: int = field(default=64, metadata={"help": "tokens after which an answer is cut"})
    batch_size: int = field(default=8, metadata={"help": "rows answered together", **ADJUSTABLE})
    weights: str = field(default="fp32", metadata={"help": "how the LLM is held: fp32, bf16, fp16"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    seed: int = field(default=0, metadata={"help": "of which instruction a row gets"})

    def __post_init__(self) -> None:
        if not self.instructions or not all(text.strip() for text in self.instructions):
            raise ValueError("instructions: give at least one, and none that is empty")
        if min(self.max_new_tokens, self.batch_size) < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError("max_new_tokens, batch_size and limit must be at least 1")
        if self.weights not in DTYPES:
            raise ValueError(f"weights: {self.weights!r} is not one of {', '.join(DTYPES)}")
        for number, example in enumerate(self.examples):
            if not (example.id and example.answer.strip() and example.instruction in self.instructions):
                raise ValueError(
                    f"examples.{number}: needs the id of an utterance, one of `instructions` as its instruction, "
                    "and an answer"
                )
        if taken := {INSTRUCTION, ANSWER, MESSAGES} & set(self.facts):
            raise ValueError(f"facts: {', '.join(sorted(taken))} is a column that this command writes")


def describe(utterance: Utterance, facts: list[str]) -> str:
    """The recording in words: its time, its transcript and what else is known of it.

    >>> row = Utterance("a", "a.wav", "good day", "jo", 75.25, columns={"gender": "female", "accent": ""})
    >>> describe(row, ["gender", "accent"])
    '[00:00:00 - 00:01:15] good day (Speaker: jo, Gender: female, Duration: 75.2 s)'
    """
    told = {"speaker": utterance.speaker} | {name: utterance.columns.get(name, "") for name in facts}
    words = [f"{name.replace('_', ' ').capitalize()}: {value}" for name, value in told.items() if value]
    span = ""
    if utterance.duration is not None:
        words.append(f"Duration: {utterance.duration:.1f} s")
        minutes, seconds = divmod(int(utterance.duration), 60)
        span = f"[00:00:00 - {minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}] "
    return f"{span}{utterance.text}" + (f" ({', '.join(words)})" if words else "")


def drawn_instruction(utterance: Utterance, config: Config) -> str:
    """The instruction of a row: a function of seed and id, whatever stands beside it."""
    drawn = hashlib.sha256(f"{config.seed}\0{utterance.id}".encode()).digest()
    return config.instructions[int.from_bytes(drawn[:8], "big") % len(config.instructions)]


def read_rows(config: Config) -> list[Utterance]:
    """The recordings with a transcript. Raises DataError, ConfigError."""
    rows = all_utterances(_with_facts(config), config.limit)
    if strays := [one.id for one in config.examples if one.id not in {row.id for row in rows}]:
        raise ConfigError(f"examples: the data (or what limit leaves of it) has no utterance {strays[0]!r}")
    spoken = [row for row in rows if row.text.strip()]
    if not spoken:
        raise ConfigError("data: none of the utterances has a transcript, which a description is made of")
    if len(spoken) < len(rows):
        log.warning("%d utterances without a transcript are left out", len(rows) - len(spoken))
    return spoken


def plan(config: Config) -> dict[str, object]:
    """What would be asked; raises all that would stop it, together."""
    problems = Problems("slm describe-corpus")
    problems.attempt(RunFolder(config.run_dir).check, config)
    facts = problems.attempt(describe_llm, config.model)
    rows = problems.attempt(read_rows, config)
    problems.raise_all()
    return {
        "utterances": len(rows),
        "model": config.model,
        "chat template": "yes" if facts.tokenizer.chat_template else "none: the request as plain text",
        "first request": _requests(rows, config)[rows[0].id].text,
        "result": str(RunFolder(config.run_dir).path("manifest.jsonl")),
    }


def run(config: Config) -> Path:
    """Ask the LLM about every recording, or go on where a killed run stopped; returns the manifest."""
    return run_to_manifest(config, read_rows, fingerprint_of, "data or model", described)


def fingerprint_of(config: Config, rows: list[Utterance]) -> str:
    """A hash of the requests and the LLM."""
    asked = [[request.text, *request.examples] for request in _requests(rows, config).values()]
    plain = [json.dumps(one) if len(one) > 1 else one[0] for one in asked]  # as before there were examples
    return digest(plain, model_path(config.model))


def described(config: Config, rows: list[Utterance], folder: RunFolder) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The manifest's rows and their counts; answers of an earlier start are kept."""
    record = folder.checkpoints / "answers.jsonl"
    # Records without `ended` do not tell which answers were cut off: all count as ended.
    answers = {name: TextAnswer(row["answer"], row.get("ended", True)) for name, row in kept_rows(record).items()}
    requests = _requests(rows, config)
    waiting = {name: request for name, request in requests.items() if name not in answers}
    if waiting:
        _answer(config, waiting, answers, record, len(rows))
    empty = sum(not answers[row.id].text for row in rows)
    if empty:
        log.warning("%d answers are empty; slm finetune leaves those rows out", empty)
    cut = sum(not answers[row.id].ended for row in rows)
    if cut:
        log.warning(
            "%d of %d answers were cut off at %d tokens, and a model would learn that they end there; raise "
            "max_new_tokens (in a new run_dir)",
            cut,
            len(rows),
            config.max_new_tokens,
        )
    found = [manifest_row(row, folder.folder, _columns(row, config, answers[row.id].text)) for row in rows]
    return found, {"utterances": len(rows), "empty_answers": empty, "cut_answers": cut}


def _with_facts(config: Config) -> list[DataSource]:
    """The sources with the columns of the facts, without changing the configuration that the run folder records."""
    return [
        dataclasses.replace(source, columns=list(dict.fromkeys([*source.columns, *config.facts])))
        for source in config.data
    ]


def _asked(row: Utterance, instruction: str, config: Config) -> str:
    return f"{describe(row, config.facts)}\n{instruction}"


def _requests(rows: list[Utterance], config: Config) -> dict[str, Request]:
    """What the LLM is asked of each row, by its id."""
    by_id, shown = {row.id: row for row in rows}, {}
    for one in config.examples:
        if one.id not in by_id:  # the rows have a transcript each
            raise ConfigError(f"examples: utterance {one.id!r} has no transcript")
        shown.setdefault(one.instruction, []).append((_asked(by_id[one.id], one.instruction, config), one.answer))
    found = {}
    for row in rows:
        instruction = drawn_instruction(row, config)
        found[row.id] = Request(_asked(row, instruction, config), tuple(shown.get(instruction, ())))
    return found


def _columns(row: Utterance, config: Config, answer: str) -> dict[str, Any]:
    instruction = drawn_instruction(row, config)
    asked = {"role": "user", "content": _asked(row, instruction, config)}
    exchange = [asked, {"role": "assistant", "content": answer}]
    return {INSTRUCTION: instruction, ANSWER: answer, MESSAGES: exchange}


def _answer(
    config: Config, waiting: dict[str, Request], answers: dict[str, TextAnswer], record: Path, total: int
) -> None:
    """Fills `answers` batch by batch; each is on disk before the next begins."""
    model, tokenizer, _ = load_llm(config.model, config.weights)
    if not tokenizer.chat_template and not config.examples:
        log.warning(
            "model %s has no chat template: a base LLM goes on with the text rather than answers it; show it examples",
            config.model,
        )
    model.to(resolve_device(config.device)).eval()
    shown = Progress("describe-corpus", total, total - len(waiting))
    names = list(waiting)
    one_line = bool(config.examples) and not tokenizer.chat_template
    for start in range(0, len(names), config.batch_size):
        batch = names[start : start + config.batch_size]
        requests = [waiting[name] for name in batch]
        made = answer_requests(model, tokenizer, requests, config.max_new_tokens, one_line)
        with record.open("a", encoding="utf-8") as stream:
            for name, answer in zip(batch, made, strict=True):
                answers[name] = answer
                line = {"id": name, "answer": answer.text, "ended": answer.ended}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        shown.update(len(batch))
    shown.close()
