"""Which attention heads are to follow the text, and how strongly they are made to."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class AlignmentConfig:
    """Which attention heads learn to go through the text once and in order, and how strongly."""

    heads: list[tuple[int, int]] = field(
        default_factory=list,
        metadata={"help": "[[layer, head], ...], both from 0: heads that learn to follow the text"},
    )
    layers: list[int] = field(default_factory=list, metadata={"help": "and all heads of these layers"})
    loss_weight: float = field(
        default=0.1,
        metadata={
            "help": "of the forward-sum loss of a frame, beside the loss of an answer token; 0: heads are only measured"
        },
    )
    prior_strength: float = field(
        default=1.0,
        metadata={
            "help": "of the beta-binomial prior on these heads' attention to the text at the first step; 0: none"
        },
    )
    prior_steps: int = field(
        default=0, metadata={"help": "steps in which the prior's strength falls to 0; 0: no prior"}
    )

    def __post_init__(self) -> None:
        if not self.heads and not self.layers:
            raise ValueError("training.alignment: name heads=[[LAYER, HEAD], ...] or layers=[LAYER, ...]")
        if min([*self.layers, *(number for pair in self.heads for number in pair)]) < 0:
            raise ValueError("training.alignment: layers and heads are counted from 0 and from the lowest layer on")
        for name in ("loss_weight", "prior_strength", "prior_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.alignment.{name}: {getattr(self, name):g} must not be below 0")

    def strength(self, step: int) -> float:
        """How strong the prior is at a step, from 0 on.

        >>> [AlignmentConfig(layers=[0], prior_steps=4).strength(step) for step in (0, 1, 4, 9)]
        [1.0, 0.75, 0.0, 0.0]
        """
        return self.prior_strength * max(0.0, 1 - step / self.prior_steps) if self.prior_steps else 0.0
