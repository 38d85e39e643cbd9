"""The folder of a small model beside the LLM (config.json, model.safetensors): is it one, and are its weights whole.

The acoustic stage and the text-aligned model are loaded so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

FILES = ("config.json", "model.safetensors")
Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class ModelFolder:
    """A folder that is said to hold a small model.

    Args:
        path: As the user gave it.
        key: The configuration's key that named it, for messages.
        what: What it should hold, such as "text-aligned model".
        command: That writes such a folder, such as "train-acoustic".
        error: What is raised where it cannot be used.
    """

    path: str | Path
    key: str
    what: str
    command: str
    error: type[ValueError]

    def settings(self, *model_types: str) -> dict[str, Any]:
        """What config.json says.

        Args:
            model_types: Those that are wanted, one of which it has to name.

        Raises:
            ValueError: `error`; a file is missing, config.json is no JSON object, or it is of another model.
        """
        folder = Path(self.path)
        about = f"give the model folder that `slm {self.command}` wrote (RUN_DIR/model)"
        for name in FILES:
            if not (folder / name).is_file():
                raise self.error(f"{self.key}: {folder} has no {name}; {about}")
        try:
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            kind = settings.get("model_type")
        except (ValueError, AttributeError) as error:
            raise self.error(f"{self.key}: {folder / 'config.json'} is not a JSON object ({error}); {about}") from error
        if kind not in model_types:
            raise self.error(f"{self.key}: {folder} holds a model of type {kind!r}, no {self.what}; {about}")
        return settings

    def load(self, model_class: type[Model], device: str) -> Model:
        """Its model on a device, in eval mode and fp32.

        Raises:
            ValueError: `error`; the weights are torn or do not fit config.json.
        """
        try:
            model, report = model_class.from_pretrained(self.path, output_loading_info=True, dtype=torch.float32)
        except (RuntimeError, SafetensorError) as error:
            raise self.error(
                f"{self.key}: {self.path}: the weights cannot be read ({error}): copy the folder again"
            ) from None
        if absent := sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"]):
            raise self.error(f"{self.key}: {self.path}: the weights do not fit config.json; missing: {absent[:5]}")
        return model.to(device).eval()
