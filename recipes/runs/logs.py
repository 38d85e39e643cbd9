"""What ``slm`` says in the terminal while it works."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from recipes.runs.machine import is_main_process

log = logging.getLogger("slm")
SHOWN = 20  # lines of one kind in the terminal; files hold all
ROOT, OWN = Path(__file__).resolve().parents[2], ("tokenizer", "slm", "eval", "recipes")
ISLANDS = (log, logging.getLogger("tokenizer"), logging.getLogger("eval"))


def setup_logging(level: int = logging.INFO) -> None:
    """Send the loggers of ``slm`` and of the islands to the terminal through rich, once; quieten libraries' notices.

    To stderr: what a command is asked for, such as a transcript, stands alone in stdout. Where that is no terminal but
    a file, a message stands whole on a line, however wide, so that it can be searched for.
    """
    from rich.console import Console
    from rich.logging import RichHandler
    from tqdm import tqdm

    class Handler(RichHandler):
        """Lines above a progress bar, not across it."""

        def emit(self, record: logging.LogRecord) -> None:
            with tqdm.external_write_mode():
                super().emit(record)

    if not log.handlers:
        console, clock = Console(stderr=True), "%H:%M:%S"
        handler: logging.Handler
        if console.is_terminal:
            handler = Handler(console=console, show_path=False, show_level=False, markup=False, log_time_format=clock)
        else:
            handler = Lines()
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", clock))
        for logger in ISLANDS:
            logger.addHandler(handler)
            logger.propagate = False
        warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
        # PEFT calls transformers by a deprecated name; nobody who runs a command can mend it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    for logger in ISLANDS:
        logger.setLevel(level if is_main_process() else logging.WARNING)


def _show_warning(
    others: Callable[..., None],
    message: Warning | str,
    category: type[Warning],
    filename: str,
    *where: Any,
    **more: Any,
) -> None:
    """A warning of our own, such as of a preset's random weights, as a line of the log: without a place in the code."""
    file = Path(filename)
    if category is UserWarning and file.is_relative_to(ROOT) and file.relative_to(ROOT).parts[0] in OWN:
        log.warning("%s", message)
    else:
        others(message, category, filename, *where, **more)


class Lines(logging.Handler):
    """Each message whole on a line of standard error, whatever that is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def hide_loading_bars() -> None:
    """Turn off transformers' bars over the tensors of a model being read or written; downloads keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    if not are_progress_bars_disabled():
        disable_progress_bar()
        enable_progress_bars()


def the_first(lines: Iterable[str]) -> list[str]:
    """So many lines as a reader takes in, and how many more there are."""
    lines = list(lines)
    rest = len(lines) - SHOWN
    return lines[:SHOWN] + ([f"... and {rest} more"] if rest > 0 else [])
