"""The small text LLM that comes with this package, by name: `embedded-lm`, in `slm/weights/embedded-lm`.

It knows the sentences of the corpora that the embedded tokenizers were trained on and is there to be fine-tuned where
no larger model can be had. fp16 on disk, computed with in fp32; its README.md says what it was made from.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
EMBEDDED = ("embedded-lm",)
_NEEDED = ("config.json", "tokenizer.json", "model.safetensors")


class EmbeddedError(ValueError):
    """A name that begins as embedded models' do is none, or its files are missing; the message lists the names."""


def embedded_folder(name: str) -> Path | None:
    """The folder of an embedded LLM; None where the name is not of that form (`embedded-...`).

    Raises:
        EmbeddedError: there is no such embedded LLM, or its files are missing from this installation.
    """
    if not name.startswith("embedded-") or "/" in name:
        return None
    if name not in EMBEDDED:
        if Path(name).exists():
            return None
        raise EmbeddedError(f"no embedded LLM is called {name!r}; this package has {', '.join(EMBEDDED)}")
    folder = WEIGHTS / name
    if missing := [file for file in _NEEDED if not (folder / file).is_file()]:
        raise EmbeddedError(
            f"{name}: its files are missing from this installation ({folder} has no {' and no '.join(missing)}). "
            "Install the package again, or name another model (a folder made by `slm train-lm`, a hub name)"
        )
    return folder
