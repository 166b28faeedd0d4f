"""Prompts become the published embeddings, given as `segment_anything` takes them or as `Prompts`."""

import pytest
import torch

from sam_train.checkpoints.load import load_model
from sam_train.structures import Prompts

TOLERANCE = 1e-5


@pytest.fixture
def encoders(official_file):
    """The published prompt encoder and ours, with the same weights."""
    published, path = official_file
    return published.prompt_encoder, load_model(path).prompt_encoder


def as_prompts(prompts: dict) -> Prompts:
    """The same prompts in our form: points with their padding, or points and then the box's corners."""
    some = next(iter(prompts.values()))
    coords = [prompts.get("point_coords", torch.zeros(len(some), 0, 2))]
    labels = [prompts.get("point_labels", torch.zeros(len(some), 0, dtype=torch.long))]
    if "boxes" in prompts:
        coords.append(prompts["boxes"].reshape(-1, 2, 2))
        labels.append(torch.tensor([[2, 3]]).expand(len(some), 2))
    elif "point_coords" in prompts:
        coords.append(torch.zeros(len(some), 1, 2))
        labels.append(torch.full((len(some), 1), -1))
    return Prompts(torch.cat(coords, 1), torch.cat(labels, 1), prompts.get("mask_inputs"))


@pytest.mark.parametrize("num_prompts", [1, 4])
def test_both_forms_give_the_published_embeddings(
    encoders, prompt_case, relative_error, num_prompts
):
    published, ours = encoders
    prompts = prompt_case(num_prompts, 128)
    points = None
    if "point_coords" in prompts:
        points = (prompts["point_coords"], prompts["point_labels"])
    call = {
        "points": points,
        "boxes": prompts.get("boxes"),
        "masks": prompts.get("mask_inputs"),
    }

    with torch.no_grad():
        expected = published(**call)
        for got in (ours(**call), ours.embed(as_prompts(prompts))):
            for ours_part, published_part in zip(got, expected, strict=True):
                assert ours_part.shape == published_part.shape
                if published_part.numel():
                    assert relative_error(ours_part, published_part) < TOLERANCE


def test_point_first_and_box_first_objects_share_a_batch(encoders, relative_error):
    published, ours = encoders
    point, label = torch.tensor([[[30.0, 50.0]]]), torch.tensor([[1]])
    box = torch.tensor([[10.0, 20.0, 90.0, 100.0]])
    padding = torch.zeros(1, 1, 2)
    mixed = Prompts(
        torch.cat([torch.cat([point, padding], 1), box.reshape(1, 2, 2)]),
        torch.tensor([[1, -1], [2, 3]]),
    )

    with torch.no_grad():
        sparse, _ = ours.embed(mixed)
        of_point, _ = published(points=(point, label), boxes=None, masks=None)
        of_box, _ = published(points=None, boxes=box, masks=None)

    assert relative_error(sparse, torch.cat([of_point, of_box])) < TOLERANCE


def test_a_given_prompt_is_not_written_to(encoders):
    _, ours = encoders
    coords, labels = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[0]])
    box = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    ours(points=(coords, labels), boxes=box, masks=None)
    assert (coords.tolist(), labels.tolist()) == ([[[3.0, 4.0]]], [[0]])
    assert box.tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_every_kind_of_point_takes_part_in_every_backward_pass(encoders):
    _, ours = encoders
    sparse, _ = ours.embed(Prompts(torch.zeros(1, 1, 2), torch.tensor([[1]])))
    sparse.sum().backward()
    kinds = [ours.not_a_point_embed, *ours.point_embeddings]
    assert all(kind.weight.grad is not None for kind in kinds)
    assert [bool(kind.weight.grad.any()) for kind in kinds] == [False, False, True, False, False]


def test_positions_stay_exact_under_half_precision(encoders):
    _, ours = encoders
    prompts = Prompts(torch.tensor([[[101.0, 37.0]]]), torch.tensor([[1]]))
    with torch.no_grad():
        exact = ours.pe_layer.forward_with_coords(prompts.point_coords, (128, 128))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = ours.pe_layer.forward_with_coords(prompts.point_coords, (128, 128))
    assert torch.equal(under_autocast, exact)


@pytest.mark.parametrize("label", [-2, 4])
def test_a_label_that_there_is_not_is_named(encoders, label):
    _, ours = encoders
    with pytest.raises(ValueError, match=f"from -1 to 3 .* got {label}"):
        ours.embed(Prompts(torch.zeros(1, 2, 2), torch.tensor([[1, label]])))


def test_a_model_in_half_precision_takes_float32_masks(encoders):
    _, ours = encoders
    ours.half()
    masks = torch.randn(2, 1, 32, 32)
    prompts = Prompts(torch.zeros(2, 1, 2), torch.ones(2, 1).long(), masks)
    sparse, dense = ours.embed(prompts)
    assert (sparse.dtype, dense.dtype) == (torch.float16, torch.float16)
