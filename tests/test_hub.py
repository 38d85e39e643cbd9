"""Names of the Hugging Face hub without a network: an error in seconds that says the way out, of every kind of name."""

from __future__ import annotations

import time
from collections.abc import Callable

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

import eval.judges.judge
import slm.model.modeling
import tokenizer.hub
from eval.judges.config import JudgeConfig
from eval.judges.judge import check_judge
from slm.model.modeling import resolve_model
from tokenizer import load_tokenizer
from tokenizer.data.manifest import read_source
from tokenizer.data.streams import open_stream
from tokenizer.data.utterances import DataSource
from tokenizer.teacher.whisper import TeacherConfig, teacher_width

ASKED: dict[str, Callable[[], object]] = {
    "tokenizer": lambda: load_tokenizer("owner/codec"),
    "published tokenizer": lambda: load_tokenizer("kakaocorp/lmspt"),
    "teacher": lambda: teacher_width(TeacherConfig(name="owner/whisper")),
    "judge": lambda: check_judge(JudgeConfig(name="owner/judge")),
    "LLM": lambda: resolve_model("owner/llm"),
    "data set": lambda: read_source(DataSource("owner/set"), "train"),
    "streamed data set": lambda: open_stream(DataSource("owner/set", stream=True), "train"),
}


@pytest.fixture
def hub(monkeypatch, tmp_path) -> list[Exception | None]:
    """A hub that answers each question with the next of these; None: that the name is there."""
    answers: list[Exception | None] = []

    def answer(self, name, timeout):
        if (error := answers.pop(0)) is not None:
            raise error

    def fetches(*_, **__):
        raise OSError("the library was asked")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("model_info", "dataset_info"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, answer)
    for name in ("transformers.PreTrainedConfig.get_config_dict", "transformers.AutoConfig.from_pretrained"):
        monkeypatch.setattr(name, fetches)
    for name in ("datasets.load_dataset", "huggingface_hub.hf_hub_download"):
        monkeypatch.setattr(name, fetches)
    for module, name in (
        (tokenizer.hub, "WAIT_S"),
        (slm.model.modeling, "HUB_WAIT_S"),
        (eval.judges.judge, "_HUB_WAIT_S"),
    ):
        monkeypatch.setattr(module, name, 0.0)
        monkeypatch.setattr(module, "_unreached", [])
    return answers


@pytest.mark.parametrize("kind", ASKED)
def test_without_a_network_two_questions_are_enough(hub, kind) -> None:
    hub += [ConnectionError("no network"), TimeoutError("nor now")]
    with pytest.raises(ValueError, match="TimeoutError") as error:
        ASKED[kind]()
    assert not hub and "HF_HUB_OFFLINE=1" in str(error.value) and "folder" in str(error.value)
    assert "the library was asked" not in str(error.value)


@pytest.mark.parametrize("kind", ASKED)
def test_a_hub_that_was_not_reached_is_not_asked_again_for_a_minute(hub, kind, monkeypatch) -> None:
    hub += [ConnectionError("no network"), TimeoutError("nor now")]
    for _ in range(5):  # cells of a comparison
        with pytest.raises(ValueError, match="TimeoutError"):
            ASKED[kind]()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    hub.append(None)
    if kind == "LLM":
        assert resolve_model("owner/llm") == "owner/llm"
    else:
        with pytest.raises(ValueError, match=r"the library was asked|\(OSError"):
            ASKED[kind]()
    assert not hub


@pytest.mark.parametrize("kind", sorted(set(ASKED) - {"LLM"}))
def test_a_network_that_fails_once_is_no_error(hub, kind) -> None:
    hub += [ConnectionError("once"), None]
    with pytest.raises(ValueError, match=r"the library was asked|\(OSError"):
        ASKED[kind]()
    assert not hub


def test_an_llm_s_too(hub) -> None:
    hub += [ConnectionError("once"), None]
    assert resolve_model("owner/llm") == "owner/llm"


@pytest.mark.parametrize("kind", sorted(set(ASKED) - {"LLM"}))
def test_what_the_hub_answers_is_left_to_the_library(hub, kind) -> None:
    hub.append(HfHubHTTPError.__new__(HfHubHTTPError))
    with pytest.raises(ValueError, match=r"the library was asked|\(OSError"):
        ASKED[kind]()
    assert not hub


@pytest.mark.parametrize("kind", ["teacher", "judge"])
def test_a_revision_that_is_in_the_cache_is_not_asked_for(hub, kind, monkeypatch, tmp_path) -> None:
    """A model that was fetched by its commit has no branch in the cache."""
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--owner--pinned" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    pinned = {
        "teacher": lambda: teacher_width(TeacherConfig(name="owner/pinned", revision=commit)),
        "judge": lambda: check_judge(JudgeConfig(name="owner/pinned", revision=commit)),
    }
    with pytest.raises(ValueError, match="the library was asked"):  # and the hub was not: it has no answer
        pinned[kind]()
