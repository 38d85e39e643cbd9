"""A page to listen to: recordings, and beside each what codecs make of it, in one HTML file with the audio inside.

Shapes: S samples of one mono waveform.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from jinja2 import Environment, FileSystemLoader

__all__ = ["PageClip", "PageRecording", "audio_uri", "listening_page"]


@dataclass
class PageClip:
    """One row: which model, which way back to sound, the audio as a URI, the cells, and what a judge heard."""

    model: str
    way: str
    audio: str
    cells: list[str]
    heard: str | None = None


@dataclass
class PageRecording:
    """One recording with its clips; ``facts`` is a line of text about it."""

    name: str
    facts: str
    audio: str
    heard: str | None = None
    clips: list[PageClip] = field(default_factory=list)


def audio_uri(audio: np.ndarray, sampling_rate: int) -> str:
    """A waveform (S,) as a data URI: FLAC, since a lossy format would add a codec of its own."""
    stream = io.BytesIO()
    soundfile.write(stream, np.clip(audio, -1, 1), sampling_rate, format="FLAC", subtype="PCM_16")
    return f"data:audio/flac;base64,{base64.b64encode(stream.getvalue()).decode()}"


def listening_page(
    title: str,
    recordings: Sequence[PageRecording],
    headings: Sequence[str],
    about: Sequence[str] = (),
    notes: Sequence[str] = (),
    judge: str = "",
    created: str = "",
) -> str:
    """The page as HTML: no outside resource, all text escaped.

    Args:
        title: the page's heading.
        recordings: what to show, in this order.
        headings: of the clips' cells.
        about: lines under the title: how to read the figures.
        notes: what went wrong.
        judge: who read the clips; empty: nobody.
        created: when, as text.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("listening.html.j2").render(
        title=title,
        recordings=recordings,
        headings=headings,
        about=about,
        notes=notes,
        judge=judge,
        created=created,
    )
