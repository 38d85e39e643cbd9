"""What an acoustic stage is: its sizes, and the codec whose codes it reads and fills."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import AutoConfig, PreTrainedConfig

MASKED = "masked"
LATENT_OBJECTIVES = ("flow", "diffusion", "regression")
Objective = Literal["masked", "flow", "diffusion", "regression"]


class AcousticError(ValueError):
    """An acoustic stage that cannot be built, loaded or used with a codec; the message says why, and the way out."""


@dataclass(frozen=True)
class DecoderFacts:
    """The codec that makes sound, where it is another than the one whose codes are given.

    Args:
        tokenizer: Name or folder that it was loaded from.
        fingerprint: Its own.
        precision: Arithmetic that the fingerprint is of.
    """

    tokenizer: str
    fingerprint: str
    precision: str


@dataclass
class AcousticSizes:
    """Sizes of the transformer."""

    hidden_size: int = field(default=256, metadata={"help": "width"})
    layers: int = field(default=6, metadata={"help": "transformer layers, each reading in both directions"})
    heads: int = field(default=4, metadata={"help": "attention heads"})
    intermediate_size: int = field(default=768, metadata={"help": "width of the feed-forward layers"})
    code_dim: int = field(
        default=64, metadata={"help": "masked: width of a code's vector, which its book's input and output share"}
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


@dataclass
class LatentSettings:
    """What of the codec's latents is predicted, of objectives flow, diffusion and regression."""

    books: int = field(
        default=0, metadata={"help": "the sum of the first so many acoustic books is predicted; 0: of all of them"}
    )
    variance: float = field(
        default=0.99, metadata={"help": "share of the sum's variance in the directions that are predicted"}
    )
    condition_dropout: float = field(
        default=0.1, metadata={"help": "share of items trained without codes and voice, for guidance (CosyVoice: 0.2)"}
    )

    def __post_init__(self) -> None:
        if self.books < 0:
            raise AcousticError(f"latents.books: {self.books} must be 0 (all acoustic books) or more")
        if not 0 < self.variance <= 1:
            raise AcousticError(f"latents.variance: {self.variance:g} must lie in (0, 1]")
        if not 0 <= self.condition_dropout < 1:
            raise AcousticError(f"latents.condition_dropout: {self.condition_dropout:g} must lie in [0, 1)")


class AcousticConfig(PreTrainedConfig):
    """The config.json of an acoustic stage that fills codebooks by masked prediction.

    Args:
        codebook_sizes: Entries of each of the codec's K books, book 0 (semantic) first. With `decoder` of the book that
            is given, of a codec that has no decoder of its own, and then of all books of the decoder's.
        frame_rate: The codec's frames per second.
        sampling_rate: The codec's Hz.
        fingerprint: The codec's; other codes are refused.
        precision: Arithmetic that the fingerprint is of.
        tokenizer: Name or folder that the codec was loaded from, for messages.
        decoder: The fields of :class:`DecoderFacts`; None where the codec has a decoder of its own.
        objective: What it was trained by: `masked`, or of a :class:`LatentConfig` another one.
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
        decoder: dict[str, str] | None = None,
        objective: Objective = MASKED,
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
        self.decoder = decoder
        self.objective = objective
        self.min_prompt_s, self.max_prompt_s, self.window_s = min_prompt_s, max_prompt_s, window_s
        self.hidden_size, self.layers, self.heads = hidden_size, layers, heads
        self.intermediate_size, self.code_dim, self.dropout = intermediate_size, code_dim, dropout
        super().__init__(**kwargs)

    @property
    def other_decoder(self) -> DecoderFacts | None:
        """The codec that makes sound; None where it is the one whose codes are given."""
        return None if self.decoder is None else DecoderFacts(**self.decoder)

    @property
    def n_codebooks(self) -> int:
        """K."""
        return len(self.codebook_sizes)

    def frames(self, seconds: float) -> int:
        """Frames of so many seconds, at least one."""
        return max(1, round(seconds * self.frame_rate))

    def check_books(self) -> None:
        """Raises AcousticError where the codec has one book, so that there is nothing to fill."""
        if self.n_codebooks < 2:
            raise AcousticError(
                f"corpus: tokenizer {self.tokenizer!r} has one book, so there is nothing to fill; an acoustic stage "
                "needs codes of a tokenizer with acoustic books"
            )

    def check_given(self, n_books: int) -> None:
        """Raises AcousticError where a stage of this kind cannot go on from so many books."""
        if self.decoder is not None and n_books != 1:
            raise AcousticError(
                f"acoustic: {n_books} books are given; the stage goes on from one of {self.tokenizer!r}"
            )
        if not 1 <= n_books < self.n_codebooks:
            raise AcousticError(
                f"acoustic: {n_books} of the tokenizer's {self.n_codebooks} books are given: the stage fills the rest "
                "from book 0 on, so there must be at least one and one fewer than all"
            )

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


class LatentConfig(AcousticConfig):
    """The config.json of a stage that predicts what the acoustic books add to the codec's latents.

    Args:
        objective: `flow`, `diffusion` or `regression`.
        n_added_books: The first so many of books 1..K-1 are predicted, as their sum.
        latent_dim: Channels of the codec's latents.
        space_dim: Directions of them that are predicted.
        condition_dropout: Share of the training's items without codes and voice, for guidance.
        kwargs: As in :class:`AcousticConfig`.
    """

    model_type = "lmspt_acoustic_latent"

    def __init__(
        self,
        objective: Objective = "flow",
        n_added_books: int = 1,
        latent_dim: int = 2,
        space_dim: int = 1,
        condition_dropout: float = 0.1,
        **kwargs: object,
    ) -> None:
        self.n_added_books = n_added_books
        self.latent_dim, self.space_dim = latent_dim, space_dim
        self.condition_dropout = condition_dropout
        super().__init__(objective=objective, **kwargs)

    @property
    def added_sizes(self) -> list[int]:
        """Entries of each of the books whose sum is predicted."""
        return self.codebook_sizes[1 : 1 + self.n_added_books]

    def check_given(self, n_books: int) -> None:
        """Raises AcousticError where there is not one book alone."""
        if n_books != 1:
            raise AcousticError(
                f"acoustic: {n_books} books are given, and a stage of objective {self.objective} adds the sum of all "
                "others to book 0; use a model that speaks one book, or a stage of objective masked"
            )


AutoConfig.register(AcousticConfig.model_type, AcousticConfig)
AutoConfig.register(LatentConfig.model_type, LatentConfig)
