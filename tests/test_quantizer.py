"""Quantizer: look-up, straight-through, masks, quantizer dropout, revival."""

import pytest
import torch
import torch.nn.functional as F

from tokenizer import LMSPTConfig
from tokenizer.model.cpu_kernels import first_largest
from tokenizer.model.quantizer import SplitQuantizer, VectorQuantizer
from tokenizer.training.state import averaged


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def split(n_books=4, **kwargs):
    return SplitQuantizer(LMSPTConfig(latent_dim=12, codebook_sizes=[16] * n_books, codebook_dim=4, **kwargs))


def test_look_up_takes_the_nearest_direction():
    book = VectorQuantizer(6, 10, 3)
    latents = torch.randn(2, 5, 6)
    output = book(latents, None)
    cosine = F.cosine_similarity(output.projected[:, :, None], book.codebook.weight[None, None], dim=-1)
    assert torch.equal(output.codes, cosine.argmax(dim=-1))
    torch.testing.assert_close(output.quantized, book.look_up(output.codes, None))


def test_straight_through_passes_the_gradient_as_if_not_quantized():
    book = VectorQuantizer(6, 10, 3)
    latents = torch.randn(2, 5, 6, requires_grad=True)
    direction = torch.randn(2, 5, 6)
    (book(latents, None).quantized * direction).sum().backward()
    expected = direction @ book.project_out.weight @ book.project_in.weight
    torch.testing.assert_close(latents.grad, expected)
    assert book.codebook.weight.grad is None


def test_commitment_moves_the_latents_and_codebook_loss_moves_the_entries():
    book = VectorQuantizer(6, 10, 3)
    latents = torch.randn(2, 5, 6, requires_grad=True)
    output = book(latents, None)
    output.commitment_loss.sum().backward()
    assert latents.grad.abs().sum() > 0 and book.codebook.weight.grad is None
    latents.grad = None
    book(latents, None).codebook_loss.sum().backward()
    assert latents.grad is None and book.codebook.weight.grad.abs().sum() > 0


def test_masked_frames_take_no_part():
    quantizer = split()
    semantic, acoustic = torch.randn(2, 6, 12), torch.randn(2, 6, 12)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    output = quantizer(semantic, acoustic, mask)
    junk_s, junk_a = semantic.clone(), acoustic.clone()
    junk_s[1, 4:], junk_a[1, 4:] = 100.0, -100.0
    other = quantizer(junk_s, junk_a, mask)
    for name in ("semantic_commitment", "semantic_codebook"):
        assert torch.equal(getattr(output, f"{name}_loss"), getattr(other, f"{name}_loss"))
    assert torch.equal(output.acoustic_commitment_loss, other.acoustic_commitment_loss)
    assert torch.equal(output.acoustic, other.acoustic) and (output.semantic[1, 4:] == 0).all()
    assert (output.codes[1, :, 4:] == -1).all() and (output.codes[0] >= 0).all()
    before = [book.usage.clone() for book in quantizer.books]
    counts = quantizer.update_usage(output.codes)
    for book, old, codes, count in zip(quantizer.books, before, output.codes.unbind(1), counts, strict=True):
        used = torch.bincount(codes[mask], minlength=16)
        assert torch.equal(count, used)
        torch.testing.assert_close(book.usage, old * 0.99 + 0.01 * used * 16 / 10)


def test_losses_are_means_over_items_not_over_frames():
    quantizer = split()
    semantic, acoustic = torch.randn(2, 6, 12), torch.randn(2, 6, 12)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    both = quantizer(semantic, acoustic, mask)
    first = quantizer(semantic[:1], acoustic[:1], None)
    second = quantizer(semantic[1:, :2], acoustic[1:, :2], None)
    for name in ("semantic_commitment_loss", "acoustic_codebook_loss"):
        torch.testing.assert_close(getattr(both, name), (getattr(first, name) + getattr(second, name)) / 2)


@pytest.mark.parametrize("subtract", [True, False])
def test_residual_sum_equals_look_up(subtract):
    quantizer = split(semantic_subtraction=subtract)
    output = quantizer(torch.randn(2, 6, 12), torch.randn(2, 6, 12), None)
    torch.testing.assert_close(output.semantic + output.acoustic, quantizer.look_up(output.codes, None))


def test_semantic_subtraction_is_not_detached():
    for subtract in (True, False):
        semantic = torch.randn(1, 4, 12, requires_grad=True)
        output = split(semantic_subtraction=subtract)(semantic, torch.randn(1, 4, 12), None)
        (grad,) = torch.autograd.grad(output.acoustic_commitment_loss, semantic, allow_unused=True)
        assert (grad is not None and bool(grad.abs().sum() > 0)) == subtract


