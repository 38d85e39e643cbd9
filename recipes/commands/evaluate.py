"""``slm evaluate``: scores for recordings, a tokenizer and an SLM's predictions, in ``results.json`` and a report.

Each judge reads every system's audio: the recordings (ground truth), the tokenizer's reconstruction, semantic
reconstruction and resynthesis, and what the SLM says. What the SLM writes is scored text against text. Every row has S,
D, I, N, its interval and its protocol; whatever fails is counted and scored as all words missed. Audio is made once,
however many judges read it, a batch at a time, and not kept: memory follows the longest recording, not their number.
What judges heard is kept as they go: an evaluation that was killed goes on.

A task of the SLM whose reference is no transcript but another column, such as a translation, is scored on a test set of
its own: the same utterances with the texts that its predictions bring. Translations get BLEU and chrF beside; a task
without a reference, such as continuation, no error rates, but what judges hear and the measures of its audio.

Real-time factors: (encode + generate) / seconds heard for ASR, (generate + decode) / seconds spoken for TTS, (encode +
decode) / seconds for a tokenizer's own rows; reading and writing of files is not counted.

Errors: ConfigError for settings, predictions or data that do not fit together; JudgeError for a judge that is missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eval.codes import CodeStatistics, code_statistics
from eval.differences import difference_of
from eval.judges.transcripts import CachedJudge
from eval.report.documents import write_documents
from eval.report.page import write_report
from eval.report.terminal import format_table
from eval.rescoring import outdated, up_to_date
from eval.results_file import load_results, save_results
from eval.schema import Results, Row, make_row, speakers_of
from eval.speech.measures.registry import chosen_measures
from eval.speech.quality import QualitySummary
from eval.systems import is_task
from eval.text.lengths import in_order
from eval.text.translation import can_score_translations, score_translations
from eval.text.wer import score_pairs
from recipes.config import ConfigError
from recipes.encoding.plan import HEADER_THREADS, durations_of, refuse_unreadable
from recipes.runs.files import read_json
from recipes.runs.logs import log
from recipes.runs.run_folder import RunFolder, command_text
from recipes.scoring.acoustic import SpeakerVoices
from recipes.scoring.audio_pass import CLIP_S, Listening, Players, spread, write_listings
from recipes.scoring.codec_systems import CodecSystems
from recipes.scoring.evaluation import Config, Job, prepare
from recipes.scoring.judges import load_judges
from recipes.scoring.labels import model_label
from recipes.scoring.predictions import Predictions, predicted_audio, predicted_system
from recipes.scoring.protocols import audio_files_sha256, made_with, unsegmented_note
from recipes.scoring.recordings import Recordings
from recipes.scoring.systems import System, SystemAudio
from recipes.scoring.versa import summarise_versa, with_versa
from tokenizer.precision import exact_fp32

AUDIO_HZ = 16_000  # recordings, where no tokenizer asks for another rate, and synthesised speech
# Row kinds against which a row's difference is drawn, the first that there is; speech of every task as that of TTS.
BASELINES = {
    "reconstruction": ("ground_truth",),
    "semantic_reconstruction": ("ground_truth",),
    "acoustic_stage": ("semantic_reconstruction", "ground_truth"),
    "resynthesis": ("ground_truth",),
    "tts": ("semantic_reconstruction", "reconstruction", "ground_truth"),
}


def plan(config: Config) -> dict[str, object]:
    """What an evaluation would do; raises all that would stop it, together."""
    job = prepare(config)
    if config.strict:
        refuse_unreadable(job.utterances, durations_of(job.utterances, HEADER_THREADS), strict=True)
    seconds = [u.duration for u in job.utterances if u.duration is not None]
    facts: dict[str, object] = {
        "test set": job.test_set.name,
        "utterances": job.test_set.n,
        "reference words": sum(len(job.normaliser(text).split()) for text in job.texts.values()),
        "minutes of recordings": round(sum(seconds) / 60, 2),
        "normaliser": f"{job.normaliser.name} {job.normaliser.version}",
        "intervals": job.protocol(config, "speech", {}).interval_text(),
        "judges": {identity["name"]: f"{identity['kind']}, {identity['decoding']}" for identity in job.identities},
        "device": job.device,
        "result": str(RunFolder(config.run_dir).path("report.html")),
    }
    if job.tokenizer is not None:
        tokenizer = job.tokenizer.config
        facts["tokenizer"] = {
            "name": model_label(config.tokenizer),
            "frame rate (Hz)": tokenizer.frame_rate,
            "codebooks": tokenizer.codebook_sizes,
            "speech tokens (about)": round(sum(seconds) * tokenizer.frame_rate),
        }
    for found in job.predictions:
        facts[f"predictions {found.path.parent}"] = f"{found.task}, {sum(i in found.lines for i in job.ids)} utterances"
    return facts


@exact_fp32()  # judges and tokenizers whose protocol says fp32
def run(config: Config) -> Path:
    """Score everything and write the run folder; returns it."""
    folder = RunFolder(config.run_dir)
    folder.check(config)
    job = prepare(config)
    if folder.complete:
        if read_json(folder.path("run.json")).get("data_fingerprint") != job.fingerprint():
            raise ConfigError(
                f"{config.run_dir} holds the scores of other inputs (predictions, texts, judge or tokenizer have "
                "changed since): choose another run_dir, or start over with --restart"
            )
        if not _rescore_outdated(folder):
            log.info("%s is complete: skipped", config.run_dir)
        return folder.folder
    heard = Path(config.transcripts_dir or folder.path("transcripts"))
    judges = load_judges(job.settled.judges, job.device, heard, config.strict)  # first: one may be missing
    folder.start(config, job.fingerprint())
    if job.utterances:
        job.test_set = replace(job.test_set, audio_sha256=audio_files_sha256(job.utterances))
    work = _gather(config, job)
    playable = set(work.recordings.readable if work.recordings else ())
    playable |= {i for found, _ in work.spoken for i, line in found.lines.items() if line.get("audio")}
    players = Players(folder.path("samples"), spread([i for i in job.texts if i in playable], config.samples))
    measures = chosen_measures(config.measures, config.measure_models) if config.quality else []
    listening = Listening(work.systems, judges, players, measures)
    compared = any(measure.needs_reference and not measure.time_aligned for measure in measures)
    for batch in work.audio_batches(job.ids, config.batch_seconds, compared):
        listening.add(batch)
    if work.codec is not None:
        work.codec.finish()
    for judge in judges:
        judge.check()
    notes = _failures(job, work, judges)
    if players.cut:
        notes.append(f"players hold the first {CLIP_S:g} s of longer recordings")
    rows = _rows(config, job, work.systems, judges)
    results = Results(
        title=config.title,
        rows=rows,
        codes=_codes(config, job, work.codec),
        quality=_quality(config, job, listening),
        samples=players.samples(job.texts, work.systems, job.test_set.sha256),
        notes=[*job.settled.notes, *notes, *_text_notes(job, rows), *_task_notes(work.systems), *_speed_notes(rows)],
        created=time.strftime("%Y-%m-%d %H:%M"),
        command=command_text(),
        versions=made_with(config),
        text_lengths=in_order(config.text_lengths),
    )
    _write(results, folder)
    folder.mark_complete({f"{row.protocol.judge.get('name', row.protocol.task)}: {row.name}": row.wer for row in rows})
    log.info("report: %s", folder.path("report.html"))
    return folder.folder


def _quality(config: Config, job: Job, listening: Listening) -> list[QualitySummary]:
    """The audio's measures: our own, and VERSA's beside them."""
    drawn = (config.bootstrap_samples, config.seed, job.speakers if job.resampled == "speakers" else None)
    versa = [summarise_versa(scores, job.ids, job.test_set.name, *drawn) for scores in job.versa]
    return with_versa(listening.quality(job.ids, job.test_set.name, *drawn), versa)


def _write(results: Results, folder: RunFolder) -> None:
    """Every form of the results; the tables are printed too."""
    save_results(results, folder.folder)
    write_report(results, folder.folder)
    write_documents(results, folder.folder)
    write_listings(folder.folder, results.rows)
    print(format_table(results), flush=True)


def _rescore_outdated(folder: RunFolder) -> bool:
    """Score a complete evaluation again from its stored texts where its normaliser has changed since; whether it was.

    Raises:
        ConfigError: it is outdated, and an older version did not keep the texts.
    """
    results = load_results(folder.folder)
    if not (changed := outdated(results)):
        return False
    try:
        results = up_to_date(results)
    except ValueError as error:
        raise ConfigError(f"{folder.folder} was normalised by {', '.join(changed)}: {error}") from error
    log.info("%s was normalised by %s: scored again from the stored texts", folder.folder, ", ".join(changed))
    _write(results, folder)
    return True


def _text_notes(job: Job, rows: Sequence[Row]) -> list[str]:
    """What readers of the WER should know of the references."""
    notes = unsegmented_note(list(job.texts.values()), job.normaliser)
    left_out = {row.protocol.test_set.n for row in rows if row.protocol.reference == "judge"}
    if left_out and min(left_out) < len(job.texts):
        notes.append(f"{len(job.texts) - min(left_out)} recordings that the judge could not read are no references")
    return notes


def _task_notes(systems: Sequence[System]) -> list[str]:
    """What readers should know of tasks whose answers are no transcripts."""
    notes = []
    if translating := [system.name for system in systems if system.translates]:
        names = ", ".join(translating)
        notes.append(f"WER and CER of {names} count every other wording of a translation as errors")
        if not can_score_translations():
            notes.append(f"{names}: BLEU and chrF need sacrebleu, which is not installed (the extra `eval` brings it)")
    if open_ended := [system.name for system in systems if system.column == ""]:
        notes.append(f"{', '.join(open_ended)}: it is not known what should be said, so there are no error rates")
    return notes


def _failures(job: Job, work: Work, judges: Sequence[CachedJudge]) -> list[str]:
    """What could not be read, by us or by a judge. Raises ConfigError where that is every recording."""
    notes = work.notes + [f"counted as failed: {error}" for judge in judges for error in judge.errors]
    if work.recordings is None:
        return notes
    unread = [work.recordings.notes[i] for i in job.texts if i in work.recordings.notes]
    if len(unread) == len(job.utterances):
        raise ConfigError(f"{job.test_set.name}: no recording can be read; the first: {unread[0]}")
    return unread + notes


def _codes(config: Config, job: Job, codec: CodecSystems | None) -> list[CodeStatistics]:
    """How the tokenizer's books are used, here and in the coded corpora."""
    if codec is None:
        return job.code_use
    facts, label = codec.tokenizer.config, model_label(config.tokenizer)
    return [
        code_statistics(
            codec.codes,
            facts.codebook_sizes,
            facts.frame_rate,
            label,
            job.test_set.name,
            len(job.utterances) - len(codec.codes),
        ),
        *job.code_use,
    ]


