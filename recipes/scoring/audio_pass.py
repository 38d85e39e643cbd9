"""One pass over the audio of an evaluation: judges read it, it is measured, what the report plays is written; then it
is gone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile

from eval.judges.transcripts import CachedJudge
from eval.schema import Clip, Row, Sample
from eval.speech.audio import resample
from eval.speech.measures.registry import Measure
from eval.speech.quality import Quality, QualitySummary, compare_audio, summarise_quality
from eval.systems import SYSTEMS, TASK_PREFIX
from eval.text.breakdown import confusions
from eval.text.normalisers import get_normaliser
from eval.text.wer import error_listing, score_pairs
from recipes.runs.files import atomic_write_text, disk_errors
from recipes.scoring.systems import System, SystemAudio

CLIP_HZ = 16_000
COMMONEST = 50  # errors of each kind in a listing
CLIP_S = 60.0  # of a longer recording the beginning is played
MEASURED = (
    "reconstruction",
    "semantic_reconstruction",
    "acoustic_stage",
    "resynthesis",
    "slm-text-aligned",
)  # they run in step with the recording


def spread(ids: Sequence[str], count: int) -> list[str]:
    """So many of them, spread evenly, the first and the last among them."""
    return [ids[k] for k in np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)]


class Players:
    """Clips of a few utterances, as FLAC files (a lossy format would add a codec of its own).

    Args:
        folder: where the files go; earlier ones of such names are replaced, others stay.
        ids: the utterances that are played.

    Attributes:
        cut: whether a recording was longer than what is played of it.
    """

    def __init__(self, folder: Path, ids: Sequence[str]) -> None:
        self.folder, self.ids, self.cut = folder, list(ids), False
        self._files: dict[tuple[str, int], Path] = {}
        folder.mkdir(parents=True, exist_ok=True)
        own = re.compile(rf"\d+-\d+-({'|'.join(map(slug, SYSTEMS))}|{TASK_PREFIX}[a-z0-9.-]+)\.flac")
        for path in folder.iterdir():
            if own.fullmatch(path.name):
                path.unlink()

    def add(self, number: int, system: System, audios: Mapping[str, np.ndarray]) -> None:
        """Write what is to be played of system ``number``'s waveforms (S,)."""
        for i, utterance_id in enumerate(self.ids):
            if (audio := audios.get(utterance_id)) is None:
                continue
            file = self.folder / f"{i}-{number}-{slug(system.kind)}.flac"
            self.cut |= len(audio) > CLIP_S * system.sampling_rate
            audio = audio[: round(CLIP_S * system.sampling_rate)]
            with disk_errors(file):
                soundfile.write(file, np.clip(resample(audio, system.sampling_rate, CLIP_HZ), -1, 1), CLIP_HZ)
            self._files[utterance_id, number] = file

    def samples(self, references: Mapping[str, str], systems: Sequence[System], test_set: str) -> list[Sample]:
        """The utterances with their clips, and what was heard in each; one without any clip is left out.

        Args:
            references: id -> text of the test set.
            systems: what was scored, by the numbers that `take` was given.
            test_set: digest of the test set, since another one may have the same ids.
        """
        samples = []
        for utterance_id in self.ids:
            sample = Sample(utterance_id, references[utterance_id], test_set=test_set)
            for number, system in enumerate(systems):
                if (file := self._files.get((utterance_id, number))) is None:
                    continue
                texts = {judge: str(found.get(utterance_id) or "") for judge, found in system.transcripts.items()}
                if system.kind == "ground_truth":
                    texts |= {s.name: str(s.texts.get(utterance_id) or "") for s in systems if s.answers == "text"}
                sample.clips.append(Clip(system.name, str(file.resolve()), texts))
            if sample.clips:
                samples.append(sample)
        return samples


class Listening:
    """Takes each batch of audio to the judges, the measures and the players.

    Args:
        systems: what is scored.
        judges: they read every system's audio; the texts go to ``System.transcripts``.
        players: what the report plays.
        measures: what is measured of the tokenizer's audio; of synthesised speech what needs no recording, or none that
            it runs in step with; of the recordings what needs none.
    """

    def __init__(
        self,
        systems: Sequence[System],
        judges: Sequence[CachedJudge],
        players: Players,
        measures: Sequence[Measure],
    ) -> None:
        self.systems, self.judges, self.players = list(systems), judges, players
        self._measures = {number: _applicable(measures, system) for number, system in enumerate(systems)}
        self._quality: dict[int, dict[str, Quality]] = {number: {} for number, some in self._measures.items() if some}
        for system in systems:
            if system.answers == "speech":
                system.transcripts = {judge.name: {} for judge in judges}

    def add(self, batch: SystemAudio) -> None:
        """All that is done with one batch. Raises JudgeError, OSError (a full disk)."""
        system = batch.system
        number = next(i for i, known in enumerate(self.systems) if known is system)
        audios = {name: audio for name, audio in batch.audios.items() if audio.size}
        for judge in self.judges:
            system.transcripts[judge.name] |= judge.transcribe(audios, system.sampling_rate, system.name)
        if number in self._quality:
            for name, audio in audios.items():
                recording, rate = batch.recordings.get(name), self.systems[0].sampling_rate
                self._quality[number][name] = compare_audio(
                    recording, audio, rate, system.sampling_rate, self._measures[number]
                )
        self.players.add(number, system, audios)

    def quality(
        self,
        ids: Sequence[str],
        test_set: str,
        samples: int,
        seed: int,
        speakers: Mapping[str, str] | None = None,
    ) -> list[QualitySummary]:
        """The measures of every system that has some, over the test set.

        Args:
            ids: all utterances, in the order of the test set.
            test_set: its name.
            samples: resamples of the bootstrap over clips.
            seed: of the bootstrap.
            speakers: id -> speaker, where those are drawn and not clips.
        """
        who = None if speakers is None else [speakers[i] for i in ids]
        summaries = []
        for number, found in self._quality.items():
            system, clips = self.systems[number], [found.get(i) for i in ids]
            facts = (system.name, system.model, clips, test_set, samples, seed, system.kind, who)
            summaries.append(summarise_quality(*facts, self._measures[number]))
        return summaries


def _applicable(measures: Sequence[Measure], system: System) -> list[Measure]:
    """The measures that say something of a system's audio."""
    if system.answers == "text":
        return []
    if system.kind == "ground_truth":
        return [measure for measure in measures if not measure.needs_reference]
    return [m for m in measures if system.kind in MEASURED or not (m.needs_reference and m.time_aligned)]


def slug(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def write_listings(folder: Path, rows: Sequence[Row]) -> None:
    """``errors-<judge>-<row>-<model>.txt``: every utterance, worst first, then the commonest errors."""
    taken: set[str] = set()
    for row in rows:
        parts = [str(row.protocol.judge.get("name", "")), row.name, row.model]
        rates = score_pairs(
            [u.reference for u in row.utterances],
            [u.hypothesis for u in row.utterances],
            get_normaliser("none"),
            [u.id for u in row.utterances],
        )
        title = ", ".join(part for part in parts if part)
        names = (f"errors-{slug(title)}{number}.txt" for number in ("", *(f"-{n}" for n in range(2, len(rows) + 1))))
        name = next(name for name in names if name not in taken)  # two titles may differ in what a file name leaves out
        taken.add(name)
        common = "".join(f"# {count}\t{text}\n" for text, count in confusions(row.utterances, COMMONEST).lines())
        listing = error_listing(rates, title) + (f"# the commonest errors, times\n{common}" if common else "")
        atomic_write_text(folder / name, listing)
