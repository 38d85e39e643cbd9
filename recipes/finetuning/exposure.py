"""What a fine-tuning sees, step by step: tokens, seconds of speech, model FLOPs; and the steps that make them equal.

Shapes: N samples (an utterance in one task each), T optimizer steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedModel

from recipes.finetuning.config import Config
from recipes.finetuning.corpora import Corpora, open_corpora
from recipes.finetuning.data import Data, longest_sequence, make_data
from recipes.finetuning.estimates import lora_parameters
from recipes.finetuning.vocabulary import make_vocabulary
from slm.model.freezing import decoder_layers, freeze_other_towers
from slm.model.modeling import LLMFacts, describe_llm
from slm.model.speech_rows import rows_needed
from slm.training.batches import plan_steps, with_steps
from slm.training.samples import Samples, SpeechSamples
from slm.vocabulary import SpeechVocabulary

Quantity = Literal["steps", "tokens", "audio_seconds", "flops"]
QUANTITIES: tuple[Quantity, ...] = ("steps", "tokens", "audio_seconds", "flops")


@dataclass(frozen=True)
class TrainingCost:
    """What a model's training computes.

    A parameter that a token passes takes 2 FLOPs forward, 2 for the gradient of its input and, where it is trained, 2
    for its own (Kaplan et al. 2020, arXiv 2001.08361, section 2.1). Attention's two products take 4 d a pair of
    positions forward and twice that backward (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), of the pairs that a
    causal mask, and a layer's window, let through.

    Attributes:
        per_token: FLOPs a token but for attention: 6 a trained parameter, 4 a frozen one.
        layers: of each layer the width d of its queries and its window in tokens (None: all that came before).
    """

    per_token: float
    layers: tuple[tuple[int, int | None], ...]

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """FLOPs of training on sequences of these lengths once; (N,) int64 -> (N,) float64.

        >>> TrainingCost(6.0, ((8, None),)).of(np.array([1, 3])).tolist()
        [102.0, 594.0]
        """
        length = lengths.astype(np.float64)
        found = self.per_token * length
        for width, window in self.layers:
            short = length if window is None else np.minimum(length, window)
            pairs = short * (short + 1) / 2 + (length - short) * short
            found += 12 * width * pairs
        return found


@dataclass(frozen=True)
class Amounts:
    """How much a training sees in its first steps."""

    steps: int
    tokens: int
    audio_seconds: float
    flops: float
    epochs: float


@dataclass(frozen=True)
class Exposure:
    """A training's samples, and in which order its steps see them.

    Attributes:
        tokens: (N,) int64 length of each sample.
        audio_seconds: (N,) seconds of speech that it holds.
        flops: (N,) of training on it once.
        repeats: (N,) how often an epoch sees each on average; None: once.
        tokens_per_step: what a step may hold.
        seed: decides the order.
        steps: what the configuration asks for.
    """

    tokens: np.ndarray
    audio_seconds: np.ndarray
    flops: np.ndarray
    tokens_per_step: int
    seed: int
    steps: int
    repeats: np.ndarray | None = None

    def by_step(self, steps: int) -> dict[str, np.ndarray]:
        """The sums of each quantity over the first steps, (T,) each."""
        plan = plan_steps(self.tokens, self.tokens_per_step, steps, self.seed, self.repeats)
        parts = {"tokens": self.tokens, "audio_seconds": self.audio_seconds, "flops": self.flops}
        parts["samples"] = np.ones(len(self.tokens))
        found = {name: np.cumsum([part[step].sum() for step in plan]) for name, part in parts.items()}
        return found | {"steps": np.arange(1, steps + 1)}

    def amounts(self, steps: int) -> Amounts:
        """What the first steps hold."""
        sums = {name: part[-1] for name, part in self.by_step(steps).items()}
        epoch = len(self.tokens) if self.repeats is None else float(self.repeats.sum())
        tokens, seconds = round(sums["tokens"]), float(sums["audio_seconds"])
        return Amounts(steps, tokens, seconds, float(sums["flops"]), float(sums["samples"]) / epoch)

    def steps_for(self, quantity: Quantity, target: float) -> int:
        """The number of steps, at least 1, after which a quantity is closest to ``target``.

        Raises:
            ValueError: no step holds any of it, as a training on text alone holds no speech.
        """
        if quantity == "steps":
            return max(1, round(target))
        if not getattr(self, quantity).sum() > 0:
            raise ValueError(f"fairness: {quantity}: this training holds none")
        planned = 64
        while (sums := self.by_step(planned)[quantity])[-1] < target:
            planned *= 2
        at = int(np.searchsorted(sums, target))  # the first whose sum reaches it
        if at and target - sums[at - 1] <= sums[at] - target:
            at -= 1
        return at + 1


def training_cost(skeleton: PreTrainedModel, vocabulary: SpeechVocabulary, config: Config) -> TrainingCost:
    """What training the grown model costs.

    The parameters that a token passes: those of the text model and its head. An embedding table that is not the head is
    only looked up, and of a mixture's experts those count that a token is sent to. The head counts for every token.

    Args:
        skeleton: the model before it is grown, on the meta device.
        vocabulary: what it is grown by.
        config: of the fine-tuning: in full, or by LoRA.
    """
    freeze_other_towers(skeleton)
    sizes = skeleton.config.get_text_config()
    embedding, head = skeleton.get_input_embeddings().weight, skeleton.get_output_embeddings()
    experts = getattr(sizes, "num_experts", None) or getattr(sizes, "num_local_experts", None) or 1
    share = getattr(sizes, "num_experts_per_tok", None) or experts
    tied = head is not None and head.weight is embedding
    passed = 0.0
    for name, parameter in skeleton.named_parameters():
        if parameter.requires_grad and (tied or parameter is not embedding):
            passed += parameter.numel() * (share / experts if ".experts." in name else 1)
    grown = (rows_needed(embedding.shape[0], vocabulary) - embedding.shape[0]) * embedding.shape[1]
    grown += sum(vocabulary.further_sizes) * embedding.shape[1]  # heads of books beside the ids
    if config.training.multi_token is not None:  # a block each, and the rows of speech again
        rows = vocabulary.speech_rows
        passes = config.training.multi_token.tokens - 1
        grown += passes * embedding.shape[1] * (embedding.shape[1] + rows.stop - rows.start)
    if config.lora is None:
        lower = decoder_layers(skeleton)[: config.training.freeze_layers] if config.training.freeze_layers else ()
        frozen = sum(parameter.numel() for layer in lower for parameter in layer.parameters())
        per_token = 6 * (passed + grown) - 2 * frozen  # the new rows' gradient passes them
    else:
        new_rows = len(vocabulary.new_ids) * embedding.shape[1]
        trained = lora_parameters(skeleton, config.lora) + new_rows
        frozen = passed + grown - new_rows
        per_token = 6 * trained + 4 * frozen
    return TrainingCost(per_token, tuple(_layers(sizes)))


def _layers(sizes: object) -> list[tuple[int, int | None]]:
    """(width of the queries, window) of each layer of a text model's configuration."""
    heads = getattr(sizes, "num_attention_heads", None) or 1
    width = heads * (getattr(sizes, "head_dim", None) or sizes.hidden_size // heads)
    kinds = getattr(sizes, "layer_types", None) or ["full_attention"] * sizes.num_hidden_layers
    window = getattr(sizes, "sliding_window", None)
    return [(width, window if kind == "sliding_attention" else None) for kind in kinds]


def exposure_of(config: Config) -> Exposure:
    """What a fine-tuning of this configuration sees; its corpus and model must be there.

    Seconds of speech follow from a sample's frames and the corpus's own seconds per frame, since a recording's last
    frame is padded. Noise, which drops frames in training, is left out.

    Raises:
        ConfigError, CorpusError, ModelError: they are not.
    """
    corpora, facts = open_corpora(config), describe_llm(config.model, config.training.attention)
    vocabulary = make_vocabulary(config, corpora, facts.tokenizer, facts.vocabulary)
    data = make_data(config, corpora, facts.tokenizer, vocabulary, longest_sequence(config, facts.config))
    return exposure_of_data(config, corpora, facts, data)


def exposure_of_data(config: Config, corpora: Corpora, facts: LLMFacts, data: Data) -> Exposure:
    """`exposure_of` where the corpora are open and their sequences made."""
    splits = [corpus.index["splits"]["train"] for corpus in corpora.opened]
    seconds_per_frame = sum(split["duration_s"] for split in splits) / sum(split["frames"] for split in splits)
    samples: Samples = data.all_train
    seconds = _frames(data.train) * seconds_per_frame
    if len(samples.lengths) > len(seconds):  # replayed text stands behind
        seconds = np.concatenate([seconds, np.zeros(len(samples.lengths) - len(seconds))])
    training = with_steps(config.training, samples)
    flops = training_cost(facts.skeleton, data.vocabulary, config).of(samples.lengths)
    order = (training.tokens_per_step, config.seed, training.steps, samples.repeats)
    return Exposure(samples.lengths, seconds, flops, *order)


def _frames(samples: SpeechSamples) -> np.ndarray:
    return np.array([samples.utterances[member].codes.shape[1] for member in samples.members], dtype=np.float64)


def equal_amounts(
    exposures: Mapping[str, Exposure], reference: str, quantity: Quantity, known: float | None = None
) -> dict[str, Amounts]:
    """The steps of each training with which all see as much as the reference does, and what else they then see.

    Args:
        exposures: by cell.
        reference: the cell that trains as it is configured.
        quantity: what is to be equal.
        known: how much of it the reference sees, where that was found before; None: found here.
    """
    if known is None:
        own = exposures[reference]
        known = getattr(own.amounts(own.steps), quantity)
    found = {}
    for cell, exposure in exposures.items():
        steps = exposure.steps if cell == reference else exposure.steps_for(quantity, known)
        found[cell] = exposure.amounts(steps)
    return found
