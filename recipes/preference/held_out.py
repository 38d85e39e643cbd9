"""What is watched while a judge is learnt from: another judge, the distance from the start, lengths, and ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from eval.judges.judge import Judge
from eval.text.normalisers import get_normaliser
from recipes.preference.config import Config
from recipes.preference.samples import Speaker, hear, judged
from recipes.preference.texts import Text
from slm.training.preference.reference import Reference, answer_logits


def held_out_figures(
    config: Config,
    texts: Sequence[Text],
    speaker: Speaker,
    judge: Judge,
    second_judge: Judge,
    reference: Reference,
) -> Callable[[nn.Module], dict[str, float]]:
    """A measure of the Trainer's evaluations, of the held-out texts, each spoken with the same seed each time.

    Word and character errors of both judges in per cent; `reward` as it is learnt from; `kl`, the divergence of the
    model's next token from the start's, in nats a token of the answers; `length_ratio`, their mean duration to what is
    expected; and how many in 1,000 were cut off (`truncated`), a loop, or silent, and how many any of these or not
    finite (`stop_failures`).
    """
    normalise = get_normaliser(config.normaliser)

    def measure(model: nn.Module) -> dict[str, float]:
        spoken = speaker.speak(model, texts, config.decoding, [text.said for text in texts])
        found: dict[str, float] = {}
        for name, one in (("judge", judge), ("second_judge", second_judge)):
            rates = hear(one, speaker, spoken, texts, normalise)
            found |= {f"{name}_wer": round(100 * rates.wer, 3), f"{name}_cer": round(100 * rates.cer, 3)}
            if one is judge:
                samples = judged(config.reward, speaker, spoken, texts, rates)
        found["reward"] = float(np.mean([sample.reward for sample in samples]))
        ratios = [sample.length_ratio for sample in samples if sample.length_ratio is not None]
        if ratios:
            found["length_ratio"] = float(np.mean(ratios))
        faults = {
            "truncated": [sample.finish_reason == "length" for sample in samples],
            "loop": [sample.finish_reason == "loop" for sample in samples],
            "silent": [sample.silent for sample in samples],
            "stop_failures": [sample.failed for sample in samples],
        }
        found |= {f"{name}_per_1000": 1000 * float(np.mean(flags)) for name, flags in faults.items()}
        divergences = []
        with reference.scorer(model) as start:
            for text, sample in zip(texts, samples, strict=True):
                example = speaker.example(text, sample)
                policy = answer_logits(model, example, speaker.device).log_softmax(-1)
                other = start.logits(example).log_softmax(-1)
                divergences.extend((policy.exp() * (policy - other)).sum(-1).tolist())
        if divergences:
            found["kl"] = float(np.mean(divergences))
        return found

    return measure
