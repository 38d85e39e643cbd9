"""What ``slm score`` does between its files and its report: ids joined, audio read by judges, rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.differences import difference_of
from eval.judges.judge import check_judge
from eval.judges.transcripts import CachedJudge
from eval.protocol import Protocol, TestSet, test_set_sha256
from eval.schema import Results, Row, make_row
from eval.text.wer import score_pairs
from recipes.config import ConfigError, Problems
from recipes.runs.embedded import resolve_judge
from recipes.runs.machine import resolve_device
from recipes.runs.own_folders import some_of
from recipes.scoring.judges import load_judges
from recipes.scoring.labels import distinct
from recipes.scoring.predictions import count_faults
from recipes.scoring.protocols import Settled, audio_files_sha256, made_with, resampled, settle, unsegmented_note
from recipes.scoring.recordings import Recordings
from recipes.scoring.text_files import KALDI, Entry, TextFile, read_texts
from tokenizer.data.utterances import Utterance

__all__ = ["Job", "prepare", "score"]

AUDIO_HZ = 16_000  # judges listen at this rate
HARDLY = 0.5  # of the ids of the smaller file: with fewer in common, a form was likely taken for another


@dataclass
class Job:
    """Files that were read and fit together."""

    reference: TextFile
    hypotheses: dict[str, TextFile]  # by name
    settled: Settled
    identities: list[dict[str, Any]]  # of the judges, where there is audio to read
    resampled: str
    n_speakers: int | None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def audio_sha256(self) -> str | None:
        """Digest of the reference's recordings; None where not every line names one."""
        entries = self.reference.entries
        if not all(entry.audio for entry in entries.values()):
            return None
        return audio_files_sha256(Utterance(id=i, audio=str(entry.audio)) for i, entry in entries.items())

    @property
    def texts(self) -> dict[str, str]:
        """id -> reference."""
        return {identity: entry.text or "" for identity, entry in self.reference.entries.items()}

    def facts(self, config: Any) -> dict[str, object]:
        """The plan."""
        words = sum(len(self.settled.normaliser(text).split()) for text in self.texts.values())
        facts: dict[str, object] = {
            "reference": f"{self.reference.path} ({_form(self.reference)})",
            "utterances": len(self.texts),
            "reference words": words,
            "normaliser": f"{self.settled.normaliser.name} {self.settled.normaliser.version}",
            "bootstrap over": self.resampled,
            "result": config.output or "printed alone",
        }
        if self.settled.name:
            facts["protocol"] = self.settled.name
        if self.identities:
            facts["judges"] = {one["name"]: f"{one['kind']}, {one['decoding']}" for one in self.identities}
        for name, file in self.hypotheses.items():
            answered = sum(identity in file.entries for identity in self.texts)
            facts[f"hypothesis {name}"] = f"{file.path} ({_form(file)}): {answered} of {len(self.texts)} utterances"
        return facts | ({"notes": self.notes} if self.notes else {})


def _form(file: TextFile) -> str:
    return f"{file.form}, column {file.column}" if file.column else file.form