def _rows(config: Config, job: Job, systems: Sequence[System], judges: Sequence[CachedJudge]) -> list[Row]:
    """Every judge's rows of all that it read, then the SLM's own texts."""
    rows: list[Row] = []
    spoken = [system for system in systems if system.answers == "speech"]
    for judge in judges:
        identity = judge.judge.identity
        heard = systems[0].transcripts[judge.name] if job.settled.reference == "judge" else None
        judged = [
            _row(config, job, "speech", identity, system, system.transcripts[judge.name], heard) for system in spoken
        ]
        _add_differences(judged, spoken)
        rows += judged
    own = [system for system in systems if system.answers == "text"]
    return rows + [_row(config, job, system.kind, {}, system, system.texts) for system in own]


@dataclass
class Work:
    """What is scored, and where its audio comes from."""

    systems: list[System]
    notes: list[str]
    recordings: Recordings | None = None
    codec: CodecSystems | None = None
    spoken: list[tuple[Predictions, System]] = field(default_factory=list)

    def audio_batches(self, ids: Sequence[str], batch_seconds: float, compared: bool = False) -> Iterator[SystemAudio]:
        """All audio, a batch at a time: recordings, what the tokenizer makes of them, synthesised speech.

        Args:
            ids: all utterances.
            batch_seconds: of audio that is held at a time.
            compared: whether synthesised speech comes with the recordings of its utterances.
        """
        for batch in self.recordings.batches() if self.recordings is not None else ():
            yield SystemAudio(self.recordings.system, batch)
            if self.codec is not None:
                yield from self.codec.audio_batches(batch)
        for predictions, system in self.spoken:
            for batch in predicted_audio(predictions, system, ids, batch_seconds, self.notes):
                if compared and self.recordings is not None:
                    batch = replace(batch, recordings=self.recordings.read(batch.audios))
                yield batch


