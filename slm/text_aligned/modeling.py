"""The text-aligned model: speech to one frame of codes per word, and from the text and these back to semantic codes.

Shapes: B items, F frames, L bytes of text, W words, K books of a word, D width, V entries of the semantic book.
`codes` (B, F) are book 0 of the tokenizer's `audio_codes`, -1 in padding; `text` and `word_of_byte` (B, L) as
:mod:`slm.text_aligned.text` spells them, padded with 0 and -1; `word_codes` (B, K, W), -1 in padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from slm.model_folder import ModelFolder
from slm.text_aligned.aggregator import Aggregator, QuantizedWords, WordQuantizer
from slm.text_aligned.configuration import TextAlignedConfig, TextAlignedError
from slm.text_aligned.layers import CausalDecoder, Reader
from slm.text_aligned.text import BYTES, bytes_from_words, words_from_bytes


@dataclass
class TextAlignedOutput(ModelOutput):
    """The training's loss, and its parts in nats: of a code, of the quantizer, of attention outside a word's frames."""

    loss: Tensor | None = None
    code_loss: Tensor | None = None
    quantizer_loss: Tensor | None = None
    alignment_loss: Tensor | None = None


@dataclass
class ReadText:
    """A text as the model has read it: states (B, L, D), which bytes are no padding (B, L), and each byte's word."""

    states: Tensor
    mask: Tensor
    word_of_byte: Tensor


class TextAlignedModel(PreTrainedModel):
    """Encoder, aggregator, quantizer and decoder (TASTE, arXiv 2504.07053), over semantic codes in place of audio.

    The decoder reads the text's bytes, to each of which its word's vector is added, and rebuilds the codes from left to
    right. `no_speech` stands in the place of all words' vectors where there are none: then it speaks from text alone.
    """

    config_class = TextAlignedConfig
    base_model_prefix = "text_aligned"
    main_input_name = "codes"
    _no_split_modules = ["TransformerEncoderLayer", "TransformerDecoderLayer"]

    def __init__(self, config: TextAlignedConfig) -> None:
        super().__init__(config)
        width, n_codes = config.hidden_size, config.codebook_size
        self.bytes = nn.Embedding(BYTES, width)
        self.codes = nn.Embedding(n_codes + 1, width)  # the last begins a sequence where it is read, ends it where said
        self.text_reader = Reader(config, config.text_layers, config.max_bytes)
        self.speech_reader = Reader(config, config.speech_layers, config.max_frames)
        self.aggregator = Aggregator(config)
        self.quantizer = WordQuantizer(config)
        self.no_speech = nn.Parameter(torch.zeros(width))
        self.decoder = CausalDecoder(config, config.max_frames + 1)
        self.bias = nn.Parameter(torch.zeros(n_codes + 1))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Torch's own for all but the tables, whose rows are head and input at once.
        if isinstance(module, nn.Embedding) and module.embedding_dim == self.config.hidden_size:
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)

    def encode_text(self, text: Tensor, word_of_byte: Tensor) -> ReadText:
        """Reads texts (B, L)."""
        mask = word_of_byte >= 0
        return ReadText(self.text_reader(self._embed(self.bytes, text), mask)[-1], mask, word_of_byte)

    def gather(self, codes: Tensor, text: ReadText) -> tuple[Tensor, Tensor, Tensor]:
        """What each word's speech is gathered to, (B, W, D), the attention (B, W, F), and which are words (B, W)."""
        frames = codes >= 0
        layers = self.speech_reader(self._embed(self.codes, codes.clamp_min(0)), frames)
        queries, words = words_from_bytes(text.states, text.word_of_byte)
        gathered, attention = self.aggregator(queries, layers[-1], layers[self.config.value_layer], frames)
        return gathered, attention, words

    @torch.inference_mode()
    def encode(self, codes: Tensor, text: Tensor, word_of_byte: Tensor) -> Tensor:
        """Word codes (B, K, W) of speech and its text."""
        gathered, _, words = self.gather(codes, self.encode_text(text, word_of_byte))
        return self.quantizer(gathered, words).word_codes

    def word_vectors(self, word_codes: Tensor) -> Tensor:
        """Vectors (B, W, D) of word codes (B, k, W), k from 1 to K."""
        return self.quantizer.look_up(word_codes)

    def scores(self, codes: Tensor, text: ReadText, vectors: Tensor | None) -> Tensor:
        """Scores (B, F + 1, V + 1) in fp32 of each next code, the last one the end's.

        Args:
            codes: (B, F), what was said so far or should be.
            text: What it says.
            vectors: (B, W, D) of its words; None: the text alone.
        """
        if vectors is None:
            vectors = self.no_speech[None, None].expand(len(codes), int(text.word_of_byte.max()) + 1, -1)
        memory = text.states + bytes_from_words(vectors.to(text.states.dtype), text.word_of_byte)
        before = F.pad(codes.clamp_min(0), (1, 0), value=self.config.codebook_size)
        hidden = self.decoder(self._embed(self.codes, before), memory, text.mask)
        return F.linear(hidden, self.codes.weight, self.bias).float()

    def forward(
        self,
        codes: Tensor,
        text: Tensor,
        word_of_byte: Tensor,
        with_speech: Tensor | None = None,
        spans: Tensor | None = None,
    ) -> TextAlignedOutput:
        """The training's loss.

        Args:
            codes: (B, F).
            text: (B, L).
            word_of_byte: (B, L).
            with_speech: (B,) bool, whether the decoder gets the item's word vectors, or the text alone; None: all do.
            spans: (B, W, 2), first frame of each word and the one behind its last, -1 where that is not known; None:
                nowhere.
        """
        read = self.encode_text(text, word_of_byte)
        gathered, attention, words = self.gather(codes, read)
        quantized: QuantizedWords = self.quantizer(gathered, words)
        vectors = quantized.vectors
        if with_speech is not None:
            vectors = torch.where(with_speech[:, None, None], vectors, self.no_speech)
        code_loss = code_losses(self.scores(codes, read, vectors), codes).mean()
        loss, alignment_loss = code_loss + quantized.loss, None
        if self.config.alignment_weight > 0 and spans is not None:
            share, known = attention_in_spans(attention, spans)
            alignment_loss = -share[known].clamp_min(1e-6).log().sum() / known.sum().clamp_min(1)
            loss = loss + self.config.alignment_weight * alignment_loss
        return TextAlignedOutput(loss, code_loss, quantized.loss, alignment_loss)

    def _embed(self, table: nn.Embedding, ids: Tensor) -> Tensor:
        return table(ids) * self.config.hidden_size**0.5


