"""Files named on a command line: those that cannot be used make the command end with an error once the others are done.

A row of a corpus that cannot be used is skipped and counted, and the command ends well: a corpus of thousands has such
rows. A file that somebody named is one that they asked for, so what was not made of it is told by the exit status too.
A dry run reads the named files whole and ends in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tokenizer.data.utterances import AudioError, Utterance
from tokenizer.long_form.long_audio import check_readable

MOST_NAMES = 10


class UnusableFiles(AudioError):
    """Some of the files that were named could not be used; what could be made of the others is there."""


def unusable_files(failed: Mapping[str, str], n_files: int, rest: str, told: bool = False) -> UnusableFiles:
    """The error that ends a command some of whose named files could not be used.

    Args:
        failed: the reason why not, by the file's name.
        n_files: how many were named.
        rest: what became of the others.
        told: the reasons were shown before, and are not given again.

    Returns:
        An error whose last line counts and names the files.
    """
    names = list(failed)[:MOST_NAMES]
    more = f" and {len(failed) - len(names)} more" if len(failed) > len(names) else ""
    last = f"{len(failed)} of {n_files} files could not be used, {rest}: {', '.join(names)}{more}"
    return UnusableFiles("\n".join([*(() if told else failed.values()), last]))


def check_named_files(files: Sequence[str], max_duration_s: float | None = None) -> None:
    """Reads every file whole, as a dry run does; what is longer than `max_duration_s` cannot be used.

    Raises:
        UnusableFiles: names those that cannot be used, and why.
    """
    failed = {}
    for path in files:
        try:
            check_readable(Utterance(path, path), max_duration_s)
        except AudioError as error:
            failed[path] = str(error)
    if failed:
        raise unusable_files(failed, len(files), "and the command would end like this")
