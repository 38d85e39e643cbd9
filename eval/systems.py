"""Kinds of system: recordings, what a tokenizer makes of them, and the tasks of an SLM, with their names in tables."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "SYSTEMS",
    "SYSTEM_NAMES",
    "TASK_PREFIX",
    "is_task",
    "says_texts",
    "system_name",
    "systems_of",
    "task_system",
]

# Kinds of system, in the order of tables.
SYSTEM_NAMES = {
    "ground_truth": "ground truth",
    "reconstruction": "reconstruction",
    "semantic_reconstruction": "semantic reconstruction",
    "acoustic_stage": "acoustic stage",
    "resynthesis": "resynthesis",
    "tts": "SLM TTS",
    "asr": "SLM ASR",
    # What other systems made, as files (`slm score`).
    "speech": "speech",
    "transcripts": "transcripts",
}
SYSTEMS = tuple(SYSTEM_NAMES)
TASK_PREFIX = "slm-"  # a kind that begins so is a further task of the SLM; what follows is the task's name


def task_system(task: str) -> str:
    """The kind of the rows of one of the SLM's tasks.

    >>> task_system("asr"), task_system("st")
    ('asr', 'slm-st')
    """
    return task if task in ("asr", "tts") else TASK_PREFIX + task


def is_task(system: str) -> bool:
    """Whether a kind of system is a task of the SLM."""
    return system in ("asr", "tts") or system.startswith(TASK_PREFIX)


def system_name(system: str) -> str:
    """A kind of system as tables call it.

    >>> system_name("asr"), system_name("slm-st")
    ('SLM ASR', 'SLM st')
    """
    return SYSTEM_NAMES.get(system) or f"SLM {system.removeprefix(TASK_PREFIX)}"


def says_texts(system: str) -> bool:
    """Whether a kind of system says texts: TTS, or a further task of that name.

    >>> says_texts("tts"), says_texts("slm-tts-aligned"), says_texts("slm-st")
    (True, True, False)
    """
    return system == "tts" or system.startswith(f"{TASK_PREFIX}tts-")


def systems_of(systems: Iterable[str]) -> list[str]:
    """Each kind once, in the order of tables: those of SYSTEMS, then further tasks by name."""
    found = set(systems)
    return [*(system for system in SYSTEMS if system in found), *sorted(found - set(SYSTEMS))]