def _gather(config: Config, job: Job) -> Work:
    """Every system, named, without its audio yet."""
    work = Work(systems=[], notes=[])
    if job.utterances and (job.settled.judges or job.tokenizer is not None):
        rate = job.tokenizer.config.sampling_rate if job.tokenizer is not None else AUDIO_HZ
        work.recordings = Recordings(job.utterances, rate, config.batch_seconds, config.strict)
        work.systems.append(work.recordings.system)
        if job.tokenizer is not None:
            tokenizer, label = job.tokenizer.to(job.device), model_label(config.tokenizer)
            voices = None
            if config.acoustic:
                parts = (job.utterances, config.acoustic_decoding, job.precision, job.device, config.seed)
                voices = SpeakerVoices(config.acoustic, tokenizer, *parts)
            work.codec = CodecSystems(tokenizer, label, config.batch_seconds, job.precision, job.device, voices)
            work.systems += work.codec.systems
    for predictions in job.predictions:
        system, more = predicted_system(predictions, job.ids, AUDIO_HZ, job.column)
        work.systems.append(system)
        work.notes += more
        if predictions.answers == "speech":
            work.spoken.append((predictions, system))
        own = job.tokenizer.fingerprint(job.precision) if job.tokenizer is not None else None
        if own and system.fingerprint and system.fingerprint != own:
            work.notes.append(
                f"{predictions.path}: made with other codes than those of tokenizer {config.tokenizer} at "
                f"{job.precision}, so none of its rows is their topline"
            )
    systems = work.systems
    names = [system.name for system in systems]
    for position, system in enumerate(systems):
        if names.count(names[position]) > 1:  # several models at one task: a row's name tells them apart
            number = names[: position + 1].count(names[position])
            same = [s.model for s in systems if s.kind == system.kind].count(system.model) > 1
            system.name = f"{names[position]} ({system.model}{f' {number}' if same else ''})"
    return work