def code_losses(scores: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy in nats of every code and of every item's end, (N,) in the order of items and frames.

    Args:
        scores: (B, F + 1, V + 1), as :meth:`TextAlignedModel.scores` returns them.
        codes: (B, F), -1 in padding.
    """
    said, targets = targets_of(codes, scores.shape[-1] - 1)
    return F.cross_entropy(scores[said], targets[said], reduction="none")


def targets_of(codes: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Which positions are learnt, (B, F + 1) bool, and what stands there: codes (B, F) and `end` behind the last."""
    targets = F.pad(codes, (0, 1), value=-1)
    lengths = (codes >= 0).sum(dim=1, keepdim=True)
    targets = targets.scatter(1, lengths, end)
    return targets >= 0, targets


def attention_in_spans(attention: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
    """Share of each word's attention (B, W, F) within its span (B, W, 2), and which spans are known: both (B, W)."""
    places = torch.arange(attention.shape[-1], device=attention.device)
    inside = (places >= spans[..., :1]) & (places < spans[..., 1:])
    return (attention * inside).sum(dim=-1), spans[..., 1] > 0


def new_text_aligned_model(config: TextAlignedConfig, seed: int) -> TextAlignedModel:
    """A model with random weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TextAlignedModel(config)


def load_text_aligned_model(folder: str | Path, device: str = "cpu") -> TextAlignedModel:
    """Loads the folder that `slm train-text-aligned` wrote (`run_dir/model`), in eval mode and fp32.

    Raises:
        TextAlignedError: It is no such folder, or its weights are torn or do not fit its config.json.
    """
    place = ModelFolder(folder, "model", "text-aligned model", "train-text-aligned", TextAlignedError)
    place.settings(TextAlignedConfig.model_type)
    return place.load(TextAlignedModel, device)


AutoModel.register(TextAlignedConfig, TextAlignedModel)
