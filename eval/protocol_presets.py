"""Evaluation protocols of the field by name: who reads the audio, how texts are normalised, what the number is of.

``protocol=NAME`` of `slm evaluate` and `slm score` takes one. Hub models are pinned to a commit: a score under a name
means the same next year. Where a published protocol does what we would not (leaving missing files out of a mean),
its number is computed as it is published and stands beside ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from eval.judges.config import JudgeConfig, JudgeError

__all__ = ["PRESETS", "ProtocolPreset", "get_preset"]

# What a judge's entry may say beside a preset: where its files are and how it is run, not what it hears.
_OWN_KEYS = ("name", "label", "revision", "batch_size", "batch_seconds", "processes")


@dataclass(frozen=True)
class ProtocolPreset:
    """One protocol.

    ``source`` is what it was read from, ``differs`` what we do otherwise than its authors' code. ``reference`` and
    ``official`` are those of :class:`eval.protocol.Protocol`.
    """

    name: str
    about: str
    source: str
    judge: JudgeConfig
    normaliser: str
    reference: str = "text"
    official: str = ""
    differs: str = ""

    def apply(self, judges: Sequence[JudgeConfig]) -> tuple[str, JudgeConfig]:
        """The protocol's name for the record, and its judge.

        Args:
            judges: none, or one that says where the model's files are (``name``: a folder) and how it is run.

        Returns:
            The name says so where the judge is another one than the preset's.

        Raises:
            JudgeError: several judges, or one whose other settings are not the protocol's.
        """
        if not judges:
            return self.name, self.judge
        if len(judges) > 1:
            raise JudgeError(f"protocol {self.name!r} has one judge; leave `judges` out, or score without `protocol`")
        given = judges[0]
        if given.name == JudgeConfig().name:  # none was named
            given = replace(given, name=self.judge.name)
        own = {key: getattr(given, key) for key in _OWN_KEYS}
        settled = replace(self.judge, **own)
        unset = replace(JudgeConfig(), **own)
        if given not in (settled, unset):
            raise JudgeError(
                f"protocol {self.name!r} says how its judge decodes: beside it a judge takes {', '.join(_OWN_KEYS)} "
                "alone; leave the other keys out, or score without `protocol`"
            )
        if given.name == self.judge.name:
            same = replace(settled, revision=given.revision or self.judge.revision)
            return self.name if same.revision == self.judge.revision else f"{self.name} at {same.revision}", same
        return f"{self.name} with judge {given.name}", settled


_WHISPER = {
    "base": "e37978b90ca9030d5170a5c07aadb050351a65bb",
    "small": "973afd24965f72e36ca33b3055d56a652f456b4d",
    "large-v3": "06f233fe06e710322aca913c1bc4249a0d71fce1",
}


def _whisper(size: str) -> JudgeConfig:
    return JudgeConfig(name=f"openai/whisper-{size}", revision=_WHISPER[size], language="en", no_speech="off")


_SEED_TTS = "github.com/BytedanceSpeech/seed-tts-eval, run_wer.py at 95003fe"
PRESETS = {
    preset.name: preset
    for preset in (
        ProtocolPreset(
            "librispeech-hubert",
            "HuBERT large fine-tuned on LibriSpeech, greedy CTC: WER of synthesised LibriSpeech sentences",
            "the evaluations of VALL-E (arXiv 2301.02111) and its successors",
            JudgeConfig(
                name="facebook/hubert-large-ls960-ft",
                revision="ece5fabbf034c1073acae96d5401b25be96709d8",
                decoding="ctc",
                no_speech="off",
            ),
            "whisper-english",
            differs="papers differ in the normaliser; here Whisper's English one with its spelling table",
        ),
        ProtocolPreset(
            "whisper-large-v3",
            "Whisper large-v3, greedy, English forced, Whisper's English normaliser",
            "arXiv 2212.04356; huggingface.co/openai/whisper-large-v3",
            _whisper("large-v3"),
            "whisper-english",
        ),
        ProtocolPreset(
            "whisper-base",
            "Whisper base, greedy, English forced, Whisper's English normaliser: for machines without a GPU",
            "arXiv 2212.04356; huggingface.co/openai/whisper-base",
            _whisper("base"),
            "whisper-english",
        ),
        ProtocolPreset(
            "dwer-whisper-small",
            "dWER: what Whisper small hears in the output, against what it hears in the recording",
            "FocalCodec (arXiv 2502.04465) and its successors",
            _whisper("small"),
            "whisper-english",
            reference="judge",
        ),
        ProtocolPreset(
            "seed-tts-eval",
            "seed-tts-eval, English: Whisper large-v3, punctuation deleted, mean of the utterances that there are",
            _SEED_TTS,
            _whisper("large-v3"),
            "seed-tts-eval",
            official="mean-of-answered",
            differs="resampled by soxr and not by scipy's FFT; beyond 30 s, where its code stops, the rest is read too",
        ),
        ProtocolPreset(
            "seed-tts-eval-zh",
            "seed-tts-eval, Chinese: Paraformer, simplified characters, characters as words (packages funasr, zhconv)",
            _SEED_TTS,
            JudgeConfig(name="paraformer-zh", no_speech="off"),
            "seed-tts-eval-zh",
            official="mean-of-answered",
            differs="resampled by soxr",
        ),
        ProtocolPreset(
            "f5-tts",
            "F5-TTS's own WER: faster-whisper large-v3 with 5 beams, apostrophes deleted too (package faster-whisper)",
            "github.com/SWivid/F5-TTS, src/f5_tts/eval/utils_eval.py at 362a7a3",
            JudgeConfig(name="faster-whisper:large-v3", num_beams=5, language="en", no_speech="off"),
            "f5-tts",
            official="mean-of-answered",
            differs="computed in fp32 and not in fp16; resampled by soxr",
        ),
        ProtocolPreset(
            "embedded",
            "the recogniser that comes with this project, on the speech that it knows: no download",
            "its card in tokenizer/weights/embedded-recogniser",
            JudgeConfig(name="embedded-recogniser"),
            "basic",
        ),
    )
}


def get_preset(name: str) -> ProtocolPreset:
    """Look a protocol up by name. Raises ValueError where there is none; the message lists those there are."""
    if name not in PRESETS:
        known = "\n  ".join(f"{preset.name}: {preset.about}" for preset in PRESETS.values())
        raise ValueError(f"protocol {name!r} is unknown; there are\n  {known}")
    return PRESETS[name]
