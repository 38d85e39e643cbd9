"""The recordings of a test set, read a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from eval.speech.audio import length_batches
from recipes.encoding.plan import durations_of
from recipes.runs.logs import log
from recipes.runs.progress import progress
from recipes.scoring.systems import System
from tokenizer.data.audio import load_audio
from tokenizer.data.utterances import AudioError, Utterance


class Recordings:
    """The recordings themselves.

    Args:
        utterances: the test set.
        sampling_rate: the rate to read them at, in Hz.
        batch_seconds: padded audio of a batch; a longer recording is alone in its batch.
        strict: raise at the first that cannot be read.

    Attributes:
        readable: ids whose header can be read.
        notes: on each that cannot be used, by id.
    """

    def __init__(self, utterances: Sequence[Utterance], sampling_rate: int, batch_seconds: float, strict: bool) -> None:
        self.system = System("ground truth", "ground_truth", "", sampling_rate)
        self.strict, self.batch_seconds, self.notes = strict, batch_seconds, {}
        self.utterances = utterances
        self.durations = durations_of(utterances, n_threads=2)
        self.readable = [u.id for u, duration in zip(utterances, self.durations, strict=True) if duration]

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Waveforms (S,) by id, of like length, about `batch_seconds` of them together.

        Raises:
            AudioError: With ``strict``, at the first recording that cannot be read; without, it is noted and left out.
        """
        most = self.batch_seconds * self.system.sampling_rate
        plan = length_batches(self.durations, self.batch_seconds)
        for planned in progress(plan, "recordings", len(plan)):
            audios = {}
            for utterance in (self.utterances[i] for i in planned):
                try:
                    audios[utterance.id] = load_audio(utterance, self.system.sampling_rate)
                except AudioError as error:
                    if self.strict:
                        raise
                    log.warning("counted as failed: %s", error)
                    self.notes[utterance.id] = f"counted as failed: {error}"
            # A manifest's durations may be wrong: what was read decides.
            names = list(audios)
            for batch in length_batches([len(audios[name]) for name in names], most):
                yield {names[i]: audios[names[i]] for i in batch}

    def read(self, ids: Iterable[str]) -> dict[str, np.ndarray]:
        """Waveforms (S,) of these utterances once more, after `batches`; without those that could not be read."""
        wanted = {*ids} & {*self.readable} - {*self.notes}
        return {u.id: load_audio(u, self.system.sampling_rate) for u in self.utterances if u.id in wanted}
