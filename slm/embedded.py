"""The small models that come with this package, by name, in `slm/weights/NAME`.

`embedded-lm` is a text LLM: it knows the sentences of the corpora that the embedded tokenizers were trained on and is
there to be fine-tuned where no larger model can be had. `embedded-slm-25hz`, `-12.5hz` and `-6.25hz` already hear and
speak the codes of the embedded tokenizer of that rate. fp16 on disk, computed with in fp32; each README.md says what
its model was made from and how it scores.
"""

from __future__ import annotations

from pathlib import Path

from slm.vocabulary import FILE_NAME as VOCABULARY_FILE

WEIGHTS = Path(__file__).parent / "weights"
TEXT_LM = "embedded-lm"
SPEECH_LMS = ("embedded-slm-25hz", "embedded-slm-12.5hz", "embedded-slm-6.25hz")
DEFAULT_SPEECH_LM = "embedded-slm-12.5hz"  # what transcribes and synthesises where no model is named
EMBEDDED = (TEXT_LM, *SPEECH_LMS)
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
    needed = (*_NEEDED, VOCABULARY_FILE) if name in SPEECH_LMS else _NEEDED
    if missing := [file for file in needed if not (folder / file).is_file()]:
        raise EmbeddedError(
            f"{name}: its files are missing from this installation ({folder} has no {' and no '.join(missing)}). "
            "Install the package again, or name another model (a folder made by `slm train-lm`, a hub name)"
        )
    return folder
