"""Whether the Hugging Face hub can be asked for a name, found out in seconds.

Its libraries repeat each question for about half a minute where there is no network. Here it is asked twice, a second
apart, which a network that fails now and then gets through; one that is slow has five seconds for each answer.
"""

from __future__ import annotations

import time
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

TIMEOUT_S, WAIT_S = 5.0, 1.0


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
    try:
        _ask(name, dataset)
    except OSError:
        time.sleep(WAIT_S)
        _ask(name, dataset)


def _ask(name: str, dataset: bool) -> None:
    api = HfApi()
    try:
        (api.dataset_info if dataset else api.model_info)(name, timeout=TIMEOUT_S)
    except HfHubHTTPError:  # it answers
        return
    except Exception as error:  # every network library raises its own
        raise OSError(
            f"the Hugging Face hub cannot be reached ({type(error).__name__}) and {name} is not in the local cache: "
            "give a local folder. Where there is never a network, HF_HUB_OFFLINE=1 leaves the asking out"
        ) from error


def _is_cached(name: str, file: str, revision: str | None, dataset: bool) -> bool:
    if not dataset:
        return isinstance(try_to_load_from_cache(name, file, revision=revision), str)
    from datasets import config

    return Path(config.HF_DATASETS_CACHE, name.replace("/", "___")).is_dir()
