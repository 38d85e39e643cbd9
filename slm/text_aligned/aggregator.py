"""The aggregator: each word looks for its speech among the frames and gathers it into one vector, which is quantized.

TASTE (arXiv 2504.07053, section 2): attention from text tokens, whose keys are the speech encoder's last layer, which
knows what is said where, and whose values an earlier layer, which still holds how it is said.

Shapes: B items, W words, F frames, D width, K books of a word, N words of all items; masks bool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import DacConfig
from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer

from slm.text_aligned.configuration import TextAlignedConfig

COMMITMENT, CODEBOOK = 0.25, 1.0  # weights of the quantizer's losses, as DAC has them


class Aggregator(nn.Module):
    """Attentions from words to frames. A word's query is refined by what it found; the last one's find is the result.

    The query itself is not added to the result: what is quantized is made of speech alone.
    """

    def __init__(self, config: TextAlignedConfig) -> None:
        super().__init__()
        width, n_layers = config.hidden_size, config.aggregator_layers
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(n_layers))
        self.layers = nn.ModuleList(
            nn.MultiheadAttention(width, config.heads, dropout=config.dropout, batch_first=True)
            for _ in range(n_layers)
        )

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Gathers.

        Args:
            queries: (B, W, D), what the text says of each word.
            keys: (B, F, D), the speech encoder's last layer.
            values: (B, F, D), an earlier layer.
            frames: (B, F), which are no padding.

        Returns:
            What was gathered, (B, W, D), and the last attention, the mean of its heads, (B, W, F).
        """
        for norm, layer in zip(self.norms, self.layers, strict=True):
            found, attention = layer(norm(queries), keys, values, key_padding_mask=~frames)
            queries = queries + found
        return found, attention


@dataclass
class QuantizedWords:
    """Vectors (B, W, D) after quantization, codes (B, K, W) with -1 where there is no word, and the loss."""

    vectors: Tensor
    word_codes: Tensor
    loss: Tensor


class WordQuantizer(nn.Module):
    """Residual vector quantization of words: DAC's books, factorized with cosine look-up, in fp32.

    The words of all items go through it as one sequence, so that padding takes no part in its losses. In the first
    `quantizer_warmup_steps` forward passes of a training nothing is looked up, and the books' entries are replaced by
    what they would have quantized: with random entries at the start all words soon have one code.
    """

    def __init__(self, config: TextAlignedConfig) -> None:
        super().__init__()
        sizes = DacConfig(
            n_codebooks=config.word_books,
            codebook_size=config.word_codebook_size,
            codebook_dim=config.word_codebook_dim,
            quantizer_dropout=0.0,
        )
        sizes.hidden_size = config.hidden_size
        self.n_books, self.warmup_steps = config.word_books, config.quantizer_warmup_steps
        self.books = DacResidualVectorQuantizer(sizes)
        self.register_buffer("n_steps", torch.zeros((), dtype=torch.int64))  # of the training, up to the warm-up's end
        self.register_buffer("n_samples", torch.zeros((), dtype=torch.int64))  # that have replaced entries

    def forward(self, gathered: Tensor, words: Tensor) -> QuantizedWords:
        """Quantizes (B, W, D) where `words` (B, W) says that there is a word."""
        with torch.autocast(gathered.device.type, enabled=False):
            flat = gathered.float()[words].T[None]  # (1, D, N)
            if self.training and int(self.n_steps) < self.warmup_steps:
                quantized, codes, loss = self._warm_up(flat)
            else:
                quantized, codes, _, commitment, codebook = self.books(flat)
                loss = (COMMITMENT * commitment + CODEBOOK * codebook).mean()
        vectors = torch.zeros_like(gathered, dtype=torch.float32)
        vectors[words] = quantized[0].T
        return QuantizedWords(vectors, self._at_words(codes[0], words), loss)

    def _warm_up(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, D, N) through each book's projections without its look-up: the sum, codes (1, K, N), and no loss."""
        total, residual, codes = torch.zeros_like(flat), flat, []
        n_words, size = flat.shape[-1], self.books.quantizers[0].codebook.num_embeddings
        slots = (self.n_samples + torch.arange(n_words, device=flat.device)[-size:]) % size
        for book in self.books.quantizers:
            projected = book.in_proj(residual)
            book.codebook.weight.data[slots] = projected.detach()[0].T[-size:]
            codes.append(book.decode_latents(projected.detach())[1])
            total, residual = total + book.out_proj(projected), residual - book.out_proj(projected)
        self.n_samples += n_words
        self.n_steps += 1
        if int(self.n_steps) == self.warmup_steps and dist.is_initialized():
            for book in self.books.quantizers:  # each process had words of its own
                dist.broadcast(book.codebook.weight.data, src=0)
        return total, torch.stack(codes, dim=1), flat.new_zeros(())

    def look_up(self, word_codes: Tensor) -> Tensor:
        """Vectors (B, W, D) of codes (B, k, W), of the first k books; zero where they are -1."""
        words = word_codes[:, 0] >= 0
        flat = word_codes.transpose(1, 2)[words].T[None]  # (1, k, N)
        quantized = self.books.from_codes(flat)[0]
        vectors = quantized.new_zeros(*words.shape, quantized.shape[1])
        vectors[words] = quantized[0].T
        return vectors

    def _at_words(self, codes: Tensor, words: Tensor) -> Tensor:
        """(K, N) codes of all words -> (B, K, W)."""
        placed = codes.new_full((*words.shape, self.n_books), -1)
        placed[words] = codes.T
        return placed.transpose(1, 2)
