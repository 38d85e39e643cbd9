"""Under which conditions a score holds, and when two scores may be compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Protocol", "TestSet", "pinned_identity", "protocol_differences", "test_set_sha256"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class TestSet:
    """Which utterances were scored.

    ``sha256`` covers their ids and texts; ``audio_sha256`` the recordings' files, None where there are none or an older
    version did not record it.
    """

    name: str
    sha256: str
    n: int
    audio_sha256: str | None = None


@dataclass(frozen=True)
class Protocol:
    """Under which conditions a score holds.

    ``task`` is "speech" (a judge reads audio), or the kind of system whose own text is scored with no judge between:
    "asr" (the transcript of the recordings) or that of a further task. ``judge`` is the identity of
    :class:`eval.judges.judge.Judge`, decoding settings and language included; empty where there is none.
    ``resampled`` is what the intervals' bootstrap draws, "utterances" or "speakers"; ``n_speakers`` is None where the
    test set does not say who speaks in all of its utterances.

    ``name`` is the preset's (:mod:`eval.protocol_presets`), empty where the settings were given one by one: it is for
    people, and compared is what it stands for. ``reference`` says what a hypothesis is held against: the test set's
    "text", or what the "judge" heard in the recording (dWER). ``missing`` says what becomes of an utterance without an
    answer: "deleted", all its words count as missed. ``official`` names how the preset's published number comes about
    where that is another one (:func:`eval.text.wer.official_rate`); it stands beside ours. ``alignment`` is one of
    :data:`eval.text.wer.ALIGNMENTS`; ``dtype`` and ``resampler`` are those of the audio that a judge reads.
    """

    task: str
    judge: dict[str, Any]
    normaliser: str
    normaliser_version: str
    test_set: TestSet
    aggregation: str = "corpus"
    seed: int = 0
    bootstrap_samples: int = 10_000
    resampled: str = "utterances"
    n_speakers: int | None = None
    name: str = ""
    reference: str = "text"
    missing: str = "deleted"
    official: str = ""
    alignment: str = "jiwer"
    dtype: str = "fp32"
    resampler: str = "soxr HQ"

    def interval_text(self) -> str:
        """How intervals come about, for people."""
        speakers = f"{self.n_speakers} speaker{'s' * (self.n_speakers != 1)}"
        units = speakers if self.resampled == "speakers" else "utterances"
        few = f" (of {speakers})" if self.resampled != "speakers" and self.n_speakers else ""
        return f"95 % bootstrap over {units}{few}, {self.bootstrap_samples} resamples, seed {self.seed}"

    def comparable_by(self) -> dict[str, Any]:
        """What has to be equal for two scores to be compared, by the name of the field.

        Whatever pins a judge's weights goes before what it is called: a digest of the files, the commit of a hub model,
        the version of a package. The recordings' digest is left out: an older file does not have it
        (:func:`protocol_differences`).
        """
        fields: dict[str, Any] = {"task": self.task, "reference": self.reference}
        judge = sorted(pinned_identity(self.judge).items())
        fields |= {f"judge.{key}": value for key, value in judge if value is not None}
        if self.judge:
            fields |= {"dtype": self.dtype, "resampler": self.resampler}
        return fields | {
            "normaliser": self.normaliser,
            "normaliser version": self.normaliser_version,
            "alignment": self.alignment,
            "aggregation": self.aggregation,
            "missing": self.missing,
            "test set": self.test_set.sha256,
            "utterances": self.test_set.n,
        }

    def key(self) -> str:
        """Equal for comparable protocols."""
        return json.dumps(self.comparable_by(), sort_keys=True)

    def record(self) -> dict[str, Any]:
        """Everything, nested, for people and files; what does not apply is left out."""
        found = {key: value for key, value in dataclasses.asdict(self).items() if value not in ("", None)}
        for key in () if self.judge else ("judge", "dtype", "resampler"):
            found.pop(key)
        return found


def pinned_identity(judge: dict[str, Any]) -> dict[str, Any]:
    """A judge's identity without its label, where something better says which one it is."""
    by_commit = _COMMIT.fullmatch(str(judge.get("revision") or "")) is not None
    if by_commit or "weights_sha256" in judge:
        names: tuple[str, ...] = ("name", "source")
    elif "source" in judge or judge.get("kind") == "pocketsphinx":
        names = ("name",)
    else:
        names = ()
    return {key: value for key, value in judge.items() if key not in names}


def protocol_differences(mine: Protocol, other: Protocol) -> list[str]:
    """Each field in which two protocols differ, with both values; empty where they may be compared.

    The recordings' digests count where both are known.
    """
    one, two = mine.comparable_by(), other.comparable_by()
    found = [
        f"{key} ({_short(one.get(key))} and {_short(two.get(key))})"
        for key in dict.fromkeys([*one, *two])
        if one.get(key) != two.get(key)
    ]
    audio = mine.test_set.audio_sha256, other.test_set.audio_sha256
    if None not in audio and audio[0] != audio[1]:
        found.append(f"audio of the test set ({_short(audio[0])} and {_short(audio[1])})")
    return found


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def test_set_sha256(pairs: Sequence[tuple[str, str]]) -> str:
    """Digest of (id, text) pairs; their order does not matter."""
    return hashlib.sha256(json.dumps(sorted(pairs), ensure_ascii=False).encode()).hexdigest()


test_set_sha256.__test__ = False  # type: ignore[attr-defined]  # pytest would take these two for tests
TestSet.__test__ = False  # type: ignore[attr-defined]
