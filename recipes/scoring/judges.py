"""Judges as a scoring needs them: loaded, each with what it has heard already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from eval.judges.config import JudgeConfig
from eval.judges.judge import conditions_of, load_judge
from eval.judges.transcripts import CachedJudge
from recipes.runs.embedded import resolve_judge
from recipes.scoring.answer_cache import AnswerCache


def load_judges(
    judges: Sequence[JudgeConfig], device: str, folder: Path | None, strict: bool = False
) -> list[CachedJudge]:
    """Every judge, with what it has heard already: one small file for each and the conditions it reads under.

    Args:
        judges: Which.
        device: Where they read.
        folder: Where the files are; None keeps nothing.
        strict: Stop at the first recording that one cannot read.

    Raises:
        JudgeError: One cannot be loaded.
    """
    found = []
    for settings in judges:
        judge = load_judge(resolve_judge(settings), device)
        path, conditions = None, conditions_of(judge.identity, device)
        if conditions is not None and folder is not None:
            number = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:12]
            path = folder / f"{judge.identity['kind']}-{number}.jsonl"
        found.append(CachedJudge(judge, AnswerCache(path, conditions), strict))
    return found
