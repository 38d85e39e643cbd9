"""LM-SPT in its published layout: `config.json` and `weights.safetensors` to an LMSPTModel, and back tensor for tensor.

The layout is that of the published code and of kakaocorp/lmspt (arXiv 2506.16738 v2): its configuration's names, DAC
parts as `block.*` / `model.*`, weight norm as `weight_g` / `weight_v`, books as `rvq_first` and `rvq_rest`. Nothing is
multiplied out on the way, so what goes in comes out bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenizer.hub import ask_hub
from tokenizer.model.configuration import LMSPTConfig, preset_config
from tokenizer.model.modeling import LMSPTModel

PUBLISHED_REPO = "kakaocorp/lmspt"
PUBLISHED_FILE = "lmspt_12d5hz_16384_4096.safetensors"
RELEASE_PRESET = "release-12.5hz"
WEIGHTS_FILE = "weights.safetensors"

_REQUIRED = ("sample_rate", "encoder_rates", "decoder_rates", "decoder_dim", "n_codebooks", "semantic_subtraction")
_SIZES = (
    "encoder_dim", "semantic_encoder_dim", "acoustic_encoder_dim", "latent_dim", "codebook_size", "codebook_dim",
    "semantic_codebook_size", "acoustic_codebook_size", "semantic_codebook_dim", "acoustic_codebook_dim",
    "use_shared_encoder", "is_causal", "aux_decoder",
)  # fmt: skip
# What this layout can hold but the published model does not use, with the values that mean so.
_ONLY = {
    "n_semantic_codebooks": (1,),
    "semantic_quantizer": ("rvq", None),
    "dilation": ([1, 3, 9], None),
    "residual_kernel_size": (7, None),
}
# Of training or of the file itself: they decide neither codes nor sound.
_IGNORED = {
    "quantizer_dropout", "semantic_quantizer_kwargs", "model_type", "architectures", "transformers_version",
    "torch_dtype", "dtype", "_target_",
}  # fmt: skip
_AUXILIARY = {"input_channel", "channels", "rates", "sample_rate", "is_causal", "d_out", "_target_", *list(_ONLY)[2:]}


def is_published(folder: Path) -> bool:
    """Whether a folder is in the published layout: its config.json names `encoder_rates`."""
    try:
        return "encoder_rates" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def config_from_published(values: dict[str, Any], exact_lengths: bool = False) -> LMSPTConfig:
    """Translates a published configuration.

    Args:
        values: what its config.json holds.
        exact_lengths: False keeps the published lengths; True pads input and output to whole frames.

    Raises:
        ValueError: a key is missing, unknown, or has a value that this model does not have.
    """
    auxiliary, found = _auxiliary_of(values)
    found = _key_problems(values) + found + _value_problems(values, auxiliary)
    if found:
        raise ValueError("published configuration: " + "; ".join(found))
    latent_dim = values.get("latent_dim") or values["encoder_dim"] * 2 ** len(values["encoder_rates"])
    if auxiliary.get("input_channel") not in (None, latent_dim):
        raise ValueError(f"published configuration: aux_decoder.input_channel must be latent_dim ({latent_dim})")
    widths, sizes, dims = (_of_both_parts(values, key) for key in ("encoder_dim", "codebook_size", "codebook_dim"))
    try:
        return LMSPTConfig(
            sampling_rate=values["sample_rate"],
            strides=values["encoder_rates"],
            encoder_architecture="dac",
            decoder_architecture="dac",
            auxiliary_decoder_architecture="dac",
            shared_encoder=bool(values.get("use_shared_encoder")),
            latent_dim=latent_dim,
            codebook_sizes=[sizes[0]] + [sizes[1]] * (values["n_codebooks"] - 1),
            codebook_dim=dims[1],
            semantic_codebook_dim=dims[0],
            semantic_subtraction=values["semantic_subtraction"],
            semantic_encoder_width=widths[0],
            semantic_encoder_layers=0,
            acoustic_encoder_width=widths[1],
            acoustic_encoder_layers=0,
            decoder_width=values["decoder_dim"],
            decoder_strides=values["decoder_rates"][::-1],
            decoder_layers=0,
            auxiliary_sampling_rate=auxiliary["sample_rate"],
            auxiliary_strides=auxiliary["rates"][::-1],
            auxiliary_decoder_width=auxiliary["channels"],
            auxiliary_decoder_layers=0,
            causal=bool(values.get("is_causal")),
            exact_lengths=exact_lengths,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"published configuration: {error}") from error


def _key_problems(values: dict[str, Any]) -> list[str]:
    missing = [key for key in _REQUIRED if key not in values]
    unknown = sorted(set(values) - {*_REQUIRED, *_SIZES, *_ONLY, *_IGNORED, "output_sample_rate"})
    return [f"{key} is missing" for key in missing] + [f"{key} is unknown" for key in unknown]


def _auxiliary_of(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The auxiliary decoder's part of a published configuration, and what is wrong with its keys."""
    auxiliary = values.get("aux_decoder")
    if auxiliary is None:  # the published code then builds a second main decoder
        of_decoder = {"channels": "decoder_dim", "rates": "decoder_rates", "sample_rate": "sample_rate"}
        return {key: values.get(name) for key, name in of_decoder.items()}, []
    if not isinstance(auxiliary, dict):
        return {}, [f"aux_decoder must hold its sizes, not {auxiliary!r}"]
    unknown = [f"aux_decoder.{key} is unknown" for key in sorted(set(auxiliary) - _AUXILIARY)]
    missing = [f"aux_decoder.{key} is missing" for key in ("channels", "rates", "sample_rate") if key not in auxiliary]
    return auxiliary, unknown + missing


