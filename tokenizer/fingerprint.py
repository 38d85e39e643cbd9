"""Fingerprints: equal ones mean that two tokenizers make the same codes, so that their corpora can be mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(identity: Mapping[str, Any], weights: Mapping[str, Tensor], precision: str = "fp32") -> str:
    """SHA-256 (hex) over settings, weights and precision.

    Args:
        identity: the settings that decide the codes, as JSON holds them.
        weights: name -> tensor, as `state_dict` gives them.
        precision: in which the codes are computed.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(identity, sort_keys=True).encode())
    add_weights(digest, weights)
    digest.update(precision.encode())
    return digest.hexdigest()


def add_weights(digest: hashlib._Hash, weights: Mapping[str, Tensor]) -> None:
    """Adds names, types, shapes and bytes of tensors to a digest, in the order of their names.

    Running statistics of codebook use (`*usage`) are left out: they change no code. Nor does the sign of a zero, which
    averaging loses from weights that are frozen.
    """
    for name, tensor in sorted(weights.items()):
        if not name.endswith("usage"):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = (tensor.detach().cpu() + 0).contiguous().reshape(-1)  # -0.0 + 0 is 0.0
            digest.update(flat.view(torch.uint8).numpy().tobytes())
