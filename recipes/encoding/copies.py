"""Varied copies of a coded corpus's recordings: which rows they are, and what their columns say of time.

`slm encode copies=N` plays a copy at another speed behind a little silence (`Variation`), so a word of it stands
elsewhere than in the recording. Columns that tell of time are made the copy's own as it is encoded:

- a list of objects with `start` and `end` in seconds (`words`, `characters`, `phones` of `slm align`, and any other);
- `prosody` of `slm measure-prosody`: a word's duration. Its F0 is relative to the voice and its energy to the
  utterance, which the speed and the level move as a whole: they stay.

- `word_frames` of `slm align` is left empty: frames of the recording's codes are none of the copy's.

Every other column is of the recording, and the copy's too. Corpora that were encoded before this hold the recording's
times in their copies (:func:`copies_have_own_times`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.parquet as pq

from recipes.encoding.plan import PLAIN, Variation
from recipes.finetuning.prosody import PROSODY
from slm.corpus import CodedCorpus, CodedRow, CorpusMetadata

OWN_TIMES = {"times_of_copies": "their own"}  # in the plan of a corpus with copies and columns
WORD_FRAMES = "word_frames"
_COPY = re.compile(r"(.+)#([1-9]\d*)", re.DOTALL)  # the id of a varied copy, such as "s1-bbaf2n#3"


def columns_of_copy(columns: Mapping[str, str], variation: Variation, sampling_rate: int) -> dict[str, str]:
    """A recording's columns as they hold for a copy of it.

    Args:
        columns: Texts by name; lists as JSON.
        variation: How the copy differs.
        sampling_rate: Of the audio that is encoded, in Hz.

    >>> said = '[{"word": "bin", "start": 0.1, "end": 0.3}]'
    >>> columns_of_copy({"words": said, "topic": "grid"}, Variation(shift=800, speed=0.5), 16_000)
    {'words': '[{"word": "bin", "start": 0.25, "end": 0.65}]', 'topic': 'grid'}
    """
    if variation == PLAIN:
        return dict(columns)
    silence_s = variation.shift / sampling_rate

    def moved(name: str, item: dict[str, Any]) -> dict[str, Any]:
        if name == PROSODY:  # the logarithm of a length over the usual one
            return item | {
                key: round(value - math.log(variation.speed), 4) for key, value in _numbers(item, "duration")
            }
        times = _numbers(item, "start", "end")
        return item | {key: round(silence_s + value / variation.speed, 4) for key, value in times}

    def own(name: str, value: str) -> str:
        if name == WORD_FRAMES:
            return ""
        items = _objects(value)
        changed = [moved(name, item) for item in items]
        return value if changed == items else json.dumps(changed, ensure_ascii=False)

    return {name: own(name, value) for name, value in columns.items()}


def _objects(value: str) -> list[dict[str, Any]]:
    """The objects that a column lists as JSON; none where it is another text."""
    try:
        items = json.loads(value) if value.startswith("[") else []
    except ValueError:
        return []
    return items if all(isinstance(item, dict) for item in items) else []


def _numbers(item: Mapping[str, Any], *keys: str) -> list[tuple[str, float]]:
    """The values of `keys`; none where one of them is no number."""
    found = [(key, item[key]) for key in keys if isinstance(item.get(key), int | float)]
    return found if len(found) == len(keys) else []


def copies_have_own_times(metadata: CorpusMetadata) -> bool:
    """Whether the columns of every row are of the row's own speech; False only of corpora with copies from before."""
    return metadata.plan.get("copies", 1) == 1 or OWN_TIMES.items() <= metadata.plan.items()


def plain_rows(corpus: CodedCorpus, split: str) -> Iterator[CodedRow]:
    """A split's recordings as they are, without the varied copies of them."""
    varied = varied_copies(corpus, split)
    return (row for row in corpus.rows(split) if row["id"] not in varied)


def varied_copies(corpus: CodedCorpus, split: str) -> set[str]:
    """Ids of the varied copies that `slm encode` made of the train split; a recording's own id may end in #1 too."""
    copies = corpus.metadata.plan.get("copies", 1) if split == "train" else 1
    if copies == 1:
        return set()
    shards = [corpus.folder / shard["name"] for shard in corpus.index["splits"][split]["shards"]]
    ids = {name for shard in shards for name in pq.read_table(shard, columns=["id"])["id"].to_pylist()}
    found = ((name, _COPY.fullmatch(name)) for name in ids)
    # A copy's plain one stands beside it, so this never leaves a split empty.
    return {name for name, parts in found if parts and parts[1] in ids and int(parts[2]) < copies}
