"""Whether an exported model still does what its source did: codes or transcripts, compared on a few recordings.

Shapes: codes (K, F); waveforms (S,).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eval.judges.config import JudgeConfig
from eval.judges.judge import load_judge
from recipes.config import ConfigError
from recipes.encoding.encoder import encode_batch
from recipes.runs.inputs import source_name
from tokenizer import load_tokenizer
from tokenizer.data.audio import load_audio
from tokenizer.data.manifest import read_source
from tokenizer.data.utterances import SPLITS, DataSource, Utterance
from tokenizer.teacher.whisper import WHISPER_RATE_HZ


@dataclass
class Agreement:
    """What stayed equal. ``fractions`` are fractions: one for each book of a tokenizer, one of a recogniser's texts."""

    what: str  # "codes" or "transcripts"
    data: str
    n_recordings: int
    n_compared: int  # code frames, or texts
    fractions: list[float]

    def text(self) -> str:
        """One sentence for people."""
        of = f"{self.n_recordings} recordings of {self.data}"
        if self.what == "transcripts":
            return f"After rounding, {100 * self.fractions[0]:.1f} % of the transcripts are the same ({of})."
        books = ", ".join(f"{100 * fraction:.2f}" for fraction in self.fractions)
        frames = f"{self.n_compared} frames"
        return f"After rounding, this share of the codes is the same, per book: {books} % ({frames}, {of})."


def some_recordings(manifest: str, limit: int) -> tuple[list[Utterance], str]:
    """The first recordings of the last split that a source has, and its name. Raises ConfigError, DataError."""
    for split in reversed(SPLITS):
        if found := read_source(DataSource(path=manifest), split)[:limit]:
            return found, f"{source_name(manifest)} {split}"
    raise ConfigError(f"check: {manifest} has no recordings")


def compare_codes(source: Path, exported: Path, manifest: str, limit: int) -> Agreement:
    """Encodes recordings with both tokenizers in fp32. Raises ConfigError, DataError, AudioError."""
    utterances, data = some_recordings(manifest, limit)
    one, other = load_tokenizer(source), load_tokenizer(exported)
    same, total = [0] * len(one.config.codebook_sizes), 0
    for utterance in utterances:
        waveform = load_audio(utterance, one.config.sampling_rate)
        before, after = (encode_batch(model, [waveform], "fp32", "cpu")[0] for model in (one, other))
        for book, agree in enumerate((before == after).sum(axis=1)):
            same[book] += int(agree)
        total += before.shape[1]
    return Agreement("codes", data, len(utterances), total, [count / total for count in same])


def compare_transcripts(source: Path, exported: Path, manifest: str, limit: int) -> Agreement:
    """Reads recordings with both recognisers. Raises ConfigError, DataError, AudioError, JudgeError."""
    utterances, data = some_recordings(manifest, limit)
    audios = [load_audio(utterance, WHISPER_RATE_HZ) for utterance in utterances]
    before, after = (
        load_judge(JudgeConfig(str(folder))).transcribe(audios, WHISPER_RATE_HZ) for folder in (source, exported)
    )
    same = sum(one == other for one, other in zip(before, after, strict=True))
    return Agreement("transcripts", data, len(audios), len(audios), [same / len(audios)])
