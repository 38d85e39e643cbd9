"""The presets' parameter counts as Markdown: `python -m tokenizer.model.preset_table` prints docs/tokenizer-presets.md.

Parameters are counted on the meta device, so that nothing is allocated. The gains of weight norm are among them, as
they are in the published file.
"""

from __future__ import annotations

from functools import cache

import torch

from tokenizer.model.configuration import preset_config
from tokenizer.model.modeling import LMSPTModel
from tokenizer.model.presets import PRESETS

PARTS = ("semantic_encoder", "acoustic_encoder", "quantizer", "decoder", "auxiliary_decoder")
HEADING = """# Tokenizer presets

Sizes of the named tokenizers (`tokenizer/model/presets.py`), in millions of parameters. `release-12.5hz` is the
published model (24 kHz, DAC throughout; its auxiliary decoder and teacher work at 16 kHz). `paper-*` follow arXiv
2506.16738 v1, which states 99.7 M for a tokenizer and 2.4 M for the auxiliary decoder: the sizes that v1 does not state
are marked `inferred` in the presets' file and bring the total, auxiliary decoder included, within 3 % of 99.7 M.
`nano-*` are ours, for a CPU; `*-causal` have the same sizes and read nothing of the future; `micro-*` are half as
large, `mini-*` between the two: the embedded tokenizers' sizes.

Printed by `python -m tokenizer.model.preset_table`; a test compares.

"""


@cache
def count_parameters(name: str) -> dict[str, int]:
    """Parameters of each part of a preset's model."""
    with torch.device("meta"):
        model = LMSPTModel(preset_config(name))
    parts = {part: getattr(model, part) for part in PARTS}
    return {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items() if module is not None}


def preset_table() -> str:
    """The document."""
    columns = ["preset", "rate in (kHz)", "codes (Hz)", "books", "semantic encoder", "acoustic encoder", "quantizer",
               "decoder", "auxiliary decoder", "total"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * 4 + "|---:" * (len(columns) - 4) + "|"]
    for name in sorted(PRESETS):
        config, counts = preset_config(name), count_parameters(name)
        first, *rest = config.codebook_sizes
        books = f"{first} + {len(rest)} x {rest[0]}"
        numbers = [f"{count / 1e6:.2f}" for count in (*counts.values(), sum(counts.values()))]
        lines.append(
            f"| {' | '.join([name, f'{config.sampling_rate / 1000:g}', f'{config.frame_rate:g}', books, *numbers])} |"
        )
    return HEADING + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(preset_table(), end="")
