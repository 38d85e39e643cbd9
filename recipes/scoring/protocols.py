"""What ``protocol=NAME`` stands for, settled with the keys beside it; and what of the inputs stands in the record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.judges.config import JudgeConfig
from eval.protocol_presets import get_preset
from eval.stats import ENOUGH_SPEAKERS
from eval.text.normalisers import Normaliser, get_normaliser, unsegmented
from recipes.config import ConfigError
from recipes.runs.machine import machine_text
from recipes.runs.run_folder import describe_run
from tokenizer.data.utterances import RowAudio, Utterance

__all__ = ["Settled", "audio_files_sha256", "made_with", "resampled", "settle", "unsegmented_note"]

DEFAULT_NORMALISER = "basic"
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Settled:
    """Judges, normaliser and rules of a score, however they were given; fields as in `eval.protocol.Protocol`."""

    judges: list[JudgeConfig]
    normaliser: Normaliser
    name: str = ""
    reference: str = "text"
    official: str = ""
    alignment: str = "jiwer"
    notes: list[str] = field(default_factory=list)

    @property
    def needs_text(self) -> bool:
        """Whether recordings need transcripts: not where what the judge hears in them is the reference."""
        return self.reference == "text"

    def rules(self, judged: bool) -> dict[str, Any]:
        """What goes into a row's protocol; its name says so where no judge read what the protocol's judge would."""
        return {
            "normaliser": self.normaliser.name,
            "normaliser_version": self.normaliser.version,
            "name": self.name if judged or not self.name else f"{self.name}, texts as given",
            "official": self.official,
            "alignment": self.alignment,
        }


def settle(protocol: str | None, judges: Sequence[JudgeConfig], normaliser: str) -> Settled:
    """The settings themselves, or those of a protocol by name.

    Raises:
        ConfigError, ValueError: no such protocol or normaliser, or a key beside ``protocol`` that contradicts it.
    """
    if protocol is None:
        return Settled(list(judges), get_normaliser(normaliser))
    preset = get_preset(protocol)
    if normaliser not in (DEFAULT_NORMALISER, preset.normaliser):
        raise ConfigError(
            f"normaliser={normaliser} beside protocol={protocol}, whose own is {preset.normaliser}: leave one out"
        )
    name, judge = preset.apply(judges)
    differs = f"; done otherwise here: {preset.differs}" if preset.differs else ""
    note = f"protocol {name}: {preset.about} (after {preset.source}){differs}"
    return Settled([judge], get_normaliser(preset.normaliser), name, preset.reference, preset.official, notes=[note])


def resampled(asked: str, n_speakers: int | None, way_out: str) -> str:
    """What the bootstrap draws, "utterances" or "speakers".

    Raises:
        ConfigError: speakers are asked for and there are none to draw; the message names the way out.
    """
    if asked == "speakers" and (n_speakers or 0) < 2:
        found = "one speaker alone" if n_speakers else "utterances whose speaker is not known"
        raise ConfigError(f"resample=speakers: the test set has {found}; {way_out}, or set resample=utterances")
    enough = (n_speakers or 0) >= ENOUGH_SPEAKERS
    return "speakers" if asked == "speakers" or (asked == "auto" and enough) else "utterances"


def unsegmented_note(texts: Sequence[str], normaliser: Normaliser) -> list[str]:
    """A warning where sentences of a script without spaces count as one word each."""
    found = unsegmented(normaliser(text) for text in texts)
    if found * 10 < len(texts) or not found:
        return []
    return [
        f"in {found} of {len(texts)} references a sentence, or much of one, is one word, as scripts without spaces are "
        "written: it is right or wrong as a whole. Read the CER, or take each character as a word with "
        "normaliser=basic:zh (basic:ja, basic:yue)"
    ]


def audio_files_sha256(utterances: Iterable[Utterance]) -> str:
    """Digest of the recordings' files as they are stored, by id; their order does not matter."""
    found = sorted(f"{utterance.id}\0{_sha256(utterance.audio)}" for utterance in utterances)
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def _sha256(audio: str | bytes | RowAudio) -> str:
    """Of one recording; "absent" where its file is."""
    if isinstance(audio, RowAudio):
        data, path = audio.read()
        audio = data if data is not None else str(path)
    if isinstance(audio, bytes):
        return hashlib.sha256(audio).hexdigest()
    if not Path(audio).is_file():
        return "absent"
    digest = hashlib.sha256()
    with Path(audio).open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def made_with(config: Any) -> dict[str, str]:
    """Versions of the libraries, the project's commit and the machine, as they stand in results."""
    record = describe_run(config)
    commit = {"commit": record["commit"]} if record["commit"] else {}
    return {**record["versions"], **commit, "machine": machine_text(record)}
