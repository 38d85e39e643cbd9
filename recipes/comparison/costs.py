"""What each cell's fine-tuning cost, and what its tokens cost an LLM's memory: the columns beside the scores.

What was counted is kept in ``run_dir/costs.json``, by the fine-tuning's settings and its corpus.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.trainings import Cost
from recipes.comparison.fairness import corpus_digest, settings_digest
from recipes.finetuning.config import Config as FinetuneConfig
from recipes.finetuning.corpora import open_corpora
from recipes.finetuning.exposure import exposure_of
from recipes.finetuning.pattern_costs import cache_bytes
from recipes.finetuning.vocabulary import make_vocabulary
from recipes.runs.files import atomic_write_text, read_json
from recipes.runs.logs import log
from recipes.runs.pipeline import Step
from recipes.runs.run_folder import COMPLETE_FILE
from slm.modeling import describe_llm

__all__ = ["costs_of"]

COSTS_FILE = "costs.json"
CACHE_PRECISION = "bf16"  # of keys and values: two bytes a number, as an LLM is run


def costs_of(cells: Mapping[str, Sequence[Step]], folder: Path | str) -> list[Cost]:
    """The cost of every complete fine-tuning of the cells; one whose corpus or model is gone is left out, and named."""
    file = Path(folder, COSTS_FILE)
    known, found = read_json(file), []
    before = dict(known)
    for cell, steps in cells.items():
        for step in steps:
            if not isinstance(step.config, FinetuneConfig) or not step.folder.complete:
                continue
            n_steps = step.folder.summary.get("steps", step.config.training.steps)
            key = f"{settings_digest(step.config)} {corpus_digest(step.config)} {n_steps}"
            try:
                known[key] = known.get(key) or _counted(step.config, n_steps)
            except (ValueError, OSError) as error:
                log.warning("%s: what %s cost cannot be told: %s", cell, step.stage.name, error)
                continue
            wall_s = read_json(step.folder.path(COMPLETE_FILE)).get("wall_s")
            found.append(Cost(cell, step.stage.name, n_steps, wall_s=wall_s, **known[key]))
    if known != before:
        atomic_write_text(file, json.dumps(known, indent=2) + "\n")
    return found


def _counted(config: FinetuneConfig, steps: int) -> dict[str, float]:
    """Model FLOPs of a training's steps, and bytes of cache that a second of speech takes."""
    facts = describe_llm(config.model, config.training.attention)
    vocabulary = make_vocabulary(config, open_corpora(config), facts.tokenizer, facts.vocabulary)
    per_second = vocabulary.frame_rate * vocabulary.ids_per_frame
    return {
        "flops": exposure_of(config).amounts(steps).flops,
        "cache_bytes_per_s": per_second * cache_bytes(facts, CACHE_PRECISION),
    }
