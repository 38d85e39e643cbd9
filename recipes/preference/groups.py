"""Groups for GRPO: the prompts of the texts, and the answers that the model draws for them at each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch import nn

from eval.judges.judge import Judge
from eval.text.normalisers import get_normaliser
from recipes.preference.config import Config
from recipes.preference.samples import Speaker, hear, judged
from recipes.preference.texts import Text
from slm.training.preference.grpo import Drawn, PromptSamples, Rollout


def prompt_samples(config: Config, texts: Sequence[Text], speaker: Speaker) -> PromptSamples:
    """The texts' prompts, each with how long an answer is expected to be: half its budget where nobody knows."""
    expected, vocabulary = [], speaker.vocabulary
    for text in texts:
        seconds = speaker.expected_s(text)
        if seconds is None:
            most_s = speaker.limits(text, config.sampling).most_s
            seconds = most_s / 2 * (len(text.said.split()) if speaker.task.by_word else 1)
        codes = round(seconds * vocabulary.frame_rate * vocabulary.n_codebooks)
        expected.append(codes + speaker.tokens_beside_codes(text))
    return PromptSamples([speaker.prompt(text) for text in texts], expected, config.grpo.group_size)


def make_rollout(config: Config, texts: Sequence[Text], speaker: Speaker, judge: Judge) -> Rollout:
    """Draws and judges a step's answers; their random streams follow from the seed, the step and the text."""
    size, normalise = config.grpo.group_size, get_normaliser(config.normaliser)

    def rollout(model: nn.Module, step: int, numbers: np.ndarray) -> list[list[Drawn]]:
        asked = [texts[number] for number in numbers for _ in range(size)]
        # Where an epoch ends, a step may hold a text twice; its place there depends on the micro-batches.
        times: Counter[int] = Counter()
        keys = []
        for number in numbers.tolist():
            keys += [f"{texts[number].said}\0{step}\0{times[number]}\0{sample}" for sample in range(size)]
            times[number] += 1
        spoken = speaker.speak(model, asked, config.sampling, keys)
        samples = judged(config.reward, speaker, spoken, asked, hear(judge, speaker, spoken, asked, normalise))
        drawn = [Drawn(speaker.example(text, one), one.reward) for text, one in zip(asked, samples, strict=True)]
        return [drawn[start : start + size] for start in range(0, len(drawn), size)]

    return rollout
