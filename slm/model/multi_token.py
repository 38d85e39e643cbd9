"""Multi-token prediction: heads of an LLM that say, beside the next speech token, those that come after it.

A speech LM of n tokens has n - 1 further heads on its last states (Gloeckle et al. 2024, arXiv 2404.19737, section 2;
for speech tokens VocalNet, arXiv 2504.04060, and GOAT-TTS, arXiv 2504.12339). A head here is Medusa's residual block
(arXiv 2401.10774, section 2.1.1), h + SiLU(W h) with W = 0 at the start, so that it begins as the head of the next
token; its logits are those of the LLM's own output rows, of speech alone. The heads are a submodule of the LLM and a
file of their own in its folder: without it the folder is the same model, which gives a token a pass.

Shapes: N states of width D; n tokens; C output rows of speech.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from slm.model.parts import attach, part_of

FILE_NAME = "multi_token_heads.safetensors"
NAME = "multi_token_heads"  # of the submodule
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # of PEFT, which holds the heads that learnt beside adapters


class MultiTokenError(ValueError):
    """Heads are missing, damaged or of another number than asked for, or cannot be had; the message says which."""


@dataclass
class MultiTokenSettings:
    """How many tokens of a speech answer a position predicts, and what the further ones weigh."""

    tokens: int = field(
        default=4, metadata={"help": "tokens that a position predicts: the next one and those up to this distance"}
    )
    loss_weight: float = field(
        default=1.0, metadata={"help": "of the further tokens' loss, all together; the next token's is 1"}
    )

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise MultiTokenError(
                f"multi_token.tokens: {self.tokens} must be at least 2; leave multi_token out for the next token alone"
            )
        if self.loss_weight <= 0:
            raise MultiTokenError(
                f"multi_token.loss_weight: {self.loss_weight:g} must be above 0, or its heads learn nothing"
            )


class MultiTokenHeads(nn.Module):
    """The heads of the tokens at distance 2 to n, without the output rows that they share.

    Args:
        tokens: n.
        width: D of the LLM.
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(tokens - 1))
        for block in self.blocks:
            nn.init.zeros_(block.weight)

    @property
    def tokens(self) -> int:
        """n: tokens that a position predicts, the next one too."""
        return len(self.blocks) + 1

    def forward(self, distance: int, states: Tensor) -> Tensor:
        """The states (N, D) in front of the LLM's head -> those in front of the output rows, of a distance from 2."""
        block = self.blocks[distance - 2]
        states = states.to(block.weight.dtype)
        return states + F.silu(block(states))


def multi_token_heads_of(model: nn.Module) -> MultiTokenHeads | None:
    """The further heads of a causal LM, those that are trained where PEFT keeps two; None where it has none."""
    return part_of(model, NAME)


def set_multi_token_heads(model: nn.Module, settings: MultiTokenSettings | None) -> None:
    """Gives a model that is to be trained the heads asked for, keeping those that it has, or takes them away.

    Heads that are not trained would fall behind a model that is.

    Raises:
        MultiTokenError: It has heads of another number.
    """
    own = multi_token_heads_of(model)
    if settings is None:
        if own is not None:
            delattr(model, NAME)
    elif own is None:
        attach(model, NAME, MultiTokenHeads(settings.tokens, model.get_input_embeddings().weight.shape[1]))
    elif own.tokens != settings.tokens:
        raise MultiTokenError(
            f"training.multi_token.tokens: {settings.tokens}, and the model has heads for {own.tokens}; set it to "
            f"that, or remove {FILE_NAME} from the model's folder to begin with new ones"
        )


def predicted_tokens(folder: str | Path) -> int:
    """Tokens that a position of the model in a folder predicts: 1 without multi-token heads.

    Raises:
        MultiTokenError: Their file is damaged.
    """
    for path in (Path(folder) / FILE_NAME, Path(folder) / ADAPTER_WEIGHTS):
        if path.is_file():
            with _reading(path), safe_open(path, "pt") as file:
                return 1 + sum(_is_block(name) for name in file.keys())  # noqa: SIM118 - not a dict
    return 1


def _is_block(name: str) -> bool:
    """Whether a tensor is a head's weights: in a file of their own, or among an adapter's."""
    return name.startswith("blocks.") or f".{NAME}." in name


def load_multi_token_heads(model: nn.Module, folder: str | Path) -> None:
    """Attaches the heads of a model's folder; nothing where it has none.

    Raises:
        MultiTokenError: Their file is damaged, or of another model.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return
    heads = MultiTokenHeads(predicted_tokens(folder), model.get_input_embeddings().weight.shape[1])
    with _reading(path):
        heads.load_state_dict(load_file(path))
    attach(model, NAME, heads)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError, SafetensorError) as error:
        raise MultiTokenError(
            f"{path}: not the multi-token heads of this folder's model ({str(error).splitlines()[0]}); copy it anew, "
            "or remove it: the model speaks without them, a token a pass"
        ) from error