def prepare(config: Any) -> Job:
    """Read and check every file and setting; `config` is that of `slm score`.

    Raises:
        ConfigError: several problems are told together.
        JudgeError: a judge is missing.
    """
    problems = Problems("slm score")
    settled = problems.attempt(settle, config.protocol, config.judges, config.normaliser)
    problems.attempt(resolve_device, config.device)
    names = config.names or distinct([_label(name) for name in config.hypothesis])
    files = [problems.attempt(read_texts, name, "hypothesis", config.columns) for name in config.hypothesis]
    source = config.reference or config.hypothesis[0]
    reference = problems.attempt(read_texts, source, "reference", config.columns, config.split)
    if reference is not None and config.reference is None:
        problems.attempt(_refuse_same_column, reference, files[0])
    problems.raise_all()
    settled = replace(settled, alignment=config.alignment)
    hypotheses = dict(zip(names, files, strict=True))
    if len(hypotheses) < len(names):
        raise ConfigError(f"names: two hypotheses are called the same ({', '.join(names)})")
    notes = list(settled.notes)
    for name, file in hypotheses.items():
        problems.attempt(lambda name=name, file=file: notes.extend(_joined(name, file, reference, config.strict)))
    problems.raise_all()
    if not any(settled.normaliser(entry.text or "") for entry in reference.entries.values()):
        raise ConfigError(f"reference: {reference.path}: no utterance has a word, so there is nothing to score against")
    spoken = [name for name, file in hypotheses.items() if file.is_audio]
    if spoken and not settled.judges:
        raise ConfigError(
            f"judges: {', '.join(spoken)} is audio and needs a reader: judges=[{{name: embedded-recogniser}}], or "
            "protocol=NAME"
        )
    if settled.reference == "judge" and (not spoken or not all(entry.audio for entry in reference.entries.values())):
        raise ConfigError(
            f"protocol {settled.name} scores audio against what its judge hears in the recordings: give a reference "
            "whose lines name their audio (a manifest), and hypotheses that are audio"
        )
    if not spoken:  # a protocol's judge has nothing to read
        settled = replace(settled, judges=[])
    identities = [problems.attempt(lambda judge=judge: check_judge(resolve_judge(judge))) for judge in settled.judges]
    problems.raise_all()
    speakers = {entry.speaker for entry in reference.entries.values()}
    n_speakers = None if "" in speakers else len(speakers)
    return Job(
        reference=reference,
        hypotheses=hypotheses,
        settled=settled,
        identities=identities,
        resampled=resampled(
            config.resample, n_speakers, "add a column `speaker` to the reference (Kaldi: utt2spk beside text)"
        ),
        n_speakers=n_speakers,
        notes=notes,
    )


def _label(name: str) -> str:
    """A file's name in tables; that of its folder where every file there is called so."""
    path = Path(name)
    common = path.stem in ("text", "manifest", "predictions", "hyp", "hypotheses", "results")
    return (path.resolve().parent.name if common and not path.is_dir() else path.stem) or name


def _refuse_same_column(reference: TextFile, hypothesis: TextFile) -> None:
    """Raises ConfigError where one file was to give both sides and has one column of texts."""
    if reference.column == hypothesis.column:
        raise ConfigError(
            f"reference: {hypothesis.path} has one column of texts, {hypothesis.column or 'the only one'}: give "
            "reference=FILE, or reference_column and hypothesis_column"
        )


def _joined(name: str, file: TextFile, reference: TextFile, strict: bool) -> list[str]:
    """Notes on ids that one side has alone.

    Raises:
        ConfigError: the two share none; with ``strict``, any differ.
    """
    missing = [identity for identity in reference.entries if identity not in file.entries]
    extra = [identity for identity in file.entries if identity not in reference.entries]
    if len(missing) == len(reference.entries):
        raise ConfigError(
            f"hypothesis: {file.path} has none of the {len(reference.entries)} ids of {reference.path}: there they are "
            f"like {missing[0]!r}, here like {extra[0]!r}. {_as_read(file)}; {_as_read(reference)}"
        )
    found = []
    n_shared = len(reference.entries) - len(missing)
    if n_shared < HARDLY * min(len(reference.entries), len(file.entries)):
        found.append(
            f"{name}: its ids hardly meet the reference's: {n_shared} of {len(file.entries)} are among its "
            f"{len(reference.entries)}. {_as_read(file)}; {_as_read(reference)}"
        )
    elif by_word := [one for one in (file, reference) if one.ids_look_like_words]:
        found.append(f"{name}: {'; '.join(map(_as_read, by_word))}")
    if missing:
        found.append(f"{name}: no answer for {_count(missing)}, counted as failed ({some_of(missing)})")
    if extra:
        found.append(f"{name}: {_count(extra)} beyond the reference, not scored ({some_of(extra)})")
    if strict and (missing or extra):
        raise ConfigError(f"{'; '.join(found)}; leave --strict out to count them so")
    return found


def _as_read(file: TextFile) -> str:
    """The form that was assumed of a file, and the way out where its lines have no ids."""
    if file.form != KALDI:
        return f"{file.path} was read as {file.form}"
    return (
        f"{file.path} was read as Kaldi's `id words`: the first word of each line is its id, such as "
        f"{next(iter(file.entries))!r} (if the lines of both files have no ids, number them: `nl -ba -w1 -s' ' FILE`)"
    )


