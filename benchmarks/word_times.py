"""How near an aligner's words are to GRID's own: ``python benchmarks/word_times.py MANIFEST [MANIFEST ...]``.

    python benchmarks/word_times.py runs/aligned/manifest.jsonl runs/aligned-whisper/manifest.jsonl [--picture FILE.svg]

The manifests are those of `slm align` on grid-s1's test split, of any aligner. Reference are the word boundaries of the
GRID corpus (24 utterances in tests/grid_words.json); the picture shows six of them above the first manifest's words.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

OWN = Path(__file__).resolve().parents[1] / "tests" / "grid_words.json"
SHOWN = 6
HEAD = ["aligned by", "words", "starts: mean, median", "within 50, 100 ms", "ends: mean, median", "within 50, 100 ms"]


def grid_words() -> dict[str, np.ndarray]:
    """Start and end of each word in seconds, (W, 2), by utterance."""
    own = json.loads(OWN.read_text(encoding="utf-8"))
    found = {name: np.array(edges) / own["unit_hz"] for name, edges in own["boundaries"].items()}
    return {name: np.stack([edges[:-1], edges[1:]], axis=1) for name, edges in found.items()}


def aligned_words(path: Path) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Times (W, 2) and words of each utterance of an aligned manifest."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    words = {row["id"]: row["words"] for row in rows if row.get("words")}
    times = {name: np.array([(word["start"], word["end"]) for word in own]) for name, own in words.items()}
    return times, {name: [word["word"] for word in own] for name, own in words.items()}


def line(name: str, found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> str:
    """The table's, of one aligner."""
    off = np.abs(np.concatenate([found[name] - wanted[name] for name in wanted if name in found]))
    cells = [name, str(len(off))]
    for side in off.T:
        cells.append(f"{1000 * side.mean():.0f} ms, {1000 * np.median(side):.0f} ms")
        cells.append(f"{100 * (side < 0.05).mean():.0f} %, {100 * (side < 0.1).mean():.0f} %")
    return f"| {' | '.join(cells)} |"


def draw(found: dict[str, np.ndarray], words: dict[str, list[str]], wanted: dict[str, np.ndarray], path: Path) -> None:
    """Some utterances, each with GRID's words above the aligner's."""
    names = [name for name in wanted if name in found][:SHOWN]
    figure = Figure(figsize=(9.0, 0.75 * len(names) + 0.6), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        for times, above, colour in ((wanted[name], 0.0, "#3d8fd1"), (found[name], 0.34, "#e0803c")):
            widths = times[:, 1] - times[:, 0]
            axes.barh([row + above] * len(times), widths, 0.3, times[:, 0], color=colour, edgecolor="white")
        for (start, end), word in zip(wanted[name], words[name], strict=True):
            axes.text((start + end) / 2, row, word, ha="center", va="center", fontsize=7, color="white")
    axes.set_yticks([row + 0.17 for row in range(len(names))], names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0.3, 2.6)
    axes.set_xlabel("seconds; above: GRID's own words, below: the aligner's")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifests", nargs="+", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    wanted = grid_words()
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for path in options.manifests:
        found, words = aligned_words(path)
        if not set(found) & set(wanted):
            parser.error(f"{path}: holds words of none of GRID's utterances in {OWN.name}; align grid-s1's test split")
        print(line(path.parent.name, found, wanted))
        if options.picture and path == options.manifests[0]:
            draw(found, words, wanted, options.picture)


if __name__ == "__main__":
    main()
