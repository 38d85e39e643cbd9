"""Whether the Hugging Face hub can be asked for a name, found out in seconds.

Its libraries repeat each question for about half a minute where there is no network. Here it is asked twice, a second
apart, which a network that fails now and then gets through; one that is slow has five seconds for each answer. A hub
that could not be reached is not asked again, for any name, for a minute: a plan may hold dozens.
"""

from __future__ import annotations

import time
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

TIMEOUT_S, WAIT_S, BELIEVED_S = 5.0, 1.0, 60.0
_unreached: list[tuple[float, str]] = []  # when the hub could not be reached last, and the kind of the error


def ask_hub(name: str, file: str = "config.json", *, revision: str | None = None, dataset: bool = False) -> None:
    """Returns where a name's files are in the local cache, the hub answers, or offline mode lets nobody ask it.

    What is wrong with the name itself the libraries say, and at once.

    Args:
        name: `owner/name`.
        file: one whose presence in the cache tells that the model is there.
        revision: of the model, a commit say; None: the newest.
        dataset: whether it names a data set, not a model.

    Raises:
        OSError: the hub cannot be reached; the message says what to do.
    """
    if constants.HF_HUB_OFFLINE or _is_cached(name, file, revision, dataset):
        return
    if not (_unreached and time.monotonic() - _unreached[0][0] < BELIEVED_S):
        _unreached[:] = [] if (kind := _error_of(name, dataset)) is None else [(time.monotonic(), kind)]
    if _unreached:
        raise OSError(
            f"the Hugging Face hub cannot be reached ({_unreached[0][1]}) and {name} is not in the local cache: "
            "give a local folder. Where there is never a network, HF_HUB_OFFLINE=1 leaves the asking out"
        )


def _error_of(name: str, dataset: bool) -> str | None:
    """The kind of error that asking twice ended in; None where the hub answered."""
    api, kind = HfApi(), None
    for wait_s in (0.0, WAIT_S):
        time.sleep(wait_s)
        try:
            (api.dataset_info if dataset else api.model_info)(name, timeout=TIMEOUT_S)
            return None
        except HfHubHTTPError:  # it answers
            return None
        except Exception as error:  # every network library raises its own
            kind = type(error).__name__
    return kind


def _is_cached(name: str, file: str, revision: str | None, dataset: bool) -> bool:
    if not dataset:
        return isinstance(try_to_load_from_cache(name, file, revision=revision), str)
    from datasets import config

    return Path(config.HF_DATASETS_CACHE, name.replace("/", "___")).is_dir()