def test_quantizer_dropout_keeps_the_first_books_of_each_item():
    quantizer = split(n_books=4)
    semantic, acoustic = torch.randn(3, 5, 12), torch.randn(3, 5, 12)
    kept = torch.tensor([1, 2, 3])
    output = quantizer(semantic, acoustic, None, kept)
    for item, n in enumerate(kept.tolist()):
        codes = output.codes[item : item + 1, : n + 1]
        expected = quantizer.look_up(codes, None)
        torch.testing.assert_close((output.semantic + output.acoustic)[item : item + 1], expected)
    everything = quantizer(semantic, acoustic, None, torch.tensor([3, 3, 3]))
    torch.testing.assert_close(everything.acoustic, quantizer(semantic, acoustic, None).acoustic)
    assert output.acoustic_codebook_loss < everything.acoustic_codebook_loss
    only_one = quantizer(semantic, acoustic, None, torch.tensor([1, 1, 1])).acoustic_codebook_loss
    (grad,) = torch.autograd.grad(only_one, quantizer.books[2].codebook.weight)
    assert (grad == 0).all()


@pytest.mark.parametrize("kept", [[0, 1], [1, 4], [-1, 1], [1]])
def test_quantizer_dropout_never_keeps_none_nor_too_many(kept):
    for given in (kept, torch.tensor(kept)):
        with pytest.raises(ValueError, match="n_acoustic_books"):
            split(n_books=4)(torch.randn(2, 5, 12), torch.randn(2, 5, 12), None, given)


def test_revival_replaces_only_dead_entries_and_repeats_with_its_seed():
    candidates = torch.randn(50, 4)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        book = VectorQuantizer(12, 16, 4)
        book.usage[[2, 7]] = 0.0
        before = book.codebook.weight.detach().clone()
        assert book.revive(candidates, torch.Generator().manual_seed(5), threshold=0.05) == 2
        changed = (book.codebook.weight != before).any(dim=-1).nonzero().flatten().tolist()
        assert changed == [2, 7]
        assert all((candidates == book.codebook.weight[i]).all(dim=-1).any() for i in changed)
        assert (book.usage == 1).all()
        results.append(book.codebook.weight.detach().clone())
    assert torch.equal(*results)


def test_revival_takes_no_masked_frame():
    quantizer = split(n_books=2)
    mask = torch.tensor([[True, False, False]])
    projected = [torch.tensor([[[1.0] * 4, [9.0] * 4, [9.0] * 4]])] * 2
    for book in quantizer.books:
        book.usage.zero_()
    assert quantizer.revive_dead_codes(projected, mask, torch.Generator(), 0.5) == [16, 16]
    assert all((book.codebook.weight == 1.0).all() for book in quantizer.books)


def test_unused_entries_die_and_used_ones_do_not():
    book = VectorQuantizer(12, 4, 4)
    for _ in range(400):
        book.update_usage(torch.tensor([[0, 1, 1, 2]]))
    assert (book.usage < 0.05).tolist() == [False, False, False, True]


def test_stays_fp32_under_autocast():
    quantizer = split()
    semantic, acoustic = torch.randn(2, 6, 12), torch.randn(2, 6, 12)
    plain = quantizer(semantic, acoustic, None)
    with torch.autocast("cpu", torch.bfloat16):
        under = quantizer(semantic, acoustic, None)
    assert torch.equal(plain.codes, under.codes) and torch.equal(plain.acoustic, under.acoustic)


def test_running_means_are_kept_in_fp32_under_autocast():
    """In bf16, whose steps are a 256th, they would stand still: use of entries and averaged weights alike."""
    plain, under = (split() for _ in range(2))
    under.load_state_dict(plain.state_dict())
    means = [averaged(one, 0.999) for one in (plain, under)]
    for step in range(300):
        codes = torch.randint(16, (2, 4, 50), generator=torch.Generator().manual_seed(step)) ** 2 // 16
        for number, (one, mean) in enumerate(zip((plain, under), means, strict=True)):
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(number)), torch.no_grad():
                one.update_usage(codes)
                for parameter in one.parameters():
                    parameter += 1e-3
                mean.update_parameters(one)
    for one, other in zip(means[0].module.state_dict().values(), means[1].module.state_dict().values(), strict=True):
        assert other.dtype == one.dtype and torch.equal(one, other)
    weight, averaged_weight = (one.books[0].codebook.weight for one in (under, means[1].module))
    assert 0.1 < (weight - averaged_weight).mean().item() < 0.3  # it follows, and far behind: 0.26 of 0.3
    assert under.books[0].usage.std() > 0.3


@pytest.mark.parametrize("size", [7, 48, 1024])
def test_the_first_of_equal_scores_is_taken_whatever_the_number_of_entries(size):
    torch.manual_seed(0)
    scores = torch.randint(0, 9, (3, 5, size)).float()  # many equals
    largest = scores.amax(dim=-1, keepdim=True)
    first = torch.where(scores == largest, torch.arange(size), size).amin(dim=-1)
    assert torch.equal(first_largest(scores), first)
