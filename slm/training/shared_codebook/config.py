"""Where in the LLM speech and text are to meet in one codebook, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SharedCodebookConfig:
    """A codebook that a recording and its transcript are both to be written in."""

    layer: int = field(default=3, metadata={"help": "the layer whose states are read, counted from 1 at the lowest"})
    slots: int = field(default=8, metadata={"help": "units that each of both is gathered into, whatever its length"})
    entries: int = field(default=128, metadata={"help": "entries of the codebook"})
    loss_weight: float = field(default=1.0, metadata={"help": "of the loss of a pair, beside that of an answer token"})

    def __post_init__(self) -> None:
        for name, least in (("layer", 1), ("slots", 1), ("entries", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"training.shared_codebook.{name}: {getattr(self, name)} must be at least {least}")
        if self.loss_weight <= 0:
            raise ValueError(
                f"training.shared_codebook.loss_weight: {self.loss_weight:g} must be above 0; leave shared_codebook out"
            )