def _value_problems(values: dict[str, Any], auxiliary: dict[str, Any]) -> list[str]:
    """What published values say that this model does not have; missing keys of `_REQUIRED` are not among it."""
    found = [
        f"{prefix}{key} must be {allowed[0]}, not {part[key]!r}"
        for prefix, part in (("", values), ("aux_decoder.", auxiliary))
        for key, allowed in _ONLY.items()
        if key in part and part[key] not in allowed
    ]
    if bool(auxiliary.get("is_causal")) != bool(values.get("is_causal")):
        found.append("aux_decoder.is_causal must be what is_causal is")
    rate = values.get("sample_rate")
    if values.get("output_sample_rate") not in (None, rate):
        found.append(f"output_sample_rate must be sample_rate ({rate}), not {values['output_sample_rate']!r}")
    rates = {key: values[key] for key in ("encoder_rates", "decoder_rates") if key in values}
    rates["aux_decoder.rates"] = auxiliary.get("rates")
    if auxiliary:
        found += [f"{key} must be a list, not {rate!r}" for key, rate in rates.items() if not isinstance(rate, list)]
    for key in ("encoder_dim", "codebook_size", "codebook_dim"):
        if None in _of_both_parts(values, key):
            found.append(f"{key} is missing")
    if values.get("latent_dim") is None and values.get("encoder_dim") is None:
        found.append("latent_dim is missing (it follows from encoder_dim alone)")
    return found


def _of_both_parts(values: dict[str, Any], key: str) -> list[Any]:
    """What a key says for the semantic and for the acoustic part: the part's own value, or the one for both."""
    return [values.get(f"{part}_{key}") or values.get(key) for part in ("semantic", "acoustic")]


def config_to_published(config: LMSPTConfig) -> dict[str, Any]:
    """Translates a configuration into the published names.

    Raises:
        ValueError: naming the keys that say something which the published layout cannot hold.
    """
    must = {
        "encoder_architecture": "dac", "decoder_architecture": "dac", "auxiliary_decoder_architecture": "dac",
        "auxiliary_decoder": "decoupled", "semantic_quantizer": "vq", "semantic_encoder_layers": 0,
        "acoustic_encoder_layers": 0, "decoder_layers": 0, "auxiliary_decoder_layers": 0,
    }  # fmt: skip
    found = [f"{key} must be {value}, not {getattr(config, key)}" for key, value in must.items()
             if getattr(config, key) != value]  # fmt: skip
    if len(set(config.codebook_sizes[1:])) > 1:
        found.append(f"codebook_sizes of the acoustic books must be equal, not {config.codebook_sizes[1:]}")
    if found:
        raise ValueError("the published layout holds DAC models alone: " + "; ".join(found))
    values = {
        "sample_rate": config.sampling_rate,
        "encoder_rates": config.strides,
        "decoder_rates": config.decoder_strides[::-1],
        "n_codebooks": config.num_codebooks,
        "n_semantic_codebooks": 1,
        "semantic_codebook_dim": config.semantic_codebook_dim,
        "acoustic_codebook_dim": config.codebook_dim,
        "semantic_subtraction": config.semantic_subtraction != "none",
        "use_shared_encoder": config.shared_encoder,
        "latent_dim": config.latent_dim,
        "decoder_dim": config.decoder_width,
        "semantic_codebook_size": config.codebook_sizes[0],
        "acoustic_codebook_size": config.codebook_sizes[1],
        "aux_decoder": {
            "input_channel": config.latent_dim,
            "channels": config.auxiliary_decoder_width,
            "rates": config.auxiliary_strides[::-1],
            "sample_rate": config.auxiliary_sampling_rate,
        },
    }
    if config.semantic_encoder_width == config.acoustic_encoder_width:
        values["encoder_dim"] = config.semantic_encoder_width
    else:
        values["semantic_encoder_dim"] = config.semantic_encoder_width
        values["acoustic_encoder_dim"] = config.acoustic_encoder_width
    if config.causal:
        values["is_causal"] = values["aux_decoder"]["is_causal"] = True
    return values


