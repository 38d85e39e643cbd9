"""An exported folder on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token

from recipes.config import ConfigError

NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_push(repository: str) -> None:
    """Raises ConfigError for what would only show once the folder is written: a name that is none, nobody logged in."""
    if not NAME.fullmatch(repository):
        raise ConfigError(f"push_to_hub: {repository!r} is no name of a repository, which is owner/name")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("push_to_hub: HF_HUB_OFFLINE is set, so nothing is sent; unset it, or leave push_to_hub out")
    if get_token() is None:
        raise ConfigError("push_to_hub: nobody is logged in; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repository: str, private: bool) -> str:
    """Sends a whole folder as one commit, beside what the repository holds; returns its address.

    Args:
        folder: What is sent; it stays.
        repository: `owner/name`; made where there is none.
        private: Whether a new one is seen by its owner alone; one that is there stays as it is.

    Raises:
        ConfigError: The hub refused or was out of reach. The folder is whole, and the message says how to send it.
    """
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        sent = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"slm export: {folder.name}")
    except Exception as error:  # noqa: BLE001 - every network library raises its own
        raise ConfigError(
            f"push_to_hub: {repository} was not sent ({type(error).__name__}: {str(error).splitlines()[0]}). {folder} "
            f"is whole: `hf upload {repository} {folder}` sends it"
        ) from error
    return str(sent)
