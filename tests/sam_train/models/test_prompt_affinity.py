"""Affinity of the image with the prompt: which codes are compared, and what follows from where."""

from itertools import pairwise

import pytest
import torch

from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.save import to_hugging_face, to_official_state_dict
from sam_train.models.prompt_affinity import PromptAffinity
from sam_train.structures import ImageFeatures, Prompts

PIXELS = (32, 48)
H, W = 4, 6  # tokens of 8 pixels


@pytest.fixture
def affinity() -> PromptAffinity:
    """Codes are the first two channels, and the maps are handed on as they are."""
    part = PromptAffinity(embed_dim=8, code_dim=2)
    with torch.no_grad():
        part.proj.weight.copy_(torch.eye(8)[:2])
        part.proj.bias.zero_()
    part.read = torch.nn.Identity()
    return part


def embeddings(kinds: torch.Tensor) -> torch.Tensor:
    """(H, W) kinds of tokens, 0 or 1, to (1, 8, H, W): alike tokens have equal codes."""
    features = torch.zeros(1, 8, H, W)
    features[0, 0] = 4.0 * (1 - kinds)
    features[0, 1] = 4.0 * kinds
    return features


def maps_of(affinity: PromptAffinity, features, coords, labels) -> torch.Tensor:
    """(8, H, W): for foreground, background, inside and ring, the probability and the logit."""
    coords, labels = torch.tensor([coords], dtype=torch.float32), torch.tensor([labels])
    with torch.no_grad():
        return affinity(features, coords, labels, None, PIXELS)[0]


def test_a_click_finds_what_looks_like_its_token(affinity):
    kinds = torch.zeros(H, W)
    kinds[1:3, 2:5] = 1
    maps = maps_of(affinity, embeddings(kinds), [[25, 15], [0, 0]], [1, -1])
    # Pixel (25, 15) lies in the token of row 1 and column 3.
    assert torch.equal(maps[0] > 0.9, kinds == 1)
    torch.testing.assert_close(maps[1], kinds * 16 * 2**-0.5 / 4)
    assert not maps[2:].any()


def test_background_clicks_have_their_own_map_and_the_nearest_of_several_counts(affinity):
    kinds = torch.zeros(H, W)
    kinds[1:3, 2:5] = 1
    points = [[25, 15], [0, 0], [0, 0], [47, 31]]
    maps = maps_of(affinity, embeddings(kinds), points, [1, -1, 0, 1])
    assert (maps[0] > 0.9).all(), "one click on either kind"
    assert torch.equal(maps[2] > 0.9, kinds == 0)


def test_a_box_is_compared_with_its_inside_and_its_surroundings(affinity):
    kinds = torch.zeros(H, W)
    kinds[1:3, 2:5] = 1
    maps = maps_of(affinity, embeddings(kinds), [[16, 8], [40, 24]], [2, 3])
    inside, ring = maps[5], maps[7]
    assert inside[kinds == 1].min() > 2 * inside[kinds == 0].max()
    assert ring[kinds == 0].min() > 2 * ring[kinds == 1].max()
    assert not maps[:4].any()


def test_prompts_of_several_images_are_compared_with_their_own(affinity):
    first, second = torch.zeros(H, W), torch.zeros(H, W)
    first[0, 0] = second[3, 5] = 1
    both = torch.cat([embeddings(first), embeddings(second)])
    coords = torch.tensor([[[2.0, 2.0]], [[2.0, 2.0]], [[46.0, 30.0]]])
    with torch.no_grad():
        maps = affinity(
            both, coords, torch.ones(3, 1, dtype=torch.long), torch.tensor([0, 1, 1]), PIXELS
        )
    for found, expected in zip(maps[:, 0], (first, 1 - second, second), strict=True):
        assert torch.equal(found > 0.9, expected == 1)


def test_points_at_or_beyond_the_edge_and_no_points_at_all(affinity):
    kinds = torch.zeros(H, W)
    kinds[3, 5] = 1
    for corner in ([47, 31], [48, 32], [47.6, 31.6], [1000, 1000]):
        assert maps_of(affinity, embeddings(kinds), [corner], [1])[0, 3, 5] > 0.9
    with torch.no_grad():
        empty = torch.zeros(2, 0, dtype=torch.long)
        nothing = affinity(embeddings(kinds), torch.zeros(2, 0, 2), empty, None, PIXELS)
    assert nothing.shape == (2, 8, H, W)
    assert not nothing.any()


def test_the_smallest_box_still_holds_something(affinity):
    kinds = torch.zeros(H, W)
    kinds[1, 2] = 1
    maps = maps_of(affinity, embeddings(kinds), [[19.0, 11.0], [20.0, 12.0]], [2, 3])
    assert maps[5, 1, 2] > 2 * maps[5, 0, 0]
    assert torch.isfinite(maps).all()


def test_all_ways_to_ask_the_model_use_it():
    torch.manual_seed(0)
    node = {
        "_target_": "sam_train.models.prompt_affinity.PromptAffinity",
        "embed_dim": 64,
    }
    model = build_model({**model_config("sam_tiny"), "prompt_affinity": node}).eval()
    image = 255 * torch.rand(3, 256, 256)
    points = torch.tensor([[[90.0, 120.0]]]), torch.ones(1, 1, dtype=torch.long)
    entry = {"image": image, "original_size": (256, 256)}
    entry |= {"point_coords": points[0], "point_labels": points[1]}

    def answers() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            (published_call,) = model([entry], multimask_output=True)
            features = ImageFeatures(model.image_encoder(model.preprocess(image[None])))
            prompts = Prompts(
                torch.cat([points[0], torch.zeros(1, 1, 2)], 1), torch.tensor([[1, -1]])
            )
            ours = model.decode(features, prompts, multimask_output=True)
        return published_call["low_res_logits"], ours.low_res_masks

    torch.testing.assert_close(*answers())
    with_affinity, _ = answers()
    model.prompt_affinity = None
    assert not torch.equal(answers()[0], with_affinity)


def test_published_formats_have_no_place_for_it(official_file):
    from sam_train.checkpoints.load import load_model

    model = load_model(official_file[1])
    model.prompt_affinity = PromptAffinity(embed_dim=model.prompt_encoder.embed_dim)
    for save in (to_official_state_dict, to_hugging_face):
        with pytest.raises(ValueError, match="no place for a PromptAffinity"):
            save(model)


def test_logits_are_symmetric_products_of_codes():
    torch.manual_seed(0)
    part = PromptAffinity(embed_dim=8, code_dim=4)
    codes = part.codes(torch.randn(1, 8, 2, 3))[0]
    logits = part.logits(codes, codes)
    torch.testing.assert_close(logits, logits.T)
    for i, j in pairwise(range(6)):
        expected = (codes[i] * codes[j]).sum() / 2 + part.bias
        torch.testing.assert_close(logits[i, j], expected)
