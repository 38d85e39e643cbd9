"""The models that come with this package, by name: small tokenizers at three frame rates, and two recognisers.

Each lies in `tokenizer/weights/NAME` as its training's result would, exported (`slm export`): fp16 on disk, computed
with in fp32, with a README.md that says what it was made from and how it scores.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
TOKENIZERS = ("embedded-25hz", "embedded-12.5hz", "embedded-6.25hz")
RECOGNISERS = ("embedded-recogniser", "embedded-second-recogniser")
EMBEDDED = (*TOKENIZERS, *RECOGNISERS)
_NEEDED = ("config.json", "model.safetensors")


class EmbeddedError(ValueError):
    """A name that begins as embedded models' do is none, or its files are missing; the message lists the names."""


def embedded_folder(name: str) -> Path | None:
    """The folder of an embedded tokenizer or recogniser; None where the name is not of that form (`embedded-...`).

    Raises:
        EmbeddedError: there is no such embedded model, or its files are missing from this installation.
    """
    if not name.startswith("embedded-") or "/" in name:
        return None
    if name not in EMBEDDED:
        if Path(name).exists():
            return None
        raise EmbeddedError(f"no embedded model is called {name!r}; this package has {', '.join(EMBEDDED)}")
    folder = WEIGHTS / name
    if missing := [file for file in _NEEDED if not (folder / file).is_file()]:
        there = ", ".join(installed()) or "none"
        raise EmbeddedError(
            f"{name}: its files are missing from this installation ({folder} has no {' and no '.join(missing)}; "
            f"complete here: {there}). Install the package again, or name a folder of your own (`slm train-tokenizer`, "
            "`slm train-teacher`)"
        )
    return folder


def installed() -> list[str]:
    """The names whose files are there."""
    return [name for name in EMBEDDED if all((WEIGHTS / name / file).is_file() for file in _NEEDED)]