def _count(ids: Sequence[str]) -> str:
    return f"{len(ids)} utterance{'s' * (len(ids) != 1)}"


def score(config: Any, job: Job) -> Results:
    """Every row: texts as they are, audio as each judge reads it."""
    heard_before = None if config.output is None else Path(config.output) / "transcripts"
    judges = load_judges(job.settled.judges, resolve_device(config.device), heard_before)  # first: one may be missing
    rows = [
        _row(config, job, name, {}, {i: e.text for i, e in file.entries.items()}, job.texts)
        for name, file in job.hypotheses.items()
        if not file.is_audio
    ]
    notes = list(job.notes)
    _add_differences(rows)
    spoken = {name: file for name, file in job.hypotheses.items() if file.is_audio}
    for judge in judges:
        references = job.texts
        if job.settled.reference == "judge":
            heard = _heard(config, judge, "recordings", job.reference.entries, notes)
            references = {identity: text for identity, text in heard.items() if text is not None}
        own = []
        for name, file in spoken.items():
            entries = {identity: file.entries[identity] for identity in job.texts if identity in file.entries}
            texts = _heard(config, judge, name, entries, notes)
            own.append(_row(config, job, name, judge.judge.identity, texts, references))
        judge.check()
        _add_differences(own)
        rows += own
    notes += [f"counted as failed: {error}" for judge in judges for error in judge.errors]
    notes += unsegmented_note(list(job.texts.values()), job.settled.normaliser)
    return Results(title=config.title, rows=rows, notes=notes, versions=made_with(config))


def _heard(
    config: Any, judge: CachedJudge, name: str, entries: Mapping[str, Entry], notes: list[str]
) -> dict[str, str | None]:
    """What a judge hears in audio files; one that cannot be read has no transcript, and a note says why."""
    utterances = [Utterance(id=identity, audio=str(entry.audio)) for identity, entry in entries.items() if entry.audio]
    recordings = Recordings(utterances, AUDIO_HZ, config.batch_seconds, strict=False)
    texts: dict[str, str | None] = dict.fromkeys(entries)
    for batch in recordings.batches():
        texts |= judge.transcribe({i: audio for i, audio in batch.items() if audio.size}, AUDIO_HZ, name)
    notes += [note for note in recordings.notes.values() if note not in notes]
    return texts


def _row(
    config: Any,
    job: Job,
    name: str,
    judge: dict[str, Any],
    texts: Mapping[str, str | None],
    references: Mapping[str, str],
) -> Row:
    entries = job.reference.entries
    ids, by_judge = list(references), job.settled.reference == "judge" and bool(judge)
    test_set = f"{_label(str(job.reference.path))} {config.split or ''}".strip()
    protocol = Protocol(
        task="speech" if judge else "asr",
        judge=judge,
        test_set=TestSet(
            test_set, test_set_sha256(list(references.items())), len(ids), job.audio_sha256 if judge else None
        ),
        reference="judge" if by_judge else "text",
        seed=config.seed,
        bootstrap_samples=config.bootstrap_samples,
        resampled=job.resampled,
        n_speakers=job.n_speakers,
        **job.settled.rules(bool(judge)),
    )
    rates = score_pairs(
        list(references.values()),
        [texts.get(identity) for identity in ids],
        job.settled.normaliser,
        ids,
        [entries[identity].speaker for identity in ids],
        [entries[identity].duration for identity in ids],
        job.settled.alignment,
    )
    answers = [job.hypotheses[name].entries[i] for i in ids if i in job.hypotheses[name].entries]
    told = [entry.faults for entry in answers if entry.faults is not None]
    facts = {"faults": count_faults(told)} if told else {}
    return make_row(name, "speech" if judge else "transcripts", "", protocol, rates, **facts)


def _add_differences(rows: Sequence[Row]) -> None:
    """Each row's difference from the first."""
    for row in rows[1:]:
        if len(row.utterances) > 1 and row.n_words:
            row.difference = difference_of(row, rows[0])
