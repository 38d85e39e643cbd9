"""Loading a tokenizer by preset, folder or hub name, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import torch

from .configuration import PRESETS, LMSPTConfig, preset_config
from .modeling import LMSPTModel


def load_tokenizer(name_or_path: str | Path, device: str | torch.device | None = None) -> LMSPTModel:
    """Loads a tokenizer in eval mode.

    Args:
        name_or_path: a preset's name (untrained, with a warning), a folder written by `save_pretrained`, or a hub name.
        device: where to put it; None leaves it on the CPU.

    Returns:
        The model; `trained` says whether its weights come from training.

    Raises:
        ValueError: the name is neither preset, folder nor reachable hub name, or the folder lacks a file or holds
            another kind of model. The message says what to do.
    """
    name = str(name_or_path)
    folder = Path(name_or_path)
    if name in PRESETS:
        warnings.warn(
            f"{name} is a preset: its weights are random. Train it (slm train-tokenizer) or give a trained folder.",
            stacklevel=2,
        )
        model = LMSPTModel(preset_config(name))
    elif folder.is_dir():
        model = _from_folder(folder)
    elif name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise ValueError(f"no tokenizer {name!r}: {_CHOICES}")
    else:
        model = _from_hub(name)
    return model.eval() if device is None else model.eval().to(device)


_CHOICES = (
    f"give a preset ({', '.join(sorted(PRESETS))}), a folder with config.json (model_type lmspt) and "
    "model.safetensors as save_pretrained writes them, or a hub name (owner/name)"
)


def _from_folder(folder: Path) -> LMSPTModel:
    missing = [name for name in ("config.json",) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        missing.append("model.safetensors")
    if missing:
        raise ValueError(f"{folder} is no tokenizer folder, it has no {' and no '.join(missing)}: {_CHOICES}")
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not a JSON object ({error})") from error
    if kind != LMSPTConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {kind!r}, not 'lmspt': {_CHOICES}")
    return _load(str(folder))


def _from_hub(name: str) -> LMSPTModel:
    try:
        return _load(name)
    except OSError as error:
        raise ValueError(
            f"cannot get tokenizer {name!r} from the hub ({error.__class__.__name__}: no such name, no network, or "
            f"offline mode). Download it where there is a network (hf download {name} --local-dir FOLDER) and give "
            f"the folder, or {_CHOICES}"
        ) from error


def _load(source: str) -> LMSPTModel:
    model, report = LMSPTModel.from_pretrained(source, output_loading_info=True)
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise ValueError(f"{source}: the weights do not fit config.json; missing or of another size: {absent[:5]}")
    return model


def fingerprint(model: LMSPTModel, precision: str = "fp32") -> str:
    """SHA-256 (hex) over the sizes, the weights in the order of their names, and the precision.

    Running statistics of codebook use and the `trained` flag are left out: they change no code.
    """
    digest = hashlib.sha256()
    own = sorted(set(LMSPTConfig.__annotations__) - {"model_type", "trained", "initializer_range"})
    digest.update(json.dumps({key: getattr(model.config, key) for key in own}, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.endswith(".usage"):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    digest.update(precision.encode())
    return digest.hexdigest()
