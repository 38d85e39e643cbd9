"""Loading a tokenizer by preset, folder or hub name."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from tokenizer.codecs.base import Codec
from tokenizer.codecs.dmel import HOPS, DMel
from tokenizer.codecs.published import PUBLISHED_REPO, is_published, load_published
from tokenizer.codecs.registry import CODECS, register_codec
from tokenizer.embedded import TOKENIZERS, embedded_folder
from tokenizer.hub import ask_hub
from tokenizer.model.configuration import LMSPTConfig, preset_config
from tokenizer.model.modeling import LMSPTModel
from tokenizer.model.presets import PRESETS

__all__ = ["CODECS", "load_tokenizer", "register_codec"]

_NUMBERED = re.compile(r"(?P<name>.+):(?P<books>\d+)")


def load_tokenizer(
    name_or_path: str | Path, device: str | torch.device | None = None, num_codebooks: int | None = None
) -> LMSPTModel | Codec:
    """Loads a tokenizer in eval mode.

    Args:
        name_or_path: an embedded tokenizer's name (`embedded-12.5hz`); a preset's (untrained, with a warning); a
            dMel's (`dmel-25hz`); a folder written by `save_pretrained`, or one in the published layout; or a hub name.
            The `model_type` in config.json says which kind it is: LM-SPT, mimi, dac, encodec, xcodec or a supervised
            tokenizer. `NAME:8` is `NAME` with `num_codebooks=8`, so that a configuration or a coded corpus says it
            all in one word.
        device: where to put it; None leaves it on the CPU.
        num_codebooks: how many of a codec's books to use, the first ones; None for all. Not for LM-SPT tokenizers,
            whose decoder takes the first k books of any code.

    Returns:
        The model; `trained` says whether its weights come from training, `decode_paths` which
        ways from codes to a waveform it has.

    Raises:
        ValueError: the name is neither preset, folder nor reachable hub name, the folder lacks a file or holds another
            kind of model, or the number of books cannot be had. The message says what to do.
    """
    name = str(name_or_path)
    if num_codebooks is None and not Path(name).exists() and (numbered := _NUMBERED.fullmatch(name)):
        name, num_codebooks = numbered["name"], int(numbered["books"])
    name = str(embedded_folder(name) or name)
    folder = Path(name)
    if name in PRESETS:
        warnings.warn(
            f"{name} is a preset: its weights are random. Train it (slm train-tokenizer) or give a trained folder.",
            stacklevel=2,
        )
        model = LMSPTModel(preset_config(name))
    elif name in HOPS:
        model = DMel(name, num_codebooks)
    elif name == PUBLISHED_REPO or is_published(folder):
        model = load_published(name)
    elif folder.is_dir():
        model = _from_folder(folder, num_codebooks)
    elif folder.is_file():
        raise ValueError(f"no tokenizer {name!r}: a file; give the folder of a saved one (RUN_DIR/model)")
    elif "/" not in name:
        raise ValueError(f"no tokenizer {name!r}: {_choices()}")
    elif name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise ValueError(
            f"no tokenizer {name!r}: no such folder, and a hub name is `owner/name`; correct the path, or make it "
            f"first (`slm train-tokenizer` writes RUN_DIR/model); {', '.join(TOKENIZERS)} come with the package"
        )
    else:
        model = _from_hub(name, num_codebooks)
    if num_codebooks is not None and isinstance(model, LMSPTModel):
        raise ValueError(f"{name} is an LM-SPT tokenizer, num_codebooks={num_codebooks} is for other codecs: leave it")
    return model.eval() if device is None else model.eval().to(device)


def _choices() -> str:
    """What `load_tokenizer` takes, for messages."""
    return (
        f"give an embedded tokenizer ({', '.join(TOKENIZERS)}), a preset ({', '.join(sorted(PRESETS))}), a dMel "
        f"({', '.join(HOPS)}), a folder with config.json (model_type "
        f"{', '.join([LMSPTConfig.model_type, *sorted(CODECS)])}) and model.safetensors as save_pretrained writes "
        "them, or a hub name (owner/name)"
    )


def _from_folder(folder: Path, num_codebooks: int | None) -> LMSPTModel | Codec:
    missing = [name for name in ("config.json",) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        missing.append("model.safetensors")
    if missing:
        raise ValueError(f"{folder} is no tokenizer folder, it has no {' and no '.join(missing)}: {_choices()}")
    try:
        settings: dict[str, Any] = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not a JSON object ({error})") from error
    return _build(str(folder), settings.get("model_type"), num_codebooks)


def _from_hub(name: str, num_codebooks: int | None) -> LMSPTModel | Codec:
    try:
        ask_hub(name)
        settings, _ = PreTrainedConfig.get_config_dict(name)
        return _build(name, settings.get("model_type"), num_codebooks)
    except OSError as error:
        raise ValueError(
            f"cannot get tokenizer {name!r} from the hub ({type(error).__name__}: no such name, no network, or offline "
            f"mode; {str(error).partition(chr(10))[0]}). Download it where there is a network (hf download {name} "
            f"--local-dir FOLDER) and give the folder; {', '.join(TOKENIZERS)} come with the package"
        ) from error


def _build(source: str, kind: str | None, num_codebooks: int | None) -> LMSPTModel | Codec:
    if kind == LMSPTConfig.model_type:
        return _load(LMSPTModel, source)
    if kind not in CODECS:
        raise ValueError(f"{source} holds a model of type {kind!r}, not 'lmspt' or another codec: {_choices()}")
    model = _load(AutoModel, source)
    try:
        return CODECS[kind](model, num_codebooks)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _load(kind: Any, source: str) -> PreTrainedModel:
    """The model in fp32, whatever it is on disk: the look-up needs it, and a fingerprint is that of fp32 weights."""
    try:
        model, report = kind.from_pretrained(source, output_loading_info=True, dtype=torch.float32)
    except RuntimeError as error:  # how transformers reports tensors of another size
        raise ValueError(f"{source}: the weights do not fit config.json ({str(error).splitlines()[0]})") from error
    except SafetensorError as error:
        raise ValueError(f"{source}: the weights cannot be read ({error}): the file is torn, copy it again") from error
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise ValueError(f"{source}: the weights do not fit config.json; missing or of another size: {absent[:5]}")
    return model
