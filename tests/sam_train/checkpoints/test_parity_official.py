"""Our model with official weights answers as the published code does."""

import pytest
import torch
from segment_anything import sam_model_registry
from transformers import SamModel

from sam_train.checkpoints.load import load_model
from sam_train.checkpoints.save import save_hugging_face, to_official_state_dict

TOLERANCE = 1e-5  # of the largest number; float32 leaves about 1e-6
FULL_SIZE_TOLERANCE = 5e-5  # sums are longer there


def answer(model, image, prompts, *, multimask_output):
    """Mask logits and predicted IoUs, part by part, as published code drives them."""
    with torch.no_grad():
        embeddings = model.image_encoder(model.preprocess(image)[None])
        points = None
        if "point_coords" in prompts:
            points = (prompts["point_coords"], prompts["point_labels"])
        sparse, dense = model.prompt_encoder(
            points=points, boxes=prompts.get("boxes"), masks=prompts.get("mask_inputs")
        )
        masks, iou_predictions = model.mask_decoder(
            image_embeddings=embeddings,
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
        )
    return {"image_embeddings": embeddings, "masks": masks, "iou_predictions": iou_predictions}


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("num_prompts", [1, 5])
@pytest.mark.parametrize("size", [(128, 128), (128, 77)], ids=["square", "padded"])
def test_every_prompt_is_answered_as_published(
    official_file, prompt_case, relative_error, num_prompts, size, multimask_output
):
    published, path = official_file
    image = 255 * torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    prompts = prompt_case(num_prompts, 128)

    expected = answer(published, image, prompts, multimask_output=multimask_output)
    got = answer(load_model(path), image, prompts, multimask_output=multimask_output)

    for name, values in expected.items():
        assert relative_error(got[name], values) < TOLERANCE, name


def test_the_published_dense_positions_and_no_prompt_at_all_agree(official_file, relative_error):
    published, path = official_file
    model = load_model(path)
    image = 255 * torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(1))

    pe = published.prompt_encoder.get_dense_pe()
    assert relative_error(model.prompt_encoder.get_dense_pe(), pe) < TOLERANCE
    expected = answer(published, image, {}, multimask_output=True)
    got = answer(model, image, {}, multimask_output=True)
    assert relative_error(got["masks"], expected["masks"]) < TOLERANCE


@pytest.mark.parametrize(
    "sizes",
    [
        {"embed_dim": 64, "num_heads": 2, "depth": 2, "global_attn_indexes": (0,)},
        {"mlp_ratio": 2.0, "iou_head_depth": 2, "out_chans": 64},
        {"in_chans": 1, "window_size": 5, "img_size": 192},
        {"global_attn_indexes": (0, 1, 2)},
    ],
    ids=["width and depth", "mlp and heads", "channels and window", "global only"],
)
def test_custom_sizes_are_read_off_the_tensors(published_sam, tmp_path, relative_error, sizes):
    published = published_sam(**sizes)
    torch.save(published.state_dict(), tmp_path / "custom.pth")
    side, channels = published.image_encoder.img_size, sizes.get("in_chans", 3)
    images = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(2))

    model = load_model(tmp_path / "custom.pth")

    with torch.no_grad():
        expected = published.image_encoder(images)
        assert relative_error(model.image_encoder(images), expected) < TOLERANCE


@pytest.mark.parametrize(("name", "indexes"), [("vit_l", [1, 3]), ("vit_h", [0, 2])])
def test_large_and_huge_agree_at_their_width_when_cut_short(
    published_sam, tmp_path, relative_error, name, indexes
):
    embed_dim, num_heads = {"vit_l": (1024, 16), "vit_h": (1280, 16)}[name]
    published = published_sam(
        embed_dim=embed_dim,
        num_heads=num_heads,
        depth=4,
        global_attn_indexes=tuple(indexes),
        window_size=14,
        img_size=256,
        out_chans=256,
    )
    torch.save(published.state_dict(), tmp_path / "shallow.pth")
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(3))

    model = load_model(tmp_path / "shallow.pth")

    with torch.no_grad():
        expected = published.image_encoder(image)
        assert relative_error(model.image_encoder(image), expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vit_b_agrees_with_both_packages_at_full_size(
    tmp_path, randomise, relative_error, prompt_case_points
):
    published = randomise(sam_model_registry["vit_b"]()).eval()
    torch.save(published.state_dict(), tmp_path / "vit_b.pth")
    model = load_model(tmp_path / "vit_b.pth")
    image = 255 * torch.rand(3, 683, 1024, generator=torch.Generator().manual_seed(4))

    expected = answer(published, image, prompt_case_points, multimask_output=True)
    got = answer(model, image, prompt_case_points, multimask_output=True)

    for name, values in expected.items():
        assert relative_error(got[name], values) < FULL_SIZE_TOLERANCE, name
    save_hugging_face(model, tmp_path / "hf")
    with torch.no_grad():
        of_transformers = SamModel.from_pretrained(tmp_path / "hf").get_image_embeddings(
            model.preprocess(image)[None]
        )
    assert relative_error(got["image_embeddings"], of_transformers) < FULL_SIZE_TOLERANCE
    stored = to_official_state_dict(model)
    assert stored.keys() == published.state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in published.state_dict().items())


@pytest.fixture
def prompt_case_points():
    return {
        "point_coords": torch.tensor(
            [[[500.0, 300.0], [20.0, 600.0]], [[1000.0, 10.0], [3.0, 4.0]]]
        ),
        "point_labels": torch.tensor([[1, 0], [1, 1]]),
        "boxes": torch.tensor([[100.0, 90.0, 700.0, 500.0], [0.0, 0.0, 1023.0, 682.0]]),
    }
