"""The keys of `slm synthesize`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recipes.inference.keys import language_key, model_key, wording_key
from recipes.inference.setup import check_inputs
from recipes.inference.speech_files import audio_format
from recipes.plugins import plugins_key
from recipes.runs.run_folder import ADJUSTABLE
from slm.acoustic.pieces import AcousticDecoding
from slm.prosody import ProsodyControl
from slm.settings import SynthesizeSettings
from tokenizer.data.utterances import DataSource

UNKNOWN_LONGEST_TEXT = 200  # characters said in one go, where a model does not tell how long its training's texts were


@dataclass
class Config:
    """What is said with what."""

    run_dir: str = field(default="", metadata={"help": "where audio and predictions go; may be empty with a text"})
    model: str = model_key()
    task: str = field(
        default="",
        metadata={
            "help": "what is asked of the model: a task that answers in speech; empty: tts-aligned, where the text is "
            "given word by word, if the model has learnt that, else tts"
        },
    )
    text: str = field(default="", metadata={"help": "what to say"})
    files: list[str] = field(
        default_factory=list,
        metadata={"help": "or recordings, for a task whose prompt is speech alone, such as continuation"},
    )
    output: str = field(
        default="",
        metadata={
            "help": "the file for a single answer without run_dir; its ending names the format (wav, flac, ogg, mp3); "
            "empty: out.wav",
            **ADJUSTABLE,
        },
    )
    data: DataSource | None = field(default=None, metadata={"help": "or a data source, e.g. data.path=manifest.jsonl"})
    corpus: str | None = field(default=None, metadata={"help": "or a coded corpus: the run_dir of `slm encode`"})
    split: str = field(default="test", metadata={"help": "split of the data source or corpus"})
    limit: int | None = field(default=None, metadata={"help": "only the first N texts"})
    join: int = field(
        default=1,
        metadata={
            "help": "so many texts of data or corpus in a row are said as one: longer than those of the training, to "
            "see whether words are lost; what is left over is left out. Such a text is not cut unless max_characters "
            "is set. `slm evaluate` scores it without data"
        },
    )
    tokenizer: str = field(default="", metadata={"help": "speech tokenizer; empty: the one the model was trained with"})
    decoding: SynthesizeSettings = field(default_factory=SynthesizeSettings, metadata={"help": "how codes are drawn"})
    prosody: ProsodyControl = field(
        default_factory=ProsodyControl,
        metadata={"help": "of task=tts-prosody: what is asked beside the prosody that the model writes by itself"},
    )
    acoustic: str = field(
        default="",
        metadata={"help": "acoustic stage (RUN_DIR/model of `slm train-acoustic`) that fills the codebooks left out"},
    )
    voice: str = field(default="", metadata={"help": "with acoustic: a recording of the voice to speak in (--voice)"})
    acoustic_decoding: AcousticDecoding = field(
        default_factory=AcousticDecoding, metadata={"help": "how the acoustic stage draws"}
    )
    wording: str | None = wording_key()
    language: str = language_key()
    prompt_share: float = field(
        default=0.5,
        metadata={
            "help": "of a task that continues speech: the share of each utterance of data or corpus that it hears; "
            "the length of the rest stands beside the answer's. Of `files` it hears all"
        },
    )
    max_characters: int | None = field(
        default=None,
        metadata={
            "help": "a longer text is cut into sentences, those at commas; counted as it is said; null: the length of "
            "all but 1 % of the training's texts, and for the pieces of a longer sentence no more than last as long as "
            f"all but 1 % of its recordings; {UNKNOWN_LONGEST_TEXT} where the model does not tell it"
        },
    )
    pause_s: float = field(
        default=0.3, metadata={"help": "silence put between two sentences of a text that is cut; in a sentence half"}
    )
    strict: bool = field(
        default=False, metadata={"help": "refuse a text that holds what the model cannot say, in place of a warning"}
    )
    stream: bool = field(
        default=False,
        metadata={"help": "write the sound of a single text while its codes still come, sentence after sentence"},
    )
    weights: str = field(default="fp32", metadata={"help": "how the model is held: fp32, bf16, fp16"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda"})
    plugins: list[str] = plugins_key()

    # Of finished folders.
    former_defaults = {"decoding.seconds_per_character": 0.25, "decoding.min_seconds": 4.0}

    def __post_init__(self) -> None:
        check_inputs(self, "text", "files")
        if len(self.files) > 1 and not self.run_dir:
            raise ValueError("run_dir: needed with several files; that is where their answers go")
        if self.join < 1 or (self.join > 1 and not (self.data or self.corpus)):
            raise ValueError(f"join: {self.join} must be at least 1, and above 1 there must be data or corpus")
        if not 0 < self.prompt_share < 1:
            raise ValueError(f"prompt_share: {self.prompt_share:g} must be above 0 and below 1")
        if self.max_characters is not None and self.max_characters < 1:
            raise ValueError(f"max_characters: {self.max_characters} must be at least 1, or null")
        if self.pause_s < 0:
            raise ValueError(f"pause_s: {self.pause_s:g} must be 0 or more")
        audio_format(self.output_file)
        if bool(self.acoustic) != bool(self.voice):
            given, missing = ("voice", "acoustic") if self.voice else ("acoustic", "voice")
            example = "acoustic=runs/acoustic/model (`slm train-acoustic` makes it)"
            raise ValueError(f"{given}: needs {missing} too, such as {example if self.voice else 'voice=speaker.wav'}")
        if self.acoustic and self.stream:
            raise ValueError("stream: not with acoustic, which fills the codebooks of whole sentences")
        if self.stream and self.decoding.multi_token > 1:
            raise ValueError("stream: gives a token a pass so far; leave decoding.multi_token at 1")
        if self.stream and (self.run_dir or self.files or self.data or self.corpus or self.decoding.retries):
            raise ValueError("stream: for a single text, without run_dir, files, data, corpus and decoding.retries")
        if self.output and self.run_dir:
            raise ValueError(
                f"output (-o): {self.output!r} would be ignored with run_dir, where audio goes to "
                f"{self.run_dir}/audio; give one of the two"
            )

    @property
    def output_file(self) -> str:
        """Where the audio of a single answer goes."""
        return self.output or "out.wav"

    @property
    def own_inputs(self) -> list[str | Path]:
        """What it is asked to answer where neither a data source nor a corpus is given."""
        return [Path(path) for path in self.files] or [self.text]
