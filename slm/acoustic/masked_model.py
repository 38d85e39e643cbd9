"""The stage that fills codebooks by masked prediction: a table of code vectors and a head for each book.

Shapes: B items, T frames (a prompt's, then a target's, then padding), K books, D width, C width of a code's vector, V
entries of one book. `audio_codes` (B, K, T) int64 with -1 in padding; `visible` (B, K, T) bool says which codes the
model may read; `prompt` and `frames` (B, T) as in `layers`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from slm.acoustic.configuration import AcousticConfig
from slm.acoustic.layers import AcousticOutput, FrameTransformer


class AcousticModel(FrameTransformer):
    """Fills codebooks 1..K-1 from book 0 and a prompt of whole frames.

    Each frame is the sum of its visible codes' vectors and, for the others, of their book's mask vector (SoundStorm,
    section 3.2). A book's table of code vectors is shared by its input and its head.
    """

    def __init__(self, config: AcousticConfig) -> None:
        super().__init__(config)
        width, sizes = config.hidden_size, config.codebook_sizes
        self.codes = nn.ModuleList(nn.Embedding(size, config.code_dim) for size in sizes)
        self.code_in = nn.ModuleList(nn.Linear(config.code_dim, width, bias=False) for _ in sizes)
        self.masked = nn.Embedding(len(sizes) - 1, width)  # of books 1..K-1; book 0 is never masked
        self.add_layers()
        self.code_out = nn.ModuleList(nn.Linear(width, config.code_dim) for _ in sizes[1:])
        self.biases = nn.ParameterList(torch.zeros(size) for size in sizes[1:])
        self.post_init()

    def hidden(self, audio_codes: Tensor, visible: Tensor, prompt: Tensor, frames: Tensor) -> Tensor:
        """What the transformer makes of the frames: (B, T, D)."""
        x = 0
        for book, (table, project) in enumerate(zip(self.codes, self.code_in, strict=True)):
            read = project(table(audio_codes[:, book].clamp_min(0)))
            if book:
                read = torch.where(visible[:, book, :, None], read, self.masked.weight[book - 1].to(read.dtype))
            x = x + read
        return self.through_layers(x, prompt, frames)

    def logits(self, hidden: Tensor, book: int) -> Tensor:
        """Scores (..., V) in fp32 of the codes of `book`, 1 to K - 1, from hidden states (..., D)."""
        vectors = self.code_out[book - 1](hidden)
        return F.linear(vectors, self.codes[book].weight, self.biases[book - 1]).float()

    def forward(
        self, audio_codes: Tensor, visible: Tensor, prompt: Tensor, frames: Tensor, targets: Tensor
    ) -> AcousticOutput:
        """Cross-entropy of the codes at `targets` (B, K, T) bool, averaged over all of them, whatever their book."""
        hidden = self.hidden(audio_codes, visible, prompt, frames)
        total = hidden.new_zeros((), dtype=torch.float32)
        for book in range(1, self.config.n_codebooks):
            wanted = targets[:, book]
            if bool(wanted.any()):
                scores = self.logits(hidden[wanted], book)
                total = total + F.cross_entropy(scores, audio_codes[:, book][wanted], reduction="sum")
        return AcousticOutput(loss=total / targets.sum().clamp_min(1))


def new_acoustic_model(config: AcousticConfig, seed: int) -> AcousticModel:
    """A stage with random weights drawn from `seed`.

    Raises:
        AcousticError: The codec has one book, so there is nothing to fill.
    """
    config.check_books()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AcousticModel(config)


AutoModel.register(AcousticConfig, AcousticModel)
