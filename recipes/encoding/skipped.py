"""Recordings that `slm encode` sets aside: a list beside each shard, then one of all, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

from recipes.runs.files import text_lines, write_jsonl
from recipes.runs.logs import log, the_first
from recipes.runs.run_folder import RunFolder


def skipped_path(folder: RunFolder, split: str, index: int) -> Path:
    """Where a shard's recordings that were set aside are listed until the corpus is whole."""
    return folder.path("checkpoints", f"skipped-{split}-{index:05d}.jsonl")


def gather_skipped(folder: RunFolder, places: list[tuple[str, int]]) -> list[dict]:
    """All that was set aside, in the shards' order, written to skipped.jsonl."""
    skipped = []
    for split, index in places:
        lines = text_lines(skipped_path(folder, split, index))
        skipped += [json.loads(line) | {"split": split} for line in lines]
    write_jsonl(folder.path("skipped.jsonl"), skipped)
    return skipped


def report_skipped(folder: RunFolder, skipped: list[dict], total: int) -> None:
    """Says how many of all recordings were encoded, and why the others were not."""
    if not skipped:
        log.info("all %d recordings were encoded", total)
        return
    log.warning("encoded %d of %d; set aside %d:", total - len(skipped), total, len(skipped))
    for line in the_first(row["reason"] for row in skipped):
        log.warning("  %s", line)
    log.warning("all of them: %s (--strict stops at the first)", folder.path("skipped.jsonl"))
