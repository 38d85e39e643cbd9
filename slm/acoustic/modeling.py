"""The acoustic stage's model: a transformer over code frames that reads in both directions.

Shapes: B items, T frames (a prompt's, then a target's, then padding), K books, D width, H heads, C width of a code's
vector, V entries of one book. `audio_codes` (B, K, T) int64 with -1 in padding; `visible` (B, K, T) bool says which
codes the model may read; `prompt` and `frames` (B, T) bool mark the voice's frames and all that are no padding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from slm.acoustic.configuration import OBJECTIVES, AcousticConfig, AcousticError


@dataclass
class AcousticOutput(ModelOutput):
    """The mean cross-entropy of the targets, in nats."""

    loss: Tensor | None = None


class AcousticLayer(nn.Module):
    """Attention over all frames with rotary positions, then a gated feed-forward part; norms in front of both."""

    def __init__(self, config: AcousticConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, frames: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, D) to the same; no frame reads padding."""
        batch, length, width = x.shape
        parts = self.query_key_value(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(
            _rotate(query, cos, sin), _rotate(key, cos, sin), value, attn_mask=frames[:, None, None]
        )
        x = x + self.dropout(self.attention_out(read.transpose(1, 2).reshape(batch, length, width)))
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(F.silu(gate) * up))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of (B, H, T, d), d even."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class AcousticModel(PreTrainedModel):
    """Fills codebooks 1..K-1 from book 0 and a prompt of whole frames.

    Each frame is the sum of its visible codes' vectors and, for the others, of their book's mask vector (SoundStorm,
    section 3.2). A book's table of code vectors is shared by its input and its head.
    """

    config_class = AcousticConfig
    base_model_prefix = "acoustic"
    main_input_name = "audio_codes"
    _no_split_modules = ["AcousticLayer"]

    def __init__(self, config: AcousticConfig) -> None:
        super().__init__(config)
        width, sizes = config.hidden_size, config.codebook_sizes
        self.codes = nn.ModuleList(nn.Embedding(size, config.code_dim) for size in sizes)
        self.code_in = nn.ModuleList(nn.Linear(config.code_dim, width, bias=False) for _ in sizes)
        self.masked = nn.Embedding(len(sizes) - 1, width)  # of books 1..K-1; book 0 is never masked
        self.part = nn.Embedding(2, width)  # target, prompt
        self.layers = nn.ModuleList(AcousticLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.code_out = nn.ModuleList(nn.Linear(width, config.code_dim) for _ in sizes[1:])
        self.biases = nn.ParameterList(torch.zeros(size) for size in sizes[1:])
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def hidden(self, audio_codes: Tensor, visible: Tensor, prompt: Tensor, frames: Tensor) -> Tensor:
        """What the transformer makes of the frames: (B, T, D)."""
        x = self.part(prompt.long())
        for book, (table, project) in enumerate(zip(self.codes, self.code_in, strict=True)):
            read = project(table(audio_codes[:, book].clamp_min(0)))
            if book:
                read = torch.where(visible[:, book, :, None], read, self.masked.weight[book - 1].to(read.dtype))
            x = x + read
        cos, sin = _rotations(x.shape[1], self.config.hidden_size // self.config.heads // 2, x.device)
        for layer in self.layers:
            x = layer(x, frames, cos, sin)
        return self.norm(x)

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


def _rotations(length: int, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, half) of positions 0, 1, ..."""
    rates = 10_000.0 ** (-torch.arange(half, device=device) / half)
    angles = torch.arange(length, device=device)[:, None] * rates
    return angles.cos(), angles.sin()


def new_acoustic_model(config: AcousticConfig, seed: int) -> AcousticModel:
    """A stage with random weights drawn from `seed`.

    Raises:
        AcousticError: The codec has one book, so there is nothing to fill.
    """
    if config.n_codebooks < 2:
        raise AcousticError(
            f"corpus: tokenizer {config.tokenizer!r} has one book, so there is nothing to fill; an acoustic stage "
            "needs codes of a tokenizer with acoustic books"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AcousticModel(config)


def load_acoustic_model(folder: str | Path, device: str = "cpu") -> AcousticModel:
    """Loads the folder that `slm train-acoustic` wrote (`run_dir/model`), in eval mode and fp32.

    Raises:
        AcousticError: It is no such folder, or its weights are torn or do not fit its config.json.
    """
    folder = Path(folder)
    about = "give the model folder that `slm train-acoustic` wrote (RUN_DIR/model)"
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise AcousticError(f"acoustic: {folder} has no {name}; {about}")
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, objective = settings.get("model_type"), settings.get("objective")
    except (ValueError, AttributeError) as error:
        raise AcousticError(f"acoustic: {folder / 'config.json'} is not a JSON object ({error}); {about}") from error
    if kind != AcousticConfig.model_type:
        raise AcousticError(f"acoustic: {folder} holds a model of type {kind!r}, no acoustic stage; {about}")
    if objective not in OBJECTIVES:
        raise AcousticError(
            f"acoustic: {folder} was trained by objective {objective!r}; this version knows {', '.join(OBJECTIVES)}"
        )
    try:
        model, report = AcousticModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    except (RuntimeError, SafetensorError) as error:
        raise AcousticError(
            f"acoustic: {folder}: the weights cannot be read ({error}): copy the folder again"
        ) from None
    if absent := sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"]):
        raise AcousticError(f"acoustic: {folder}: the weights do not fit config.json; missing: {absent[:5]}")
    return model.to(device).eval()


AutoModel.register(AcousticConfig, AcousticModel)
