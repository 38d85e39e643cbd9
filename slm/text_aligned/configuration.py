"""What a text-aligned model is: its sizes, and the tokenizer whose semantic codes it reads and rebuilds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import AutoConfig, PreTrainedConfig


class TextAlignedError(ValueError):
    """A text-aligned model that cannot be built, loaded or used with a codec; the message says why, and the way out."""


@dataclass
class TextAlignedSizes:
    """Sizes of the model."""

    hidden_size: int = field(default=192, metadata={"help": "width"})
    heads: int = field(default=4, metadata={"help": "attention heads"})
    intermediate_size: int = field(default=768, metadata={"help": "width of the feed-forward layers"})
    text_layers: int = field(default=2, metadata={"help": "layers that read the text's bytes"})
    speech_layers: int = field(default=3, metadata={"help": "layers that read the semantic codes"})
    value_layer: int = field(
        default=1,
        metadata={"help": "layer that the aggregator gathers from (0: the codes' vectors); it looks by the last one"},
    )
    aggregator_layers: int = field(default=2, metadata={"help": "attentions from words to frames, one after another"})
    decoder_layers: int = field(default=3, metadata={"help": "layers that rebuild the semantic codes"})
    word_books: int = field(default=4, metadata={"help": "residual codebooks of a word (TASTE: 4)"})
    word_codebook_size: int = field(default=512, metadata={"help": "entries of each (TASTE: 512)"})
    word_codebook_dim: int = field(default=8, metadata={"help": "width in which an entry is looked up"})
    dropout: float = field(default=0.1, metadata={"help": "dropout in every layer"})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("value_layer", "dropout") and value < 1:
                raise TextAlignedError(f"sizes.{name}: {value} must be at least 1")
        if self.hidden_size % self.heads:
            raise TextAlignedError(f"sizes.heads: hidden_size {self.hidden_size} must be a multiple of {self.heads}")
        if not 0 <= self.value_layer <= self.speech_layers:
            raise TextAlignedError(
                f"sizes.value_layer: {self.value_layer} must lie in 0 to speech_layers ({self.speech_layers})"
            )
        if not 0 <= self.dropout < 1:
            raise TextAlignedError(f"sizes.dropout: {self.dropout:g} must lie in [0, 1)")


class TextAlignedConfig(PreTrainedConfig):
    """The config.json of a text-aligned model.

    Args:
        codebook_size: Entries of the tokenizer's semantic book.
        frame_rate: The tokenizer's frames per second.
        sampling_rate: The tokenizer's Hz.
        fingerprint: The tokenizer's; other codes are refused.
        precision: Arithmetic that the fingerprint is of.
        tokenizer: Name or folder that the tokenizer was loaded from.
        normaliser: What texts go through before they are spelled.
        max_frames: Longest speech it can read and rebuild.
        max_bytes: Longest text it can read, in bytes.
        alignment_weight: Weight of the loss on attention outside a word's own frames, as it was trained.
        quantizer_warmup_steps: Steps of its training before words were quantized.
        hidden_size, heads, intermediate_size, text_layers, speech_layers, value_layer, aggregator_layers,
            decoder_layers, word_books, word_codebook_size, word_codebook_dim, dropout: As in
            :class:`TextAlignedSizes`.
    """

    model_type = "lmspt_text_aligned"

    def __init__(
        self,
        codebook_size: int = 2,
        frame_rate: float = 12.5,
        sampling_rate: int = 16_000,
        fingerprint: str = "",
        precision: str = "fp32",
        tokenizer: str = "",
        normaliser: str = "basic",
        max_frames: int = 256,
        max_bytes: int = 512,
        alignment_weight: float = 0.0,
        quantizer_warmup_steps: int = 0,
        hidden_size: int = 192,
        heads: int = 4,
        intermediate_size: int = 768,
        text_layers: int = 2,
        speech_layers: int = 3,
        value_layer: int = 1,
        aggregator_layers: int = 2,
        decoder_layers: int = 3,
        word_books: int = 4,
        word_codebook_size: int = 512,
        word_codebook_dim: int = 8,
        dropout: float = 0.1,
        **kwargs: object,
    ) -> None:
        self.codebook_size, self.frame_rate, self.sampling_rate = codebook_size, frame_rate, sampling_rate
        self.fingerprint, self.precision, self.tokenizer = fingerprint, precision, tokenizer
        self.normaliser, self.max_frames, self.max_bytes = normaliser, max_frames, max_bytes
        self.alignment_weight, self.quantizer_warmup_steps = alignment_weight, quantizer_warmup_steps
        self.hidden_size, self.heads, self.intermediate_size = hidden_size, heads, intermediate_size
        self.text_layers, self.speech_layers, self.value_layer = text_layers, speech_layers, value_layer
        self.aggregator_layers, self.decoder_layers = aggregator_layers, decoder_layers
        self.word_books, self.word_codebook_size = word_books, word_codebook_size
        self.word_codebook_dim, self.dropout = word_codebook_dim, dropout
        super().__init__(**kwargs)

    @property
    def bits_per_word(self) -> float:
        """Bits of a word's codes, each sent with log2(size) bits; the text is not counted."""
        return self.word_books * math.log2(self.word_codebook_size)

    def check_fingerprint(self, fingerprint: str, whose: str) -> None:
        """Refuses another tokenizer's codes.

        Args:
            fingerprint: Of the codes that are to be read.
            whose: What they are of, for the message.

        Raises:
            TextAlignedError: The fingerprints differ.
        """
        if fingerprint != self.fingerprint:
            raise TextAlignedError(
                f"model: reads the codes of tokenizer {self.tokenizer!r} (fingerprint {self.fingerprint[:12]}, "
                f"{self.frame_rate:g} Hz), and {whose} has fingerprint {fingerprint[:12]}: its codes mean something "
                "else. Train one on that tokenizer's codes with `slm train-text-aligned`"
            )


AutoConfig.register(TextAlignedConfig.model_type, TextAlignedConfig)
