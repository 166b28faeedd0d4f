"""The looks between tokens and image tokens, and their gradients, are what they are composed of."""

import pytest
import torch
from torch.autograd import gradcheck

from sam_train.models.first_looks import FirstImages
from sam_train.models.folded_looks import LookBack, add_rows, image_to_tokens, tokens_to_image

P, L, C, HEADS, T, K = 3, 10, 6, 2, 4, 5
R = HEADS * T


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[1, P], ids=["one position code", "one a prompt"])
def image_pe(request):
    return draw(request.param, L, C)


def both_looks(folded, image, image_pe, back, bias, values):
    pooled, seen = tokens_to_image(folded, image, image_pe)
    return pooled, image_to_tokens(seen, image_pe, LookBack(back, bias, values), HEADS)


def composed(folded, image, image_pe, back, bias, values):
    keys = image + image_pe
    pooled = (folded @ keys.mT).softmax(dim=-1) @ image
    scores = (back @ keys.mT + bias[..., None]).unflatten(1, (T, HEADS))
    return pooled, image + scores.softmax(dim=1).flatten(1, 2).mT @ values


def test_a_look_and_a_look_back_are_the_attentions_they_stand_for(image_pe):
    inputs = (draw(P, R, C), draw(P, L, C), image_pe, draw(P, R, C), draw(P, R), draw(P, R, C))
    got, expected = both_looks(*inputs), composed(*inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    pulls = [torch.randn_like(x) for x in expected]
    of_got = torch.autograd.grad(got, inputs, pulls)
    of_expected = torch.autograd.grad(expected, inputs, pulls)
    for one, other in zip(of_got, of_expected, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_are_the_slopes(image_pe):
    inputs = (draw(P, R, C), draw(P, L, C), image_pe, draw(P, R, C), draw(P, R), draw(P, R, C))
    assert gradcheck(both_looks, inputs)


def test_a_look_whose_answer_nobody_uses_lets_the_gradient_pass():
    image = draw(P, L, C)
    _, seen = tokens_to_image(draw(P, R, C), image, torch.zeros(1, L, C, dtype=torch.float64))
    seen.image.sum().backward()
    assert torch.equal(image.grad, torch.ones_like(image))


def test_only_what_was_asked_has_gradients():
    image, folded = draw(P, L, C).detach(), draw(P, R, C)
    pooled, _ = tokens_to_image(folded, image, torch.zeros(1, L, C, dtype=torch.float64))
    pooled.sum().backward()
    assert folded.grad is not None and image.grad is None


def test_rows_are_added_to_the_images_of_the_prompts():
    images, index = draw(2, L, C), torch.tensor([1, 0, 1])
    assert gradcheck(
        lambda *x: add_rows(x[0], index, *x[1:]), (images, draw(P, R, L), draw(P, R, C))
    )
    weights, rows = draw(P, R, L), draw(P, R, C)
    torch.testing.assert_close(
        add_rows(images, index, weights, rows), images[index] + weights.mT @ rows
    )


@pytest.mark.parametrize("has_cells", [True, False])
@pytest.mark.parametrize("numbers", [[1, 0, 1], [0, 1, 2], [0, 0, 0], [2, 1, 0]])
def test_what_prompts_share_is_projected_once_and_gives_the_same(has_cells, numbers):
    """As many prompts for each image in turn, or any."""
    images, index = draw(1 + max(numbers), L, C), torch.tensor(numbers)
    cells, rows = (draw(P, K, L), draw(K, C)) if has_cells else (None, None)
    start = FirstImages(images, index, cells, rows)
    weight = draw(HEADS, C // HEADS, C)
    own = images[index] if cells is None else images[index] + cells.mT @ rows
    projected = torch.einsum("plc,hdc->phld", own, weight)
    of_images = torch.einsum("nlc,hdc->nhld", images, weight)
    tokens, shares = draw(P, T, HEADS, C // HEADS), draw(P, T, HEADS, L)
    values, bias = draw(P, R, C), draw(C)

    torch.testing.assert_close(
        start.scores(tokens, of_images.mT, weight),
        torch.einsum("pthd,phld->pthl", tokens, projected),
    )
    torch.testing.assert_close(
        start.means(shares, of_images, weight),
        torch.einsum("pthl,phld->pthd", shares, projected),
    )
    torch.testing.assert_close(
        start.plus(shares.flatten(1, 2), values, bias),
        own + bias + shares.flatten(1, 2).mT @ values,
    )


def test_derivatives_of_derivatives_are_refused_by_way_of_the_inputs_too():
    image, folded = draw(P, L, C), draw(P, R, C)
    pooled, _ = tokens_to_image(folded, image, torch.zeros(1, L, C, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="derivatives of derivatives"):
        torch.autograd.grad(pooled.square().sum(), (folded, image), create_graph=True)