def load_published(source: str | Path, exact_lengths: bool = False) -> LMSPTModel:
    """Loads a model in the published layout.

    Args:
        source: a folder with config.json and weights.safetensors (or one other .safetensors file); a .safetensors file
            alone, or a folder with the released one alone, which are read with the release preset's sizes; or
            `kakaocorp/lmspt`, which is fetched from the hub.
        exact_lengths: False keeps the published lengths; True pads input and output to whole frames.

    Returns:
        The model in eval mode, fp32, with its weight norm, counted as trained.

    Raises:
        ValueError: a file is missing, torn or of other sizes, or the configuration says something unknown.
    """
    weights, configuration = _files(source)
    if configuration is None:
        config = preset_config(RELEASE_PRESET, exact_lengths=exact_lengths)
    else:
        try:
            values = json.loads(configuration.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{configuration} is not JSON ({error})") from error
        if not isinstance(values, dict) or "encoder_rates" not in values:
            raise ValueError(f"{configuration} is not in the published layout: it has no encoder_rates")
        config = config_from_published(values, exact_lengths)
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{weights} cannot be read ({error}): it is torn or no safetensors file; get it anew"
        ) from error
    config.trained = True
    with torch.device("meta"):
        model = LMSPTModel(config)
    wanted = model.state_dict()
    names = {key: _published_name(key, config) for key in wanted if not key.endswith(".usage")}
    problems = sorted(set(names.values()) - set(tensors))
    second_names = {second for name in names.values() for second in _second_names(name, config)}
    problems += [f"{name} (not of this model)" for name in sorted(set(tensors) - set(names.values()) - second_names)]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, not {_published_shape(key, wanted[key])}"
        for key, name in names.items()
        if name in tensors and tuple(tensors[name].shape) != _published_shape(key, wanted[key])
    ]
    problems += [f"{second} differs from {name}" for name in names.values() for second in _second_names(name, config)
             if second in tensors and name in tensors and not torch.equal(tensors[second], tensors[name])]  # fmt: skip
    if problems:
        raise ValueError(
            f"{weights} does not fit its configuration; {len(problems)} tensors missing or wrong: {problems[:5]}"
        )
    state = {key: tensors[name].float().view(wanted[key].shape).contiguous() for key, name in names.items()}
    for index, size in enumerate(config.codebook_sizes):
        # published running frequencies in this model's unit, 1 for even use; all zeros where none were recorded
        frequencies = state["acoustic_vocab_usage"][index - 1] if index else state["semantic_vocab_usage"][0]
        usage = frequencies / frequencies.sum() * size if frequencies.any() else torch.ones(size)
        state[f"quantizer.books.{index}.usage"] = usage
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_published(model: LMSPTModel, folder: str | Path) -> Path:
    """Writes a model in the published layout; returns the folder.

    What `load_published` read is written back bit for bit. A model whose weight norm was folded is written with its
    weights as directions and their norms as gains: other tensors, the same function.

    Raises:
        ValueError: the model has parts that the published layout cannot hold; the message names the keys.
    """
    folder, config = Path(folder), model.config
    values = config_to_published(config)
    tensors: dict[str, Tensor] = {}
    for key, tensor in _with_weight_norm(model).items():
        if key.endswith(".usage"):
            continue
        name = _published_name(key, config)
        tensors[name] = tensor.detach().cpu().reshape(_published_shape(key, tensor)).contiguous()
        for second in _second_names(name, config):
            tensors[second] = tensors[name].clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE)
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return folder