def _speed_notes(rows: Sequence[Row]) -> list[str]:
    """On which machine the rows' real-time factors were measured."""
    machines: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.machine and row.real_time_factor is not None:
            machines.setdefault(row.machine, {})[row.name] = None
    every = len(machines) == 1
    return [
        f"real-time factors{'' if every else ' of ' + ', '.join(names)} were measured on {machine}"
        for machine, names in machines.items()
    ]


def _row(
    config: Config,
    job: Job,
    task: str,
    judge: dict[str, Any],
    system: System,
    texts: dict[str, str | None],
    heard: dict[str, str | None] | None = None,
) -> Row:
    """One system's row; ``heard`` are the judge's own transcripts of the recordings, where they are the reference."""
    if heard and not system.references:
        references = {i: text for i, text in heard.items() if text is not None}
        test_set = job.test_set_with(references, job.test_set.name)
        protocol = job.protocol(config, task, judge, test_set, "judge")
    else:
        references = system.references or job.texts
        protocol = job.protocol(config, task, judge, job.test_set_of(system))
    ids = list(references)
    rates = score_pairs(
        list(references.values()),
        [texts.get(i) for i in ids],
        job.normaliser,
        ids,
        [job.speakers.get(i, "") for i in ids],
        [job.durations.get(i) for i in ids],
    )
    translation = None
    if system.translates and can_score_translations():
        drawn = (speakers_of(protocol, rates.utterances), protocol.bootstrap_samples, protocol.seed)
        translation = score_translations(rates.utterances, *drawn)
    return make_row(system.name, system.kind, system.model, protocol, rates, translation=translation, **system.facts)


def _add_differences(rows: list[Row], systems: list[System]) -> None:
    """Draw each row's difference from its topline.

    That of speech by the SLM is the decoder it speaks with (same tokenizer, as many books), if that was scored on the
    same references.
    """
    for row, system in zip(rows, systems, strict=True):
        for kind in BASELINES.get("tts" if is_task(row.system) else row.system, ()):
            against = next(
                (
                    other
                    for other, source in zip(rows, systems, strict=True)
                    if other.system == kind
                    and other.protocol == row.protocol
                    and (
                        kind == "ground_truth"
                        or (source.fingerprint, source.codes_per_second)
                        == (system.fingerprint, system.codes_per_second)
                    )
                ),
                None,
            )
            if against is not None and len(row.utterances) > 1:
                row.difference = difference_of(row, against)
                break
