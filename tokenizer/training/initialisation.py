"""Starting a tokenizer from another's weights: a new language with the same sizes, or another frame rate; and its
discriminators from those that it was trained against.

What fits by name and shape is taken over, the rest keeps its first weights. For another frame rate that rest is the
changed or added stride: the convolution of the stage next to the codes in each encoder and decoder. DAC parts number
their blocks along the signal, so that a stage added at the codes' end moves the numbers behind it: those are matched
by their distance from the waveform. A larger codebook begins as copies of the smaller one's entries, parted by a little
noise: the encoder before it and the decoder behind it know where these lie.

Shapes: other tensors keep theirs; nothing is cut or interpolated. N entries of a book, E its dimension.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenizer.loading import load_tokenizer
from tokenizer.model.configuration import LMSPTConfig
from tokenizer.model.modeling import LMSPTModel

logger = logging.getLogger(__name__)

SPREAD = 0.1  # of the entries' own standard deviation: what parts the copies of an entry in a larger book

STRIDES = {  # a part's key in the model -> the configuration's field with its strides
    "semantic_encoder": "strides",
    "acoustic_encoder": "strides",
    "decoder": "decoder_strides",
    "auxiliary_decoder": "auxiliary_strides",
}


@dataclass(frozen=True)
class Initialisation:
    """Names of tensors: of the new model those reused and those new, of the old model those dropped.

    `grown` are those of the reused that hold a larger book's entries.
    """

    reused: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    grown: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What happened, for a log: counts, and the modules that are new or dropped by name."""
        lines = [f"{len(self.reused)} tensors reused, {len(self.new)} new, {len(self.dropped)} dropped"]
        for word, names in (("new", self.new), ("dropped", self.dropped)):
            if names:
                modules = dict.fromkeys(_module(name) for name in names)
                lines.append(f"{word}: {', '.join(modules)}")
        if self.grown:
            lines.append(f"larger books, from copies of the old entries: {', '.join(map(_module, self.grown))}")
        return lines


def initialise_from(model: LMSPTModel, source: str | Path) -> Initialisation:
    """Fills `model` with the weights of the tokenizer in `source` that fit it, and logs which do not.

    Args:
        model: is changed in place.
        source: a folder written by `save_pretrained`, or a hub name.

    Raises:
        ValueError: if `source` holds no tokenizer, or none of its encoders' and decoders' weights fit.
    """
    try:
        old = load_tokenizer(source)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{source}: not a tokenizer folder ({str(error).splitlines()[0]})") from None
    if not isinstance(old, LMSPTModel):
        raise ValueError(f"{source}: not a tokenizer folder of LM-SPT, but of {type(old).__name__}")
    offered = {_renamed(name, old.config, model.config): (name, value) for name, value in old.state_dict().items()}
    state = model.state_dict()
    grown = [name for name, value in state.items() if name in offered and _fits_larger_book(name, offered, value)]
    reused = [
        name
        for name, value in state.items()
        if name in offered and (offered[name][1].shape == value.shape or name in grown)
    ]
    # a bias may fit by chance
    if not any(name.split(".")[0] in STRIDES and state[name].ndim > 1 for name in reused):
        raise ValueError(f"{source}: no weight of its encoders and decoders fits this model, of other sizes throughout")
    taken = {offered[name][0] for name in reused}
    with torch.no_grad():
        for name in reused:
            value = offered[name][1]
            state[name].copy_(_more_entries(value, len(state[name])) if name in grown else value)
    begun_anew = {name.replace("codebook.weight", "usage") for name in grown}  # how often entries were chosen
    result = Initialisation(
        reused=tuple(reused),
        new=tuple(name for name in state if name not in {*reused, *begun_anew}),
        dropped=tuple(name for name, _ in offered.values() if name not in {*taken, *begun_anew}),
        grown=tuple(grown),
    )
    if old.config.strides != model.config.strides:
        logger.info("%s: strides %s become %s", source, old.config.strides, model.config.strides)
    for line in result.lines():
        logger.info("%s: %s", source, line)
    return result


def _fits_larger_book(name: str, offered: dict[str, tuple[str, Tensor]], wanted: Tensor) -> bool:
    """Whether a tensor holds a book's entries (N, E), more of them than are offered."""
    old = offered[name][1]
    return name.endswith("codebook.weight") and old.shape[1:] == wanted.shape[1:] and len(old) < len(wanted)


def _more_entries(entries: Tensor, size: int) -> Tensor:
    """Entries (N, E) repeated to (size, E): the first N as they are, their copies apart from them by some noise."""
    repeated = entries.repeat(-(-size // len(entries)), 1)[:size]
    noise = torch.randn(repeated.shape, generator=torch.Generator().manual_seed(0)) * (SPREAD * float(entries.std()))
    noise[: len(entries)] = 0.0
    return repeated + noise.to(repeated)


def initialise_discriminators(discriminator: nn.Module, file: str | Path) -> None:
    """Fills all discriminators with the weights of a safetensors file. Nothing is taken where one does not fit.

    Unlike a tokenizer's parts they are no use in pieces: a judge with some random layers is a random judge.

    Raises:
        ValueError: naming the tensors that do not fit, or a file that cannot be read.
    """
    try:
        offered = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from error
    wanted = discriminator.state_dict()
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in (offered, wanted)]
    wrong = [
        f"{name} is {shapes[0].get(name, 'absent')} there and {shapes[1].get(name, 'absent')} here"
        for name in sorted({**offered, **wanted})
        if shapes[0].get(name) != shapes[1].get(name)
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{file}: {len(wrong)} tensors do not fit: {'; '.join(wrong[:3])}{more}")
    discriminator.load_state_dict(offered)


def _renamed(name: str, old: LMSPTConfig, new: LMSPTConfig) -> str:
    """The name in the new model of the tensor that does in it what `name` does in the old one."""
    match = re.match(r"^(\w+)\.(block|model)\.(\d+)\.(.*)$", name)
    if not match or match[1] not in STRIDES:
        return name
    part, stack, index, rest = match[1], match[2], int(match[3]), match[4]
    before, after = len(getattr(old, STRIDES[part])), len(getattr(new, STRIDES[part]))
    # An encoder begins at the waveform, so that only its tail moves; a decoder ends there: all but its head moves.
    first_moved = before + 1 if part.endswith("encoder") else 1
    if index >= first_moved:
        index += after - before
        if index < 1:
            return f"(gone) {name}"
    return f"{part}.{stack}.{index}.{rest}"


def _module(name: str) -> str:
    """The module that a tensor belongs to, short enough for a log: `semantic_encoder.downs.1`."""
    owner = re.sub(r"\.(weight|bias|usage|alpha|parametrizations\..*)$", "", name)
    return ".".join(owner.split(".")[:3])
