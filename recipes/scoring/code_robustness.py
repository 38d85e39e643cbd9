"""How many frames keep their codes when a recording is changed a little, sent through the codec, or encoded otherwise.

Shapes: B recordings of a batch, S samples, K books, F frames; waveforms (S,), codes (K, F).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from eval.codes.robustness import Agreement, agreement, standard_changes
from eval.speech.audio import length_batches
from recipes.encoding.encoder import encode_batch
from recipes.encoding.plan import durations_of
from recipes.runs.logs import log
from recipes.runs.progress import progress
from tokenizer.data.audio import load_audio
from tokenizer.data.utterances import AudioError, Utterance
from tokenizer.precision import exact_fp32

ROUND_TRIP, ALONE = "codec round trip", "alone, not in a batch"
Pairs = list[tuple[np.ndarray, np.ndarray]]


@exact_fp32()
def measure_robustness(
    tokenizer: Any, utterances: Sequence[Utterance], batch_seconds: float, device: str, seed: int = 0
) -> dict[str, Any]:
    """Agreement with the plain codes in fp32, by change and book; all are encoded in batches of the same length.

    Args:
        tokenizer: any tokenizer behind the codec protocol, on `device`.
        utterances: the recordings; those that cannot be read are counted as failed.
        batch_seconds: padded audio of a batch.
        device: where the tokenizer is.
        seed: of the noise, which differs from recording to recording.

    Returns:
        `changes`: one :class:`Agreement` each; how many recordings were scored and failed; `gaps` for changes that
        this tokenizer does not allow.

    Raises:
        ValueError: no recording can be read.
    """
    pairs: dict[str, Pairs] = {}
    n_scored = n_failed = 0
    for numbers, audios in _batches(utterances, tokenizer.config.sampling_rate, batch_seconds):
        n_failed += len(numbers) - len(audios)
        if not audios:
            continue
        n_scored += len(audios)
        waveforms = list(audios.values())
        plain = encode_batch(tokenizer, waveforms, "fp32", device)
        seeds = [seed * 1_000_003 + number for number in audios]
        for name, codes in _encodings(tokenizer, waveforms, plain, seeds, device):
            pairs.setdefault(name, []).extend(zip(plain, codes, strict=True))
    if not n_scored:
        raise ValueError(f"none of {len(utterances)} recordings can be read")
    found: list[Agreement] = [agreement(name, both) for name, both in pairs.items()]
    gaps = {} if ROUND_TRIP in pairs else {ROUND_TRIP: "the tokenizer has no decoder of all its books"}
    return {"changes": [asdict(item) for item in found], "n_scored": n_scored, "n_failed": n_failed, "gaps": gaps}


def _batches(
    utterances: Sequence[Utterance], sampling_rate: int, batch_seconds: float
) -> Iterator[tuple[list[int], dict[int, np.ndarray]]]:
    """Positions of each batch, and the waveforms by position of those that can be read."""
    plan = length_batches(durations_of(utterances, n_threads=2), batch_seconds)
    for numbers in progress(plan, "codes after changes", len(plan)):
        audios = {}
        for number in numbers:
            try:
                audios[number] = load_audio(utterances[number], sampling_rate)
            except AudioError as error:
                log.warning("counted as failed: %s", error)
        yield numbers, audios


def _encodings(
    tokenizer: Any, waveforms: list[np.ndarray], plain: list[np.ndarray], seeds: Sequence[int], device: str
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Each change's name, and the codes (K, F) of the waveforms (S,) after it."""
    for change in standard_changes(tokenizer.config.hop_length):
        changed = [change.apply(audio, own) for audio, own in zip(waveforms, seeds, strict=True)]
        yield change.name, encode_batch(tokenizer, changed, "fp32", device)
    if "reconstruction" in tokenizer.decode_paths:
        decoded = _decoded(tokenizer, plain, [len(audio) for audio in waveforms], device)
        yield ROUND_TRIP, encode_batch(tokenizer, decoded, "fp32", device)
    yield ALONE, [encode_batch(tokenizer, [audio], "fp32", device)[0] for audio in waveforms]
    yield "bf16, not fp32", encode_batch(tokenizer, waveforms, "bf16", device)


@torch.inference_mode()
def _decoded(tokenizer: Any, codes: list[np.ndarray], lengths: Sequence[int], device: str) -> list[np.ndarray]:
    """Waveforms (S,) of codes (K, F), as long as the recordings were."""
    padded = np.full((len(codes), len(codes[0]), max(item.shape[1] for item in codes)), -1, dtype=np.int64)
    for row, item in enumerate(codes):
        padded[row, :, : item.shape[1]] = item
    samples = tokenizer.decode(torch.from_numpy(padded).to(device)).audio_values[:, 0].float().cpu().numpy()
    return [row[:length] for row, length in zip(samples, lengths, strict=True)]
