"""Text-aligned tokens: one frame of codes per word; what they learn from, and that they carry what text does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slm_tiny import CODES, FINGERPRINT, SENTENCES

from slm.text_aligned.configuration import TextAlignedConfig
from slm.text_aligned.decoding import RebuildSettings, encode_words, rebuild, shuffle_words
from slm.text_aligned.evaluation import code_scores
from slm.text_aligned.modeling import (
    TextAlignedModel,
    attention_in_spans,
    new_text_aligned_model,
    targets_of,
)
from slm.text_aligned.samples import Item, collate, make_item
from slm.text_aligned.text import bytes_from_words, spell, words_from_bytes
from slm.text_aligned.training import TextAlignedTraining, train_text_aligned

SIZES = {"hidden_size": 32, "heads": 2, "intermediate_size": 64, "text_layers": 1, "speech_layers": 2}
SIZES |= {"decoder_layers": 1, "word_codebook_size": 16, "dropout": 0.0}


def config_of(**changes: object) -> TextAlignedConfig:
    facts = {"codebook_size": CODES, "fingerprint": FINGERPRINT, "max_frames": 40, "max_bytes": 40}
    return TextAlignedConfig(**(facts | SIZES | changes))


def spoken(text: str, style: int) -> Item:
    """A text said in one of two styles that the text does not tell: two codes or three a word, of other kinds."""
    words = text.split()
    frames = [2 + style] * len(words)
    codes = [[(ord(word[0]) + style * 5 + k) % CODES for k in range(n)] for word, n in zip(words, frames, strict=True)]
    return make_item(np.concatenate(codes), text, frames)


ITEMS = [spoken(text, style) for text in SENTENCES for style in (0, 1)]


def batch_of(items: list[Item], with_speech: bool = True) -> dict[str, torch.Tensor]:
    return collate([(item, with_speech) for item in items])


def test_each_byte_is_a_word_s_and_the_space_in_front_is_the_word_s() -> None:
    text, word_of_byte = spell("at ä  now")
    assert bytes((text - 1).tolist()).decode() == "at ä now"
    assert word_of_byte.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_words_are_the_means_of_their_bytes_and_padding_is_nobody_s() -> None:
    states = torch.arange(8.0).reshape(1, 8, 1).repeat(2, 1, 1)
    word_of_byte = torch.tensor([[0, 0, 1, 1, 1, 2, -1, -1], [0, 1, -1, -1, -1, -1, -1, -1]])
    vectors, words = words_from_bytes(states, word_of_byte)
    assert vectors[..., 0].tolist() == [[0.5, 3.0, 5.0], [0.0, 1.0, 0.0]]
    assert words.tolist() == [[True, True, True], [True, True, False]]
    assert bytes_from_words(vectors, word_of_byte)[0, :6, 0].tolist() == [0.5, 0.5, 3.0, 3.0, 3.0, 5.0]


def test_the_end_is_learnt_behind_each_item_s_last_code() -> None:
    said, targets = targets_of(torch.tensor([[4, 2, 7], [5, -1, -1]]), CODES)
    assert targets.tolist() == [[4, 2, 7, CODES], [5, CODES, -1, -1]]
    assert torch.equal(said, targets >= 0)


def test_attention_within_a_word_s_frames_is_counted_where_they_are_known() -> None:
    attention = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]]])
    share, known = attention_in_spans(attention, torch.tensor([[[0, 2], [2, 3], [-1, -1]]]))
    assert share[0].tolist() == pytest.approx([0.8, 0.8, 0.0]) and known.tolist() == [[True, True, False]]


def test_gradient_reaches_every_parameter() -> None:
    model = new_text_aligned_model(config_of(alignment_weight=0.5), seed=0).train()
    # One item from its text alone, so that what stands in the words' place learns too.
    model(**collate([(item, number > 0) for number, item in enumerate(ITEMS)])).loss.backward()
    silent = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    assert silent == []


def test_gradient_reaches_the_speech_through_the_words_alone() -> None:
    """All that the decoder is told of the speech goes through the word codes."""
    model = new_text_aligned_model(config_of(), seed=0).train()
    for with_speech in (True, False):
        model.zero_grad()
        model(**batch_of(ITEMS, with_speech)).code_loss.backward()
        grads = [value.grad for value in model.speech_reader.parameters()]
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads) == with_speech


def test_a_batch_is_its_singles_and_padding_changes_nothing() -> None:
    model = new_text_aligned_model(config_of(), seed=0).eval()
    items = [*ITEMS[:3], spoken("soon", 0), spoken("place red at nine", 1)]
    with torch.no_grad():
        batch = batch_of(items)
        read = model.encode_text(batch["text"], batch["word_of_byte"])
        gathered, attention, words = model.gather(batch["codes"], read)
        scores = model.scores(batch["codes"], read, gathered)
        for row, item in enumerate(items):
            one = batch_of([item])
            alone = model.encode_text(one["text"], one["word_of_byte"])
            own, own_attention, _ = model.gather(one["codes"], alone)
            n_words, n_frames = len(item.spans), len(item.codes)
            torch.testing.assert_close(gathered[row, :n_words], own[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(attention[row, :n_words, :n_frames], own_attention[0], atol=1e-5, rtol=1e-4)
            single = model.scores(one["codes"], alone, own)[0]
            torch.testing.assert_close(scores[row, : n_frames + 1], single, atol=1e-4, rtol=1e-4)
            assert int(words[row].sum()) == n_words


def test_a_loss_is_the_mean_over_codes_whatever_the_padding() -> None:
    model = new_text_aligned_model(config_of(), seed=0).eval()
    items = [spoken("soon", 0), ITEMS[1]]
    with torch.no_grad():
        losses = [model(**batch_of([item])).code_loss.item() for item in items]
        counts = [len(item.codes) + 1 for item in items]
        assert float(model(**batch_of(items)).code_loss) == pytest.approx(np.average(losses, weights=counts), rel=1e-4)


def test_a_prediction_sees_no_later_code() -> None:
    model = new_text_aligned_model(config_of(), seed=0).eval()
    batch = batch_of(ITEMS[:1])
    read = model.encode_text(batch["text"], batch["word_of_byte"])
    changed = batch["codes"].clone()
    changed[0, 5] = (changed[0, 5] + 1) % CODES
    first, second = (model.scores(codes, read, None)[0] for codes in (batch["codes"], changed))
    torch.testing.assert_close(first[:6], second[:6])
    assert not torch.allclose(first[6], second[6])


def test_word_codes_give_the_vectors_that_were_quantized() -> None:
    model = new_text_aligned_model(config_of(), seed=0).eval()
    batch = batch_of([spoken("soon", 0), ITEMS[1]])
    with torch.no_grad():
        gathered, _, words = model.gather(batch["codes"], model.encode_text(batch["text"], batch["word_of_byte"]))
        quantized = model.quantizer(gathered, words)
        assert quantized.word_codes.shape == (2, 4, words.shape[1])
        assert torch.equal(quantized.word_codes[:, 0] >= 0, words)
        torch.testing.assert_close(model.word_vectors(quantized.word_codes), quantized.vectors)
        fewer = model.word_vectors(quantized.word_codes[:, :1])
        assert not torch.allclose(fewer, quantized.vectors)


def test_the_warm_up_gives_the_books_entries_that_words_are_near_to() -> None:
    """With random entries all words of an untrained model soon have one code."""
    model = new_text_aligned_model(config_of(quantizer_warmup_steps=2), seed=0)
    batch = batch_of(ITEMS)
    before = model.quantizer.books.quantizers[0].codebook.weight.clone()
    assert model.eval()(**batch).quantizer_loss.item() > 0  # out of training there is no warm-up
    model.train()
    losses = [model(**batch).quantizer_loss.item() for _ in range(3)]
    assert losses[:2] == [0.0, 0.0] and losses[2] > 0 and int(model.quantizer.n_steps) == 2
    assert not torch.equal(model.quantizer.books.quantizers[0].codebook.weight, before)
    words = np.concatenate(encode_words(model.eval(), ITEMS), axis=1)
    cold = np.concatenate(encode_words(new_text_aligned_model(config_of(), seed=0).eval(), ITEMS), axis=1)
    assert len(np.unique(words[0])) > 2 * len(np.unique(cold[0]))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> TextAlignedModel:
    """A tiny model that knows four sentences, each said in two styles."""
    settings = TextAlignedTraining(steps=250, batch_size=8, learning_rate=1e-2, warmup_steps=10, text_alone=0.2)
    model = new_text_aligned_model(config_of(alignment_weight=0.3, quantizer_warmup_steps=50), seed=0)
    train_text_aligned(model, ITEMS, [], settings, tmp_path_factory.mktemp("run"))
    return model.eval()


def test_word_codes_carry_what_the_text_does_not(learnt: TextAlignedModel) -> None:
    """Which of two styles an utterance is said in cannot be read off its text."""
    keys = [str(number) for number in range(len(ITEMS))]
    words = encode_words(learnt, ITEMS)
    own = rebuild(learnt, ITEMS, words, keys, RebuildSettings())
    assert all(found.ended and np.array_equal(found.codes, item.codes) for found, item in zip(own, ITEMS, strict=True))
    # The words of the other style, on the same text: its style comes with them.
    swapped = [words[number ^ 1] for number in range(len(ITEMS))]
    for found, number in zip(rebuild(learnt, ITEMS, swapped, keys, RebuildSettings()), range(len(ITEMS)), strict=True):
        assert np.array_equal(found.codes, ITEMS[number ^ 1].codes)
    alone = rebuild(learnt, ITEMS, None, keys, RebuildSettings())
    assert all(np.array_equal(alone[number].codes, alone[number ^ 1].codes) for number in range(len(ITEMS)))
    figures = code_scores(learnt, ITEMS)
    assert figures["accuracy"] > 0.99 > figures["text_alone/accuracy"]
    assert 2 * figures["loss"] < figures["text_alone/loss"]
    assert figures["attention_in_word"] > 0.9


def test_scores_twice_are_equal_and_move_nothing() -> None:
    """In the middle of a training: neither dropout nor the warm-up of the books, nor a random stream."""
    model = new_text_aligned_model(config_of(dropout=0.5, quantizer_warmup_steps=4), seed=0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    first, second = (code_scores(model, ITEMS) for _ in range(2))
    assert first == second and torch.equal(stream, torch.get_rng_state()) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shuffled_words_are_the_same_words(learnt: TextAlignedModel) -> None:
    words = encode_words(learnt, ITEMS)
    dealt = shuffle_words(words, seed=0)
    assert [codes.shape for codes in dealt] == [codes.shape for codes in words]
    columns = [sorted(map(tuple, np.concatenate(some, axis=1).T.tolist())) for some in (words, dealt)]
    assert columns[0] == columns[1] and not all(map(np.array_equal, words, dealt))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_rebuilt_does_not_depend_on_the_batch(learnt: TextAlignedModel, temperature: float) -> None:
    items = [ITEMS[0], spoken("soon", 1), ITEMS[5]]
    words, settings = encode_words(learnt, items), RebuildSettings(temperature=temperature)
    together = rebuild(learnt, items, words, ["a", "b", "c"], settings)
    for item, codes, key, found in zip(items, words, "abc", together, strict=True):
        alone = rebuild(learnt, [item], [codes], [key], settings)[0]
        assert np.array_equal(found.codes, alone.codes) and found.ended == alone.ended


def test_what_never_ends_is_cut_off_and_said(learnt: TextAlignedModel) -> None:
    model = new_text_aligned_model(config_of(), seed=0).eval()
    with torch.no_grad():
        model.bias[CODES] = -100.0
    found = rebuild(model, ITEMS[:1], None, ["a"], RebuildSettings())[0]
    assert not found.ended and len(found.codes) == model.config.max_frames


def test_speech_as_long_as_the_longest_may_end_by_itself(learnt: TextAlignedModel) -> None:
    item = max(ITEMS, key=lambda one: len(one.codes))
    longest, learnt.config.max_frames = learnt.config.max_frames, len(item.codes)
    try:
        found = rebuild(learnt, [item], encode_words(learnt, [item]), ["a"], RebuildSettings())[0]
    finally:
        learnt.config.max_frames = longest
    assert found.ended and np.array_equal(found.codes, item.codes)
