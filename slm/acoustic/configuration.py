"""What an acoustic stage is: its sizes, and the codec whose codes it reads and fills."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import AutoConfig, PreTrainedConfig

OBJECTIVES = ("masked",)


class AcousticError(ValueError):
    """An acoustic stage that cannot be built, loaded or used with a codec; the message says why, and the way out."""


@dataclass
class AcousticSizes:
    """Sizes of the transformer."""

    hidden_size: int = field(default=256, metadata={"help": "width"})
    layers: int = field(default=6, metadata={"help": "transformer layers, each reading in both directions"})
    heads: int = field(default=4, metadata={"help": "attention heads"})
    intermediate_size: int = field(default=768, metadata={"help": "width of the feed-forward layers"})
    code_dim: int = field(
        default=64, metadata={"help": "width of a code's vector, which its book's input and output share"}
    )
    dropout: float = field(default=0.1, metadata={"help": "dropout in every layer"})

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads", "intermediate_size", "code_dim"):
            if getattr(self, name) < 1:
                raise AcousticError(f"sizes.{name}: {getattr(self, name)} must be at least 1")
        if self.hidden_size % (2 * self.heads):
            raise AcousticError(
                f"sizes.heads: hidden_size {self.hidden_size} must be a multiple of twice heads {self.heads} "
                "(rotary positions turn pairs)"
            )
        if not 0 <= self.dropout < 1:
            raise AcousticError(f"sizes.dropout: {self.dropout:g} must lie in [0, 1)")


class AcousticConfig(PreTrainedConfig):
    """The config.json of an acoustic stage.

    Args:
        codebook_sizes: Entries of each of the codec's K books, book 0 (semantic) first.
        frame_rate: The codec's frames per second.
        sampling_rate: The codec's Hz.
        fingerprint: The codec's; other codes are refused.
        precision: Arithmetic that the fingerprint is of.
        tokenizer: Name or folder that the codec was loaded from, for messages.
        objective: What it was trained by; `masked` is all there is.
        min_prompt_s: Seconds of a reference voice at least, as the training drew them.
        max_prompt_s: Seconds of it that are read at most.
        window_s: Seconds of speech that are filled at once; longer speech is filled piece by piece.
        hidden_size, layers, heads, intermediate_size, code_dim, dropout: As in :class:`AcousticSizes`.
    """

    model_type = "lmspt_acoustic"

    def __init__(
        self,
        codebook_sizes: list[int] | None = None,
        frame_rate: float = 12.5,
        sampling_rate: int = 16_000,
        fingerprint: str = "",
        precision: str = "fp32",
        tokenizer: str = "",
        objective: Literal["masked"] = "masked",
        min_prompt_s: float = 1.0,
        max_prompt_s: float = 3.0,
        window_s: float = 8.0,
        hidden_size: int = 256,
        layers: int = 6,
        heads: int = 4,
        intermediate_size: int = 768,
        code_dim: int = 64,
        dropout: float = 0.1,
        **kwargs: object,
    ) -> None:
        self.codebook_sizes = list(codebook_sizes or [2, 2])
        self.frame_rate = frame_rate
        self.sampling_rate = sampling_rate
        self.fingerprint = fingerprint
        self.precision = precision
        self.tokenizer = tokenizer
        self.objective = objective
        self.min_prompt_s, self.max_prompt_s, self.window_s = min_prompt_s, max_prompt_s, window_s
        self.hidden_size, self.layers, self.heads = hidden_size, layers, heads
        self.intermediate_size, self.code_dim, self.dropout = intermediate_size, code_dim, dropout
        super().__init__(**kwargs)

    @property
    def n_codebooks(self) -> int:
        """K."""
        return len(self.codebook_sizes)

    def frames(self, seconds: float) -> int:
        """Frames of so many seconds, at least one."""
        return max(1, round(seconds * self.frame_rate))

    def check_fingerprint(self, fingerprint: str, whose: str) -> None:
        """Refuses another codec's codes.

        Args:
            fingerprint: Of the codes that are to be filled.
            whose: What they are of, for the message.

        Raises:
            AcousticError: The fingerprints differ.
        """
        if fingerprint != self.fingerprint:
            raise AcousticError(
                f"acoustic: the stage fills the codes of tokenizer {self.tokenizer!r} (fingerprint "
                f"{self.fingerprint[:12]}, {self.frame_rate:g} Hz, {self.n_codebooks} books), and {whose} has "
                f"fingerprint {fingerprint[:12]}: its codes mean something else. Train one on that tokenizer's codes "
                "with `slm train-acoustic`"
            )


AutoConfig.register(AcousticConfig.model_type, AcousticConfig)
