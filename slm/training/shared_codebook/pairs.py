"""Recordings and their transcripts in a packed batch, and the states of both in a layer of the LLM.

Shapes: R rows of length L; N pairs, F codes of a recording, T tokens of its text, at most; D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slm.model.freezing import decoder_layers
from slm.tasks.sequences import IGNORE
from slm.training.batches import Batch
from slm.training.config import TrainingError
from slm.vocabulary import TRANSCRIBE, SpeechVocabulary

KEY = "training.shared_codebook"
ASR = "asr"


@dataclass(frozen=True)
class Pair:
    """A transcribed recording: its row, where its codes stand, and the ids of its text."""

    row: int
    speech: range
    text: Tensor


def pairs_of(batch: Batch, vocabulary: SpeechVocabulary) -> list[Pair]:
    """The ASR sequences of a batch, in its order; none that lacks codes or text."""
    ids, labels, positions = (batch[name] for name in ("input_ids", "labels", "position_ids"))
    found = []
    for row, place in (ids == vocabulary.mark_id(TRANSCRIBE)).nonzero().tolist():
        start = place - int(positions[row, place])
        before = ids[row, start:place]
        opened, closed = ((before == i).nonzero() for i in (vocabulary.speech_id, vocabulary.speech_end_id))
        answer = labels[row, place:]
        first = int((answer != IGNORE).int().argmax())
        end = (answer[first:] == vocabulary.end_id).nonzero()
        if not (len(opened) and len(closed) and len(end)):
            continue
        text = answer[first : first + int(end[0])]
        speech = range(start + int(opened[0]) + 1, start + int(closed[-1]))
        if len(speech) and len(text):
            found.append(Pair(row, speech, text))
    return found


@contextmanager
def layer_states(model: PreTrainedModel, layer: int) -> Iterator[list[Tensor]]:
    """While open, tells the states (R, L, D) behind a layer, counted from 1, of the model's newest forward pass.

    Raises:
        TrainingError: The model has no such layer.
        ModelError: It keeps its layers under a name that is not known.
    """
    layers = decoder_layers(model, KEY)
    if layer > len(layers):
        raise TrainingError(f"{KEY}.layer: {layer}, and the model has {len(layers)} layers")
    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        states[:] = [output[0] if isinstance(output, tuple) else output]

    handle = layers[layer - 1].register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


def speech_states(states: Tensor, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """The states (N, F, D) of the pairs' codes in those of the batch (R, L, D), and their mask (N, F)."""
    return _padded([states[pair.row, pair.speech.start : pair.speech.stop] for pair in pairs])


def text_states(
    model: PreTrainedModel, vocabulary: SpeechVocabulary, pairs: Sequence[Pair], layer: int
) -> tuple[Tensor, Tensor]:
    """The states (N, T, D) of the pairs' texts, each read alone as a prompt begins, and their mask (N, T)."""
    device = pairs[0].text.device
    before = torch.tensor(list(vocabulary.before), dtype=torch.int64, device=device)
    ids, mask = _padded([torch.cat([before, pair.text]) for pair in pairs])
    with layer_states(model, layer) as states:
        model.get_decoder()(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    return states[0][:, len(before) :], mask[:, len(before) :]


def _padded(items: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Items (n, ...) of several lengths as one tensor, 0 behind each, and their mask."""
    lengths = torch.tensor([len(item) for item in items], device=items[0].device)
    padded = nn.utils.rnn.pad_sequence(list(items), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None]
