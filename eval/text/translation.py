"""BLEU and chrF of translations, by sacrebleu, with the signature that makes them comparable."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.text.wer import UtteranceErrors

__all__ = ["TranslationScores", "can_score_translations", "score_translations"]


@dataclass(frozen=True)
class TranslationScores:
    """Corpus scores from 0 to 100, higher is better, with 95 % bootstrap intervals.

    ``bleu_signature`` and ``chrf_signature`` are sacrebleu's: only scores of equal ones may be compared.
    """

    bleu: float
    bleu_interval: tuple[float, float]
    bleu_signature: str
    chrf: float
    chrf_interval: tuple[float, float]
    chrf_signature: str


def can_score_translations() -> bool:
    """Whether sacrebleu is installed."""
    return importlib.util.find_spec("sacrebleu") is not None


def score_translations(
    utterances: Sequence[UtteranceErrors], speakers: Sequence[str] | None = None, samples: int = 1000, seed: int = 0
) -> TranslationScores:
    """BLEU and chrF2 of hypotheses against one reference each (arXiv 1804.08771), both as they were normalised.

    Published figures are of texts as they are written, in case and punctuation: those of the normaliser `none`. An
    utterance without an answer counts as an empty one. Of scripts without spaces a normaliser that parts characters
    (`basic:zh`) gives BLEU over characters.

    Args:
        utterances: what was scored, normalised (U,); at least one.
        speakers: who spoke each (U,), where the bootstrap draws speakers; None: it draws utterances.
        samples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ModuleNotFoundError: sacrebleu is not installed (:func:`can_score_translations`).
    """
    from sacrebleu.metrics import BLEU, CHRF

    hypotheses, references = [u.hypothesis or "" for u in utterances], [u.reference for u in utterances]
    found: list[Any] = []
    for metric in (BLEU(), CHRF()):
        score = metric.corpus_score(hypotheses, [references]).score
        # sacrebleu's own bootstrap draws no speakers, and fails (2.6.0) where a resample has no n-gram in common.
        counts = np.array(metric._extract_corpus_statistics(hypotheses, [references]))
        if speakers is not None:
            _, who = np.unique(np.asarray(speakers), return_inverse=True)
            counts = np.stack([counts[who == one].sum(axis=0) for one in range(who.max() + 1)])
        rng = np.random.default_rng(seed)
        drawn = (counts[rng.integers(len(counts), size=len(counts))].sum(axis=0) for _ in range(samples))
        scores = [metric._compute_score_from_stats(total.tolist()).score for total in drawn]
        low, high = np.percentile(scores, [2.5, 97.5])
        found += [round(float(score), 3), (round(float(low), 3), round(float(high), 3)), str(metric.get_signature())]
    return TranslationScores(*found)