def _files(source: str | Path) -> tuple[Path, Path | None]:
    """The weights, and the configuration or None where it is the release's."""
    path = Path(source)
    if path.is_file():
        return path, None
    if path.is_dir():
        configuration = path / "config.json"
        files = [path / name for name in (WEIGHTS_FILE, PUBLISHED_FILE) if (path / name).is_file()]
        files = files or sorted(path.glob("*.safetensors"))
        if len(files) != 1 and not (files and files[0].name == WEIGHTS_FILE):
            raise ValueError(
                f"{path} has {'no' if not files else 'several'} .safetensors files: name one {WEIGHTS_FILE}"
            )
        if configuration.is_file():
            return files[0], configuration
        if files[0].name != PUBLISHED_FILE:
            raise ValueError(f"{path} has no config.json in the published layout (sample_rate, encoder_rates, ...)")
        return files[0], None
    if str(source) != PUBLISHED_REPO:
        raise ValueError(f"{source} is neither a folder, nor a .safetensors file, nor {PUBLISHED_REPO}")
    from huggingface_hub import hf_hub_download

    try:
        ask_hub(PUBLISHED_REPO, PUBLISHED_FILE)
        return Path(hf_hub_download(PUBLISHED_REPO, PUBLISHED_FILE)), None
    except Exception as error:  # the hub's errors and those of the network below it have no common class
        raise ValueError(
            f"cannot get {PUBLISHED_FILE} of {PUBLISHED_REPO} from the hub ({error.__class__.__name__}: no network, or "
            f"offline mode; {str(error).partition(chr(10))[0]}). Download it where there is a network (hf download "
            f"{PUBLISHED_REPO} {PUBLISHED_FILE} --local-dir FOLDER) and give the file"
        ) from error


_BOOK = re.compile(r"quantizer\.books\.(\d+)\.(.+)")
_PARTS = {"auxiliary_decoder.": "aux_decoder."}
_RENAMED: list[tuple[str, Callable[[re.Match[str]], str] | str]] = [
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
    (r"^project_in\.", "in_proj."),
    (r"^project_out\.", "out_proj."),
]


def _published_name(key: str, config: LMSPTConfig) -> str:
    """The published name of one of our tensors."""
    if key.endswith("_vocab_usage"):
        return f"quantizer.{key}"
    book = _BOOK.fullmatch(key)
    name = book[2] if book else key
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    if book:
        index = int(book[1])
        return (
            f"quantizer.rvq_first.quantizers.0.{name}"
            if not index
            else f"quantizer.rvq_rest.quantizers.{index - 1}.{name}"
        )
    if config.causal and not name.endswith(".alpha"):  # the published causal convolutions are wrapped once more
        name = re.sub(r"\.(bias|weight_g|weight_v)$", r".conv.\1", name)
    for ours, theirs in _PARTS.items():
        name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
    return name


def _published_shape(key: str, tensor: Tensor) -> tuple[int, ...]:
    """Projections are 1x1 convolutions there and linear layers here: one more dimension."""
    shape = tuple(tensor.shape)
    return (*shape, 1) if ".project_" in key and "original" in key else shape


def _second_names(name: str, config: LMSPTConfig) -> list[str]:
    """The second name of a shared encoder's tensor."""
    if not config.shared_encoder or not name.startswith("semantic_encoder."):
        return []
    return [name.replace("semantic_encoder.", "acoustic_encoder.", 1)]


def _with_weight_norm(model: LMSPTModel) -> dict[str, Tensor]:
    """The state with every weight as direction and gain."""
    state = model.state_dict()
    if model.config.weight_norm:
        return state
    for key in [key for key in state if key.endswith(".weight") and not key.endswith("codebook.weight")]:
        weight = state.pop(key)
        base = key.removesuffix("weight") + "parametrizations.weight.original"
        state |= {f"{base}0": torch.norm_except_dim(weight, 2, 0), f"{base}1": weight}
    return state
