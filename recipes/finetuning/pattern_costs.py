"""What a second of speech costs an LLM by each pattern: positions, rows, arithmetic, and the cache of keys and values.

By the model's shape alone (arithmetic, not a measurement): two operations a position for each weight of the layers and
of the heads, without attention's own products, which grow with what has been said; caches are in the precision's width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from slm.model.modeling import LLMFacts
from slm.model.speech_rows import rows_needed
from slm.patterns import LATE, PATTERNS, resolve_pattern
from slm.vocabulary import SpeechVocabulary

RATES_HZ = (25.0, 12.5, 6.25)


def pattern_costs(
    facts: LLMFacts, vocabulary: SpeechVocabulary, sizes: Sequence[int], precision: str
) -> dict[str, dict[str, object]]:
    """Of each pattern what a second of speech costs.

    Args:
        facts: Of the LLM.
        vocabulary: Of the model that is trained; `semantic` is shown for one codebook, the others for as many as it
            uses, or for all of the tokenizer's where it uses one.
        sizes: Entries of the speech tokenizer's codebooks.
        precision: As the model computes.
    """
    n_books = vocabulary.n_codebooks if vocabulary.n_codebooks > 1 else len(sizes)
    shown = {}
    for name in PATTERNS:
        n = 1 if name == "semantic" else n_books
        if name != "semantic" and n < 2:
            continue
        pattern = resolve_pattern(name, n)
        own = tuple(sizes[: 1 if pattern.n_streams > 1 else n])
        further = tuple(sizes[len(own) : n])
        other = dataclasses.replace(vocabulary, codebook_sizes=own, further_sizes=further, late=LATE.get(name, 1))
        per_second = vocabulary.frame_rate * other.ids_per_frame
        shown[name] = {
            "codebooks": n,
            "positions per s": per_second,
            "vocabulary rows": rows_needed(_text_rows(facts), other),
            "rows beside it": sum(further),
            "GFLOPs per s": round(per_second * _flops(facts, other) / 1e9, 3),
            "KV cache KiB per s": round(cache_bytes_per_second(facts, other, precision) / 1024, 1),
        }
    return shown


def costs_at_rates(
    facts: LLMFacts, vocabulary: SpeechVocabulary, sizes: Sequence[int], precision: str
) -> dict[str, dict[str, str]]:
    """A line for each frame rate of the embedded tokenizers and each pattern; arguments as of `pattern_costs`."""
    shown = {}
    for rate in RATES_HZ:
        of_rate = pattern_costs(facts, dataclasses.replace(vocabulary, frame_rate=rate), sizes, precision)
        shown[f"{rate:g} Hz"] = {
            name: f"{cost['positions per s']:g} positions, {cost['GFLOPs per s']:g} GFLOPs, "
            f"{cost['KV cache KiB per s']:g} KiB of cache a second"
            for name, cost in of_rate.items()
        }
    return shown


def _text_rows(facts: LLMFacts) -> int:
    """Rows of the embedding table before speech: of a model that speaks already at least those of its text."""
    rows = facts.skeleton.get_input_embeddings().weight.shape[0]
    return rows if facts.vocabulary is None else facts.vocabulary.first_id


def _flops(facts: LLMFacts, vocabulary: SpeechVocabulary) -> int:
    """Of one position: the layers and the heads."""
    table, decoder = facts.skeleton.get_input_embeddings(), facts.skeleton.get_decoder()
    tables = {id(table.weight), id(facts.skeleton.get_output_embeddings().weight)}
    layers = sum(p.numel() for p in decoder.parameters() if id(p) not in tables)
    rows = rows_needed(_text_rows(facts), vocabulary) + sum(vocabulary.further_sizes)
    return 2 * (layers + rows * table.weight.shape[1])


def cache_bytes_per_second(facts: LLMFacts, vocabulary: SpeechVocabulary, precision: str = "bf16") -> float:
    """Keys and values that a second of speech takes of an LLM that runs."""
    return vocabulary.frame_rate * vocabulary.ids_per_frame * _cache_bytes(facts, precision)


def _cache_bytes(facts: LLMFacts, precision: str) -> int:
    """Of one position: a key and a value of each layer."""
    sizes = facts.config.get_text_config()
    heads = getattr(sizes, "num_attention_heads", None)
    if not heads:
        return 0  # a state in the cache's place
    width = getattr(sizes, "head_dim", None) or sizes.hidden_size // heads
    kept = getattr(sizes, "num_key_value_heads", None) or heads
    return 2 * sizes.num_hidden_layers * kept * width * (4 if precision == "fp32" else 2)
