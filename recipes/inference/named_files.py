"""Files named on a command line: those that cannot be used make the command end with an error once the others are done.

A row of a corpus that cannot be used is skipped and counted, and the command ends well: a corpus of thousands has such
rows. A file that somebody named is one that they asked for, so what was not made of it is told by the exit status too.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenizer.data.utterances import AudioError

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
