"""The speech vocabulary: ids, and that no text becomes one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from slm_tiny import SENTENCES, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from slm.vocabulary import MARKS, SpeechVocabulary, VocabularyError, add_marks, add_speech


@pytest.mark.parametrize("n_codebooks", [1, 2])
def test_ids_follow_the_tokenizers_own_and_invert(n_codebooks: int) -> None:
    tokenizer = tiny_tokenizer()
    text_size = len(tokenizer)
    vocabulary = add_speech(tokenizer, [12, 7], n_codebooks=n_codebooks, fingerprint="a", frame_rate=12.5)
    assert vocabulary.speech_id == text_size and len(tokenizer) == vocabulary.size
    assert tokenizer.convert_tokens_to_ids("<|speech_0_5|>") == vocabulary.offsets[0] + 5
    for book, ids in enumerate(vocabulary.speech_ids()):
        names = [f"<|speech_{book}_{code}|>" for code in range(vocabulary.codebook_sizes[book])]
        assert tokenizer.convert_tokens_to_ids(names) == ids.tolist()
    codes = np.array([[0, 11, 5], [6, 0, 3]])
    ids = vocabulary.ids_from_codes(codes)
    names = tokenizer.convert_ids_to_tokens(ids.tolist())
    assert names[:n_codebooks] == ["<|speech_0_0|>", "<|speech_1_6|>"][:n_codebooks]
    assert (vocabulary.codes_from_ids(ids) == codes[:n_codebooks]).all()
    # A frame that was cut short is no frame.
    assert vocabulary.codes_from_ids(ids[: len(ids) - 1]).shape[1] == 2


def test_codes_outside_the_book_are_refused() -> None:
    vocabulary = SpeechVocabulary(codebook_sizes=(4,), first_id=10, end_id=2)
    with pytest.raises(VocabularyError, match="outside"):
        vocabulary.ids_from_codes(np.array([[0, 4]]))
    with pytest.raises(VocabularyError, match="padding"):
        vocabulary.ids_from_codes(np.array([[0, -1]]))
    with pytest.raises(VocabularyError, match="codebook due"):
        vocabulary.codes_from_ids([10])


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    "text", [*MARKS, "<|speech_0_3|>", "say <|eos|> and <|/speech|> now", "<|bos|>", "＜|speech|＞", "a  b \n ü 🎤"]
)
def test_a_users_text_is_plain_text(text: str, chat: bool) -> None:
    tokenizer = tiny_tokenizer(chat)
    text_size = len(tokenizer)
    vocabulary = add_speech(tokenizer, [12])
    # As an extended tokenizer does match the name when it is not told to split it, this test can fail.
    assert tokenizer("<|speech|>", add_special_tokens=False)["input_ids"] == [vocabulary.speech_id]
    ids = vocabulary.encode_text(tokenizer, text)
    assert ids.max() < text_size and not set(ids.tolist()) & {0, 1, 2}
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
    assert set(ids.tolist()) <= set(vocabulary.text_ids(tokenizer).tolist())


@pytest.mark.parametrize("text", ["<tool_call>", "call <tool_call>it</tool_call> so", "<tool_call><tool_call>"])
def test_a_token_that_was_added_and_is_not_special_is_out_of_reach(text: str) -> None:
    """An instruct model's `<tool_call>`: no user's text becomes one, and no transcript holds one."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    added = set(tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>"]))
    vocabulary = add_speech(tokenizer, [12])
    assert added & set(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    ids = vocabulary.encode_text(tokenizer, text)
    assert not added & set(ids.tolist()) and tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    legal = set(vocabulary.text_ids(tokenizer).tolist())
    assert not added & legal and set(ids.tolist()) <= legal


def test_chat_template_is_read_as_ids() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    vocabulary = add_speech(tokenizer, [12])
    assert tokenizer.decode(list(vocabulary.before)) == "<|bos|>user\n"
    assert tokenizer.decode(list(vocabulary.between)) == "<|eos|>\n<|bos|>assistant\n"
    assert vocabulary.end_id == tokenizer.eos_token_id
    plain = add_speech(tiny_tokenizer(), [12])
    assert plain.before == (tokenizer.bos_token_id,) and plain.between == ()


def test_save_and_load_check_the_tokenizer(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = add_speech(tokenizer, [12, 7], fingerprint="abc", frame_rate=12.5, tokenizer="nano")
    vocabulary.save(tmp_path)
    assert SpeechVocabulary.load(tmp_path, tokenizer) == vocabulary
    with pytest.raises(VocabularyError, match="not from one model"):
        SpeechVocabulary.load(tmp_path, tiny_tokenizer())
    with pytest.raises(VocabularyError, match="other|codes mean something else"):
        vocabulary.check_fingerprint("def", "the corpus")
    with pytest.raises(VocabularyError, match="slm finetune"):
        SpeechVocabulary.load(tmp_path / "none")
    (tmp_path / "speech_vocabulary.json").write_text("{")
    with pytest.raises(VocabularyError, match="damaged"):
        SpeechVocabulary.load(tmp_path)


def test_misuse_is_told() -> None:
    with pytest.raises(VocabularyError, match="n_codebooks"):
        add_speech(tiny_tokenizer(), [12], n_codebooks=2)
    tokenizer = tiny_tokenizer()
    add_speech(tokenizer, [12])
    with pytest.raises(VocabularyError, match="already"):
        add_speech(tokenizer, [12])


def test_a_tokenizer_with_gaps_in_its_ids_is_refused_with_a_way_out() -> None:
    whole = tiny_tokenizer()
    content = json.loads(whole.backend_tokenizer.to_str())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] += 5
    backend = Tokenizer.from_str(json.dumps(content))
    gapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")
    with pytest.raises(VocabularyError, match=r"gaps \(300 tokens, highest id 304\).*tokenizer\.json"):
        add_speech(gapped, [12])
    assert len(gapped) == 300


def test_text_tokenizer_round_trip() -> None:
    tokenizer = tiny_tokenizer()
    for text in [*SENTENCES, " two  spaces ", "tab\tand\nline", "naïve Ωmega"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_file_of_groups_says_what_the_fields_say(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = add_speech(tokenizer, [12, 7], n_codebooks=2, fingerprint="a", marks=["<|translate|>"])
    written = json.loads(vocabulary.save(tmp_path).read_text())
    first = vocabulary.first_id
    assert written["groups"] == {
        "marks": {"first_id": first, "size": 4, "tokens": list(MARKS)},
        "book 0": {"first_id": first + 4, "size": 12},
        "book 1": {"first_id": first + 16, "size": 7},
        "more marks 0": {"first_id": first + 23, "size": 1, "tokens": ["<|translate|>"]},
    }
    # Ids come from the groups' numbers, not from the order of keys.
    turned = {key: written[key] for key in reversed(written)}
    turned["groups"] = {name: written["groups"][name] for name in reversed(written["groups"])}
    (tmp_path / "speech_vocabulary.json").write_text(json.dumps(turned))
    assert SpeechVocabulary.load(tmp_path, tokenizer) == vocabulary
    turned["groups"]["book 0"]["size"] = 11
    (tmp_path / "speech_vocabulary.json").write_text(json.dumps(turned))
    with pytest.raises(VocabularyError, match="ids on end"):
        SpeechVocabulary.load(tmp_path)


def test_folders_of_the_first_format_load(tmp_path) -> None:
    fields = {"codebook_sizes": [12, 7], "first_id": 40, "end_id": 2, "before": [1], "between": [], "fingerprint": "a"}
    fields |= {"frame_rate": 25.0, "tokenizer": "t", "precision": "fp32", "normaliser": "basic"}
    old = {"format": "lmspt-speech-vocabulary/1", **fields}
    (tmp_path / "speech_vocabulary.json").write_text(json.dumps(old))
    vocabulary = SpeechVocabulary.load(tmp_path)
    assert vocabulary == SpeechVocabulary(**fields)
    assert (vocabulary.speech_id, vocabulary.mark_id("<|synthesize|>"), vocabulary.offsets.tolist()) == (
        40,
        43,
        [44, 56],
    )


def test_a_new_mark_moves_no_id() -> None:
    tokenizer = tiny_tokenizer()
    before = add_speech(tokenizer, [12])
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    after = add_marks(tokenizer, before, ["<|translate|>", "<|transcribe|>"])
    assert tokenizer.convert_ids_to_tokens(range(len(names))) == names
    assert after.mark_id("<|translate|>") == before.size == after.size - 1
    assert after.offsets.tolist() == before.offsets.tolist()
    assert add_marks(tokenizer, after, ["<|translate|>"]) == after
    with pytest.raises(VocabularyError, match="taken"):
        after.with_group("again", ["<|translate|>"])
    with pytest.raises(VocabularyError, match="has no <|sing|>"):
        after.mark_id("<|sing|>")
