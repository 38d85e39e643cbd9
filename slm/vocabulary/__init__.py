"""Where speech gets its ids: the one place that knows offsets.

The ids follow the text tokenizer's own, in named groups: the four marks, book 0's codes, book 1's, ..., and groups that
were added later, such as prosody. A group keeps its ids for good: what a model learns later goes behind all that it
has. A model's table may have more rows than its tokenizer has ids: new ids start at `len(tokenizer)` all the same.

`groups` lays them out, `ids` is the vocabulary itself, `file` its speech_vocabulary.json, `extension` adds the tokens
to a text tokenizer.
"""

from slm.vocabulary.extension import add_marks, add_prosody, add_speech
from slm.vocabulary.file import FILE_NAME, FORMAT, FORMAT_3
from slm.vocabulary.groups import MARKS, PROSODY, SYNTHESIZE, TRANSCRIBE, Group, VocabularyError
from slm.vocabulary.ids import SpeechVocabulary

__all__ = [
    "FILE_NAME",
    "FORMAT",
    "FORMAT_3",
    "MARKS",
    "PROSODY",
    "SYNTHESIZE",
    "TRANSCRIBE",
    "Group",
    "SpeechVocabulary",
    "VocabularyError",
    "add_marks",
    "add_prosody",
    "add_speech",
]
