"""Every command of `slm`: what the command line knows of it without importing it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line knows of a recipe without importing it."""

    name: str
    about: str
    example: str
    details: str = ""  # a paragraph more, in its --help alone
    positional: str | None = None  # the Config field that plain arguments go to
    metavar: str = "KEY=VALUE"
    config: str | None = None  # the shipped configuration where no --config is given
    output: str | None = None  # the Config field of -o
    strict: str | None = None  # what --strict does, where it is taken
    voice: str | None = None  # the Config field of --voice
    backwards: str | None = None  # the Config field of --to-published
    from_scratch: str | None = None  # the shipped configuration of --train-tokenizer
    serves: str | None = None  # the Config field of --serve
    goes_on: bool = True  # whether an interrupted start leaves something that the next one uses
    restart: bool = True  # whether it keeps a folder that --restart could set aside

    @property
    def module(self) -> str:
        return "recipes.commands." + self.name.replace("-", "_")


STRICT_FILES = "Stop at the first file that cannot be used."
WHOLE = [
    Command(
        "quickstart",
        "The embedded models at three frame rates: a corpus, codes, an SLM for ASR and TTS, one scored table.",
        "slm quickstart",
        config="quickstart/quickstart",
        from_scratch="quickstart/from-scratch",
    ),
    Command(
        "compare",
        "Run the cells of one YAML (frame rates, tokenizers) through the recipes into one table.",
        "slm compare --config quickstart/compare",
    ),
]
DATA = [
    Command(
        "prepare-corpus",
        "Synthesise a corpus (commands, digits, sentences, phrases) with espeak-ng, flite and Piper.",
        "slm prepare-corpus --config quickstart/prepare-corpus run_dir=runs/corpus",
    ),
    Command(
        "cipher-corpus",
        "Add translations into a made-up language, word for word, to a manifest: data to try st and mt on.",
        "slm cipher-corpus data.0.path=runs/corpus/manifest.jsonl run_dir=runs/cipher",
    ),
    Command(
        "describe-corpus",
        "Let a text LLM answer instructions about recordings that it knows by their metadata alone (DeSTA2).",
        "slm describe-corpus data.0.path=runs/corpus/manifest.jsonl run_dir=runs/described model=LLM",
    ),
    Command(
        "align",
        "Align texts to their audio: each word, character and phone with its times, in a new manifest.",
        "slm align data.0.path=corpus/manifest.jsonl run_dir=runs/aligned plot=3",
    ),
    Command(
        "measure-prosody",
        "Measure each word of an aligned manifest: how long, high and loud it is said, for task tts-prosody.",
        "slm measure-prosody data.0.path=runs/aligned/manifest.jsonl run_dir=runs/prosody",
    ),
]
TOKENIZER = [
    Command(
        "train-teacher",
        "Train a small recogniser from scratch: the teacher's encoder and a judge.",
        "slm train-teacher --config quickstart/train-teacher run_dir=runs/teacher",
    ),
    Command(
        "train-tokenizer",
        "Train an LM-SPT tokenizer by semantic speech-resynthesis distillation.",
        "slm train-tokenizer --config quickstart/train-tokenizer run_dir=runs/tokenizer",
    ),
    Command(
        "convert",
        "Turn published LM-SPT weights into a tokenizer folder; --to-published goes back.",
        "slm convert kakaocorp/lmspt runs/lmspt-release",
        positional="paths",
        metavar="SOURCE OUT_DIR KEY=VALUE",
        backwards="to_published",
        goes_on=False,
    ),
    Command(
        "resynthesize",
        "Your own recordings through tokenizers and back, with scores and a page to listen to.",
        "slm resynthesize recording.wav -o heard",
        "It makes three outputs: reconstruction (main decoder, all codebooks; elsewhere this is called resynthesis), "
        "semantic reconstruction (main decoder, the semantic codebook alone) and resynthesis, the paper's word for "
        "what the auxiliary decoder makes of the semantic codebook.",
        goes_on=False,
        positional="files",
        metavar="FILE... KEY=VALUE",
        output="output",
        strict=STRICT_FILES,
    ),
    Command(
        "encode",
        "Turn a speech corpus into codes: Parquet shards with the tokenizer's fingerprint.",
        "slm encode --config quickstart/encode tokenizer=embedded-25hz run_dir=runs/codes",
        strict=STRICT_FILES,
    ),
    Command(
        "measure-codes",
        "Measure a tokenizer's codes: bitrates, perplexity, what they tell of the text, robustness, a probe.",
        "slm measure-codes --config embedded/measure-codes tokenizer=embedded-25hz run_dir=runs/code-measures-25hz",
        "corpus=FOLDER measures a coded corpus as it is; robustness wants its recordings besides (data=), characters "
        "an aligned manifest. What cannot be measured is said with its reason.",
    ),
]
SPEECH_LM = [
    Command(
        "train-lm",
        "Train a small text LM from scratch on a corpus's texts (where no pretrained one can be had).",
        "slm train-lm --config quickstart/train-lm run_dir=runs/lm",
    ),
    Command(
        "finetune",
        "Extend an LLM with speech tokens and fine-tune it for ASR and TTS, in full or by LoRA.",
        "slm finetune --config quickstart/finetune model=Qwen/Qwen2.5-0.5B-Instruct --dry-run",
        "task_weights.continuation=1 and task_weights.st=1 train two tasks more; those of your own are trained beside "
        "them: plugins=[my_tasks] task_weights.my_task=1, where my_tasks.py registers my_task "
        "(docs/architecture.md tells how).",
    ),
    Command(
        "finetune-continuous",
        "An LLM learns ASR from a frozen encoder's features, without codes: the topline of ASR from tokens.",
        "slm finetune-continuous --config baselines/speech-llama --dry-run",
    ),
    Command(
        "train-acoustic",
        "Train a second stage that fills the acoustic codebooks from semantic codes and a reference voice.",
        "slm train-acoustic --config embedded/train-acoustic corpus=runs/codes run_dir=runs/acoustic",
    ),
    Command(
        "train-preference",
        "Preference optimisation of a fine-tuned SLM's speech by a judge: DPO or GRPO, watched by a second judge.",
        "slm train-preference --config embedded/train-preference model=runs/finetune/model corpus=runs/codes --dry-run",
    ),
    Command(
        "transcribe",
        "Speech to text with a fine-tuned SLM: your own files, or a coded corpus.",
        "slm transcribe recording.wav",
        "Without model=... the embedded SLM of 12.5 Hz does it; your own: model=runs/quickstart/12.5hz/finetune/model. "
        "task=NAME runs another task that answers in text; plugins=[MODULE] brings tasks of your own.",
        positional="files",
        metavar="FILE... KEY=VALUE",
        goes_on=False,
    ),
    Command(
        "synthesize",
        "Text to speech with a fine-tuned SLM: your own words, or a coded corpus's texts.",
        'slm synthesize "the weather is fine today" -o out.wav',
        "Without model=... the embedded SLM of 12.5 Hz does it; your own: model=runs/quickstart/12.5hz/finetune/model. "
        "task=NAME runs another task that answers in speech; plugins=[MODULE] brings tasks of your own. "
        "--voice speaker.wav acoustic=runs/acoustic/model says it in that voice (slm train-acoustic).",
        positional="text",
        metavar="TEXT KEY=VALUE",
        output="output",
        strict="Refuse a text that holds what the model cannot say.",
        voice="voice",
        goes_on=False,
    ),
    Command(
        "generate",
        "Any task of a fine-tuned SLM by its name: transcribe and synthesize are the two that everyone knows.",
        "slm generate task=asr recording.wav\n"
        '  slm generate task=tts "the weather is fine today" -o out.wav\n'
        "  slm generate task=continuation model=RUN/model beginning.wav -o out.wav\n"
        "  slm generate task=st model=RUN/model corpus=runs/codes run_dir=runs/translations",
        "A task that answers in text runs as slm transcribe (asr, st), one that answers in speech as slm synthesize "
        "(tts, continuation), with their code and into the same files. It takes what their help tells: decoding.KEY as "
        "there, their further keys as options.KEY. docs/tasks.md has the table of tasks.",
        positional="inputs",
        metavar="FILE...|TEXT KEY=VALUE",
        output="output",
        goes_on=False,
    ),
]
TEXT_ALIGNED = [
    Command(
        "train-text-aligned",
        "Train speech tokens aligned to text, one frame of codes per word, on a coded corpus (TASTE).",
        "slm train-text-aligned --config baselines/taste corpus=runs/codes",
    ),
    Command(
        "encode-text-aligned",
        "Turn a coded corpus into word codes, a corpus of one frame per word that an SLM is fine-tuned on.",
        "slm encode-text-aligned model=runs/baselines/taste/model corpus=runs/codes run_dir=runs/word-codes",
    ),
    Command(
        "reconstruct-text-aligned",
        "Rebuild speech from its text and its word codes, to hear and score what these carry.",
        "slm reconstruct-text-aligned model=runs/baselines/taste/model corpus=runs/codes run_dir=runs/rebuilt",
    ),
]
EVALUATION = [
    Command(
        "evaluate",
        "Score recordings, codecs and predictions into results.json and report.html.",
        "slm evaluate --config quickstart/evaluate",
        strict=STRICT_FILES,
    ),
    Command(
        "score",
        "Score any system's transcripts or audio against references: Kaldi, JSONL, CSV, TSV, sclite files.",
        "slm score reference=text hypothesis=other-system.txt",
        "hypothesis=[a.txt,b.txt] scores several and draws each one's difference from the first. A folder of audio "
        "or predictions of speech need a judge: judges.0.name=embedded-recogniser, or protocol=NAME.",
        goes_on=False,
        output="output",
        strict="Refuse hypotheses whose ids are not those of the reference.",
    ),
    Command(
        "report",
        "Tables and page of results that are there; --serve: a page to transcribe, speak and listen on.",
        "slm report runs/compare\n  slm report --serve",
        positional="results",
        metavar="RUN_DIR KEY=VALUE",
        output="output",
        serves="serve",
        restart=False,
        goes_on=False,
    ),
    Command(
        "plot-training",
        "Draw the curves of one or several trainings, laid over each other, from their metrics.jsonl.",
        "slm plot-training runs/tokenizer runs/other-tokenizer -o curves.png",
        positional="runs",
        metavar="RUN_DIR... KEY=VALUE",
        output="output",
        restart=False,
        goes_on=False,
    ),
    Command(
        "export-versa",
        "An SLM's speech as input of VERSA, whose measures `slm evaluate versa=[FOLDER]` reads back.",
        "slm export-versa predictions=runs/synthesize data.0.path=runs/corpus/manifest.jsonl -o runs/versa",
        output="run_dir",
        goes_on=False,
    ),
]
SHARING = [
    Command(
        "export",
        "A trained model as a folder to share: fp16 weights, what loads them, a model card from its run.",
        "slm export runs/tokenizer -o shared/my-tokenizer",
        positional="source",
        metavar="SOURCE KEY=VALUE",
        output="output",
        goes_on=False,
    ),
]
# What `slm --help` shows, by topic.
TOPICS: dict[str, list[Command]] = {
    "From speech to a table": WHOLE,
    "Data": DATA,
    "Tokenizer": TOKENIZER,
    "Speech LM": SPEECH_LM,
    "Text-aligned tokens": TEXT_ALIGNED,
    "Evaluation": EVALUATION,
    "Sharing": SHARING,
}
COMMANDS = [command for commands in TOPICS.values() for command in commands]
