"""From codes to text and from text to codes: batched, kept to legal ids, what did not end told and never repaired.

`text` writes answers in text and `speech` draws those in codes (`drawing`: of a batch of prompts), with `words` for the
tasks that give their words one by one and `prosody` for those that write it first; `streaming` gives an answer's codes
while they come. `speech_lm` is the model they ask, `outputs` what they give, `shared` what they have in common.

Shapes: B prompts of a batch; V ids; codes (n, F) of the n codebooks the model uses.
"""

from slm.generation.outputs import SaidWord, SynthesizeOutput, TranscribeOutput
from slm.generation.prosody import draw_prosody
from slm.generation.speech import generate_speech, synthesize_codes
from slm.generation.speech_lm import SpeechLM
from slm.generation.streaming import stream_speech
from slm.generation.text import generate_text, transcribe_codes

__all__ = [
    "SaidWord",
    "SpeechLM",
    "SynthesizeOutput",
    "TranscribeOutput",
    "draw_prosody",
    "generate_speech",
    "generate_text",
    "stream_speech",
    "synthesize_codes",
    "transcribe_codes",
]
