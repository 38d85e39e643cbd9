"""Joint CTC / attention decoding: the prefix scores against every path there is, and what the judge makes of them."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch

from eval.judges.joint import CTCPrefixScores
from eval.judges.readers import collapse

BLANK, EOS, VOCABULARY, FRAMES = 0, 2, 5, 5


def head(items: int, seed: int = 0) -> torch.Tensor:
    """Log probabilities (B, T, V) of a CTC head that never says the end token."""
    logits = torch.randn(items, FRAMES, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    logits[:, :, EOS] = -1e4
    return logits.log_softmax(-1)


def texts_of(log_probs: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Text -> probability, summed over all paths of one item (T, V)."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(VOCABULARY), repeat=FRAMES):
        p = sum(float(log_probs[t, token]) for t, token in enumerate(path))
        found[tuple(collapse(list(path), BLANK))] += math.exp(p)
    return found


def begins(texts: dict[tuple[int, ...], float], prefix: tuple[int, ...]) -> float:
    return sum(p for text, p in texts.items() if text[: len(prefix)] == prefix)


def test_prefix_scores_are_those_of_all_paths_also_when_beams_change_places() -> None:
    log_probs = head(2)
    texts = [texts_of(item) for item in log_probs]
    scorer = CTCPrefixScores(log_probs, BLANK, EOS, weight=1.0)
    # Two items of two beams; hypotheses repeat a token, fork, and swap rows. The first column is the prompt.
    steps = [
        [(), (), (), ()],
        [(1,), (3,), (4,), (1,)],
        [(3, 1), (1, 1), (1, 3), (1, 1)],
        [(1, 1, 4), (1, 1, 1), (1, 1, 3), (1, 3, 3)],
    ]
    for hypotheses in steps:
        ids = torch.tensor([[EOS, *text] for text in hypotheses])
        gains = scorer(ids, torch.zeros(4, VOCABULARY))
        for row, text in enumerate(hypotheses):
            item = texts[row // 2]
            for token in (1, 3, 4):
                share = begins(item, (*text, token)) / begins(item, text)
                if share == 0:  # more than these frames can say
                    assert float(gains[row, token]) < -1e9
                else:
                    assert float(gains[row, token]) == pytest.approx(math.log(share), abs=1e-4), (text, token)
            assert float(gains[row, EOS]) == pytest.approx(math.log(item[text] / begins(item, text)), abs=1e-4)
            assert float(gains[row, BLANK]) < -1e9


def test_the_weight_shares_between_decoder_and_head() -> None:
    ids, decoder = torch.tensor([[EOS]]), torch.randn(1, VOCABULARY).log_softmax(-1)
    alone = CTCPrefixScores(head(1), BLANK, EOS, 1.0)(ids, decoder)
    mixed = CTCPrefixScores(head(1), BLANK, EOS, 0.25)(ids, decoder)
    assert torch.equal(CTCPrefixScores(head(1), BLANK, EOS, 0.0)(ids, decoder), decoder)
    torch.testing.assert_close(mixed, 0.75 * decoder + 0.25 * alone)
