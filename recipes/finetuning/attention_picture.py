"""Pictures of the attention from speech to text, of one valid utterance at each evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from recipes.finetuning.data import Data
from recipes.runs.files import disk_errors
from recipes.runs.machine import is_main_process
from slm.tasks.sequences import Example
from slm.training.alignment.attention_reader import Head, heads_of
from slm.training.alignment.config import AlignmentConfig
from slm.training.alignment.trainer import attention_to_text
from slm.training.trainer import bare_model

MOST_HEADS, COLUMNS = 24, 4


class AttentionPicture(TrainerCallback):
    """Draws `attention-STEP.png` at each evaluation: the heads that are aligned, the first `MOST_HEADS` of them.

    Args:
        config: Which heads.
        data: Its first valid utterance that says its prompt is drawn; without one, nothing is.
        tokenizer: Of the text.
        folder: Where the pictures go.
    """

    def __init__(self, config: AlignmentConfig, data: Data, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        self.config, self.tokenizer, self.folder = config, tokenizer, folder
        self.example: Example | None = None
        if data.valid is not None:
            examples = (data.valid.example(number, None) for number in range(len(data.valid.lengths)))
            self.example = next((example for example in examples if example.spoken is not None), None)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """One picture of the model as it is."""
        if self.example is None or model is None or not is_main_process():
            return
        heads = heads_of(self.config, bare_model(model))[:MOST_HEADS]
        text = self.example.spoken.text
        tokens = [self.tokenizer.decode([number]) for number in self.example.input_ids[text.start : text.stop]]
        attention = attention_to_text(model, self.example, heads)
        figure = attention_figure(attention, heads, tokens, state.global_step)
        path = self.folder / f"attention-{state.global_step:06d}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        with disk_errors(path):
            figure.savefig(path, dpi=110)


def attention_figure(attention: Tensor, heads: list[Head], tokens: list[str], step: int) -> Figure:
    """One panel for each head: tokens upwards, frames to the right, the darker the more attention.

    Args:
        attention: (h, F, T).
        heads: Their layers and numbers.
        tokens: T, as the tokenizer writes them.
        step: What the title says.
    """
    columns = min(COLUMNS, len(heads))
    lines = -(-len(heads) // columns)
    figure = Figure(figsize=(1 + 4.0 * columns, 0.8 + (0.6 + 0.18 * len(tokens)) * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, weights, (layer, head) in zip(panels, attention, heads, strict=False):
        axes.imshow(weights.T.numpy(), origin="lower", aspect="auto", cmap="Greys", vmin=0, interpolation="nearest")
        axes.set_title(f"layer {layer}, head {head}: at most {float(weights.max()):.2f}", fontsize=8, loc="left")
        axes.set_yticks(range(len(tokens)), tokens, fontsize=6)
        axes.tick_params(axis="x", labelsize=6)
        axes.set_xlabel("frame", fontsize=7)
    for axes in panels[len(heads) :]:
        axes.set_visible(False)
    figure.suptitle(f"Attention from speech to text, step {step}", fontsize=9, x=0.01, ha="left")
    return figure
