"""Our model with the weights of a Hugging Face folder answers as `transformers`' `SamModel` does."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SamConfig, SamModel

from sam_train.checkpoints.load import load_model

TOLERANCE = 1e-5  # of the largest number; float32 leaves about 1e-6


@pytest.fixture
def sam_model(randomise):
    """Builds `transformers`' SAM: 128 px, 8 x 8 tokens, windows of 3 that need padding."""

    def build(*, weights: str = "random", num_heads: int = 8, iou_head_depth: int = 4) -> SamModel:
        settings = SamConfig(
            vision_config={
                "hidden_size": 48,
                "output_channels": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 3,
                "image_size": 128,
                "window_size": 3,
                "global_attn_indexes": [1],
                "num_pos_feats": 16,
            },
            prompt_encoder_config={"hidden_size": 32, "image_size": 128, "mask_input_channels": 16},
            mask_decoder_config={
                "hidden_size": 32,
                "mlp_dim": 64,
                "num_attention_heads": num_heads,
                "iou_head_hidden_dim": 24,
                "iou_head_depth": iou_head_depth,
            },
        )
        torch.manual_seed(0)
        model = SamModel(settings)
        if weights == "random":
            randomise(model)
        return model.eval()

    return build


def answer(model, images, prompts, *, multimask_output):
    """(1, P, M, h, w) and (1, P, M) of a SamModel."""
    names = {
        "point_coords": "input_points",
        "point_labels": "input_labels",
        "boxes": "input_boxes",
        "mask_inputs": "input_masks",
    }
    batched = {names[key]: value[None] for key, value in prompts.items()}
    if "input_masks" in batched:
        batched["input_masks"] = batched["input_masks"][0]
    with torch.no_grad():
        return model(pixel_values=images, multimask_output=multimask_output, **batched)


@pytest.mark.parametrize("multimask_output", [True, False])
@pytest.mark.parametrize("num_prompts", [1, 4])
@pytest.mark.parametrize("size", [(128, 128), (81, 128)], ids=["square", "padded"])
def test_every_prompt_is_answered_as_by_transformers(
    sam_model, tmp_path, prompt_case, relative_error, num_prompts, size, multimask_output
):
    prompts = prompt_case(num_prompts, 128)
    if "mask_inputs" in prompts:
        # SamModel takes one mask an image.
        prompts = prompt_case(1, 128)
    published = sam_model()
    published.save_pretrained(tmp_path)
    image = 255 * torch.rand(3, *size, generator=torch.Generator().manual_seed(0))

    model = load_model(tmp_path)

    expected = answer(
        published, model.preprocess(image)[None], prompts, multimask_output=multimask_output
    )
    with torch.no_grad():
        entry = {"image": image, "original_size": size, **prompts}
        got = model([entry], multimask_output)[0]
        embeddings = model.image_encoder(model.preprocess(image)[None])
        of_published = published.get_image_embeddings(model.preprocess(image)[None])
    assert relative_error(embeddings, of_published) < TOLERANCE
    assert relative_error(got["low_res_logits"], expected.pred_masks[0]) < TOLERANCE
    assert relative_error(got["iou_predictions"], expected.iou_scores[0]) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [{"weights": "initial"}, {"num_heads": 4}, {"iou_head_depth": 2}],
    ids=["small initial weights", "heads", "shallow IoU head"],
)
def test_what_only_the_config_tells_is_kept(sam_model, tmp_path, relative_error, options):
    published = sam_model(**options)
    published.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    prompts = {
        "point_coords": torch.tensor([[[30.0, 40.0]]]),
        "point_labels": torch.tensor([[1]]),
    }

    model = load_model(tmp_path)

    expected = answer(published, images, prompts, multimask_output=True)
    with torch.no_grad():
        sparse, dense = model.prompt_encoder(
            points=(prompts["point_coords"], prompts["point_labels"])
        )
        masks, iou_predictions = model.mask_decoder(
            image_embeddings=model.image_encoder(images),
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
    assert relative_error(masks, expected.pred_masks[0]) < TOLERANCE
    assert relative_error(iou_predictions, expected.iou_scores[0]) < TOLERANCE


@pytest.mark.parametrize("stored", ["both", "second alone"])
def test_the_doubled_position_code_is_read_from_either_name(sam_model, tmp_path, stored):
    sam_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    code = tensors["shared_image_embedding.positional_embedding"].clone()
    tensors["prompt_encoder.shared_embedding.positional_embedding"] = code.clone()
    if stored == "second alone":
        del tensors["shared_image_embedding.positional_embedding"]
    save_file(tensors, file)

    model = load_model(tmp_path)

    assert torch.equal(model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix, code)


def test_sharded_and_pickled_weights_load_alike(sam_model, tmp_path):
    published = sam_model()
    published.save_pretrained(tmp_path / "whole")
    published.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    published.config.save_pretrained(tmp_path / "pickled")
    torch.save(published.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1

    whole = load_model(tmp_path / "whole").state_dict()

    for folder in ("shards", "pickled", "whole/model.safetensors"):
        state = load_model(tmp_path / folder).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in whole.items()), folder
