"""Pairs for DPO: answers of the start, drawn and judged once, the best of each text against its worst."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eval.judges.judge import Judge
from eval.text.normalisers import get_normaliser
from recipes.config import ConfigError
from recipes.inference.batches import Outcome, forget_batches, make_batches, work_through
from recipes.preference.config import Config
from recipes.preference.samples import Sample, Speaker, hear, judged
from recipes.preference.texts import Text
from recipes.runs.files import text_lines, write_jsonl
from recipes.runs.logs import log
from recipes.runs.processes import Processes
from recipes.runs.run_folder import RunFolder
from slm.training.batches import pack
from slm.training.preference.dpo import Pair
from slm.training.preference.reference import Scorer

FILE = "pairs.jsonl"


@dataclass
class Counts:
    """What became of the texts whose answers were drawn."""

    texts: int = 0
    samples: int = 0
    pairs: int = 0
    ties: int = 0  # best and worst are too near each other
    failed: int = 0  # no answer ended as speech does

    def __str__(self) -> str:
        return (
            f"{self.pairs} pairs of {self.samples} answers to {self.texts} texts; dropped: {self.ties} ties, "
            f"{self.failed} texts without an answer that ended"
        )


def make_pairs(
    config: Config,
    folder: RunFolder,
    texts: Sequence[Text],
    speaker: Speaker,
    judge: Judge,
    start: Scorer,
) -> list[Pair]:
    """The pairs of a run: those of its file, or drawn, judged and written there.

    What is drawn is kept batch by batch, so that a killed run goes on where it was. The file holds a line of counts,
    then a line for each pair, with the log-probabilities of both answers under the start.

    Args:
        config: What is drawn and judged, and how.
        folder: The run's.
        texts: To be spoken.
        speaker: Speaks them.
        judge: Hears them.
        start: The model that draws them, which the training starts from.

    Raises:
        ConfigError: There is no pair.
    """
    path = folder.path(FILE)
    if not path.is_file():
        found = _drawn(config, folder, texts, speaker, judge, start)
        counts = Counts(texts=len(texts), samples=sum(map(len, found)))
        chosen = []
        for text, samples in zip(texts, found, strict=True):
            pair = best_and_worst(samples, config.dpo.margin)
            if pair is not None:
                chosen.append((text, *pair))
            elif all(sample.failed for sample in samples):
                counts.failed += 1
            else:
                counts.ties += 1
        counts.pairs = len(chosen)
        if not chosen:
            raise ConfigError(
                f"{counts}: nothing to learn from. Draw more answers (dpo.samples), or ask for less of a difference "
                f"(dpo.margin, {config.dpo.margin:g}); where none ends, `slm finetune` the model for longer first"
            )
        rows = [asdict(counts), *_rows(config, chosen, speaker, start)]
        write_jsonl(path, rows)
        forget_batches(folder)
    counted, *rows = (json.loads(line) for line in text_lines(path))
    log.info("%s: %s", path, Counts(**counted))
    return [_pair(row, speaker) for row in rows]


def best_and_worst(samples: Sequence[Sample], margin: float) -> tuple[Sample, Sample] | None:
    """The answers of highest and of lowest reward; None where they are less than `margin` apart, or the best failed.

    Of several that are worth the same, the first.
    """
    best, worst = max(samples, key=lambda one: one.reward), min(samples, key=lambda one: one.reward)
    return None if best.failed or best.reward - worst.reward < margin else (best, worst)


def _drawn(
    config: Config, folder: RunFolder, texts: Sequence[Text], speaker: Speaker, judge: Judge, start: Scorer
) -> list[list[Sample]]:
    """`dpo.samples` answers to each text."""
    size, normalise = config.dpo.samples, get_normaliser(config.normaliser)
    batches = make_batches(
        [len(text.said) for text in texts], [size] * len(texts), max(size, config.sampling.batch_size)
    )

    def work(numbers: Sequence[int]) -> Outcome:
        asked = [texts[number] for number in numbers for _ in range(size)]
        keys = [f"{texts[number].said}\0{sample}" for number in numbers for sample in range(size)]
        spoken = speaker.speak(start.model, asked, config.sampling, keys)
        samples = judged(config.reward, speaker, spoken, asked, hear(judge, speaker, spoken, asked, normalise))
        rows = [sample.as_dict() for sample in samples]
        return Outcome(
            {number: {"samples": rows[place * size : (place + 1) * size]} for place, number in enumerate(numbers)}
        )

    folder.checkpoints  # noqa: B018 - makes the folder
    outcome = work_through(batches, work, folder, Processes(config.device, folder.folder), "answers to choose from")
    return [[Sample.from_dict(row) for row in outcome.rows[number]["samples"]] for number in range(len(texts))]


def _rows(
    config: Config, chosen: Sequence[tuple[Text, Sample, Sample]], speaker: Speaker, start: Scorer
) -> list[dict[str, Any]]:
    """The lines of the file, one a pair."""
    rows, size = [], max(1, config.sampling.batch_size // 2)
    for first in range(0, len(chosen), size):
        some = chosen[first : first + size]
        examples = [speaker.example(text, one) for text, *pair in some for one in pair]
        # A row for each: what a model makes of packed ones is only looked into when its training begins.
        values, sequences = start.log_probabilities(pack(examples, [1.0] * len(examples), 0, numbered=True))
        sums = values.new_zeros(len(examples)).index_add(0, sequences, values).view(-1, 2).tolist()
        for (text, best, worst), (of_best, of_worst) in zip(some, sums, strict=True):
            row = {"id": text.id, "text": text.written, "said": text.said}
            row["chosen"] = best.as_dict() | {"reference_log_probability": of_best}
            rows.append(row | {"rejected": worst.as_dict() | {"reference_log_probability": of_worst}})
    return rows


def _pair(row: dict[str, Any], speaker: Speaker) -> Pair:
    text, sides = Text(row["id"], row["text"], row["said"]), []
    for side in ("chosen", "rejected"):
        sample = dict(row[side])
        logp = sample.pop("reference_log_probability")
        one = Sample.from_dict(sample)
        sides.append((speaker.example(text, one), logp))
    (chosen, of_chosen), (rejected, of_rejected) = sides
    return Pair(chosen, rejected, of_chosen, of_rejected)
