"""The whole model: the published calls, the batched ones beside them, and gradients through both."""

import pytest
import torch

from sam_train.checkpoints.build import build_model
from sam_train.checkpoints.formats import read_checkpoint
from sam_train.checkpoints.load import load_model
from sam_train.structures import ImageFeatures, Prompts

TOLERANCE = 1e-5


@pytest.fixture
def models(official_file):
    """The published SAM and ours, with the same weights."""
    return official_file[0], load_model(official_file[1])


def images(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [255 * torch.rand(3, *size, generator=generator) for size in sizes]


@pytest.mark.parametrize("multimask_output", [True, False])
def test_forward_answers_several_images_as_published(models, relative_error, multimask_output):
    published, ours = models
    wide, tall = images((96, 128), (128, 70))
    logits = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    batch = [
        {
            "image": wide,
            "original_size": (150, 200),
            "point_coords": torch.tensor([[[5.0, 9.0], [100.0, 90.0]]]),
            "point_labels": torch.tensor([[1, 0]]),
        },
        {
            "image": tall,
            "original_size": (64, 35),
            "boxes": torch.tensor([[3.0, 4.0, 60.0, 70.0], [0.0, 0.0, 69.0, 127.0]]),
            "mask_inputs": logits,
        },
    ]

    with torch.no_grad():
        got = ours(batch, multimask_output)
    expected = published(batch, multimask_output)

    for ours_one, published_one in zip(got, expected, strict=True):
        assert ours_one.keys() == published_one.keys()
        for name in ("low_res_logits", "iou_predictions"):
            assert relative_error(ours_one[name], published_one[name]) < TOLERANCE
        assert ours_one["masks"].dtype == torch.bool
        assert ours_one["masks"].shape == published_one["masks"].shape
        # A logit that is zero but for rounding may fall on either side.
        assert (ours_one["masks"] ^ published_one["masks"]).float().mean() < 1e-4


@pytest.mark.parametrize("size", [(128, 128), (128, 71), (33, 128)])
def test_preprocessing_and_postprocessing_are_the_published_ones(models, relative_error, size):
    published, ours = models
    (image,) = images(size)
    assert torch.equal(ours.preprocess(image), published.preprocess(image))
    logits = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = published.postprocess_masks(logits, size, (210, 130))
    assert torch.equal(ours.postprocess_masks(logits, size, (210, 130)), expected)


def test_public_constants_are_the_published_ones(models):
    published, ours = models
    for name in ("mask_threshold", "image_format", "device"):
        assert getattr(ours, name) == getattr(published, name)
    assert torch.equal(ours.pixel_mean, published.pixel_mean)
    assert torch.equal(ours.pixel_std, published.pixel_std)
    assert ours.image_encoder.img_size == published.image_encoder.img_size
    size = published.prompt_encoder.image_embedding_size
    assert ours.prompt_encoder.image_embedding_size == size


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_encoding_a_padded_batch_equals_preprocessing_each_image(models, relative_error, dtype):
    _, ours = models
    singles = [image.round().to(dtype) for image in images((96, 128), (128, 70))]
    # Whatever lies in the padding is not looked at.
    padded = torch.full((2, 3, 128, 128), 77, dtype=dtype)
    for place, image in zip(padded, singles, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image

    with torch.no_grad():
        got = ours.encode(padded, torch.tensor([[96, 128], [128, 70]])).image_embeddings
        each = torch.stack([ours.preprocess(image) for image in singles])
        assert relative_error(got, ours.image_encoder(each)) < TOLERANCE


@pytest.mark.parametrize("multimask_output", [True, False])
def test_prompts_of_many_images_at_once_equal_one_image_at_a_time(
    models, relative_error, multimask_output
):
    _, ours = models
    generator = torch.Generator().manual_seed(2)
    prompts = Prompts(
        128 * torch.rand(5, 2, 2, generator=generator),
        torch.tensor([[1, -1], [2, 3], [0, -1], [1, -1], [2, 3]]),
        torch.randn(5, 1, 32, 32, generator=generator),
    )
    image_index = torch.tensor([0, 2, 2, 1, 0])
    sizes = torch.tensor([[128, 128]] * 3)

    with torch.no_grad():
        features = ours.encode(torch.stack(images(*[(128, 128)] * 3)), sizes)
        together = ours.decode(
            features, prompts, image_index=image_index, multimask_output=multimask_output
        )
        alone = [
            ours.decode(
                ImageFeatures(features.image_embeddings[image][None]),
                Prompts(*(part[i : i + 1] for part in prompts)),
                multimask_output=multimask_output,
            )
            for i, image in enumerate(image_index)
        ]
    for at_once, one_by_one in zip(together, zip(*alone, strict=True), strict=True):
        assert relative_error(at_once, torch.cat(one_by_one)) < TOLERANCE


def test_several_images_without_an_index_are_refused(models):
    _, ours = models
    features = ours.encode(torch.zeros(2, 3, 128, 128), torch.tensor([[128, 128]] * 2))
    prompts = Prompts(torch.zeros(1, 1, 2), torch.tensor([[1]]))
    with pytest.raises(ValueError, match="got 2: say which image each prompt belongs to"):
        ours.decode(features, prompts, multimask_output=True)


def test_gradients_reach_every_parameter_through_the_published_call(models):
    _, ours = models
    (image,) = images((128, 100))
    points = {"point_coords": torch.tensor([[[9.0, 9.0]]]), "point_labels": torch.tensor([[1]])}
    entry = {"image": image, "original_size": (128, 100), **points}
    with_mask = {**entry, "mask_inputs": torch.randn(1, 1, 32, 32)}
    for _ in range(2):
        loss = 0
        for multimask_output in (True, False):
            for output in ours([entry, with_mask], multimask_output):
                loss = loss + output["low_res_logits"].square().mean()
                loss = loss + output["iou_predictions"].square().mean()
        loss.backward()
    without = [name for name, p in ours.named_parameters() if p.grad is None]
    assert without == []
    still = [name for name, p in ours.named_parameters() if not p.grad.any()]
    # Kinds of points that were not given, and biases to which softmax is blind.
    assert {name for name in still if not name.endswith("k_proj.bias")} == {
        f"prompt_encoder.point_embeddings.{kind}.weight" for kind in (0, 2, 3)
    }


def test_compiling_the_encoder_keeps_the_weights_names_and_the_answer(
    official_file, relative_error, monkeypatch
):
    compiled = []
    compile_call = torch.nn.Module.compile

    def compile_quickly(module):
        compiled.append(type(module).__name__)
        compile_call(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    checkpoint = read_checkpoint(official_file[1])

    model = build_model({**checkpoint.config, "compile_encoder": True})
    model.load_state_dict(checkpoint.tensors)

    assert compiled == ["SamVitEncoder"]
    batch = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_model(official_file[1]).image_encoder(batch)
        assert relative_error(model.eval().image_encoder(batch), expected) < TOLERANCE


def test_pixel_statistics_must_fit_the_channels(official_file):
    config = read_checkpoint(official_file[1]).config
    config["image_encoder"]["in_chans"] = 1
    with pytest.raises(ValueError, match="pixel_mean has a value for each .* 1 channels, got 3"):
        build_model(config)


@pytest.mark.parametrize("multimask_output", [True, False])
def test_no_prompts_have_no_answers(models, multimask_output):
    _, ours = models
    entry = {"image": images((96, 128))[0], "original_size": (50, 60), "boxes": torch.zeros(0, 4)}
    (answer,) = ours([entry], multimask_output=multimask_output)
    count = 3 if multimask_output else 1
    assert answer["masks"].shape == (0, count, 50, 60)
    assert answer["iou_predictions"].shape == (0, count)
    assert answer["low_res_logits"].shape == (0, count, 32, 32)


def test_no_mask_prompts_are_no_masks(models):
    _, ours = models
    masks = torch.zeros(0, 1, 32, 32)
    prompts = Prompts(torch.zeros(0, 1, 2), torch.zeros(0, 1).long(), masks)
    features = ImageFeatures(torch.zeros(2, 32, 8, 8))
    index = torch.zeros(0, dtype=torch.long)
    answer = ours.decode(features, prompts, image_index=index, multimask_output=True)
    assert answer.low_res_masks.shape == (0, 3, 32, 32)


PROMPTS = Prompts(
    torch.tensor([[[20.0, 9.0], [60.0, 40.0]], [[1.0, 99.0], [3.0, 7.0]]]),
    torch.tensor([[1, 0], [1, 1]]),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_cpu_answers_in_float32(models, dtype):
    """Half precision costs the decoder time there; the encoder gains by it."""
    _, ours = models
    features = ImageFeatures(torch.randn(1, 32, 8, 8).to(dtype))
    exact = ImageFeatures(features.image_embeddings.float())
    prompts = PROMPTS._replace(mask_inputs=torch.randn(2, 1, 32, 32).to(dtype))
    with torch.no_grad():
        expected = ours.decode(exact, prompts, multimask_output=True)
        with torch.autocast("cpu", dtype):
            got = ours.decode(features, prompts, multimask_output=True)
            again = torch.compile(ours.decode, backend="eager")(
                features, prompts, multimask_output=True
            )
            assert ours.image_encoder(torch.zeros(1, 3, 128, 128)).dtype == dtype
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)
    assert {x.dtype for x in again} == {torch.float32}


def test_gradients_and_half_weights_keep_half_precision_under_autocast(models):
    """What the backward pass needs is half as much, as `sam-train estimate` counts it."""
    _, ours = models
    features = ImageFeatures(torch.randn(1, 32, 8, 8).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        with_gradients = ours.decode(features, PROMPTS, multimask_output=True)
        ours.prompt_encoder.bfloat16()
        with torch.no_grad():
            in_part = ours.decode(features, PROMPTS, multimask_output=True)
            ours.bfloat16()
            in_half = ours.decode(features, PROMPTS, multimask_output=True)
    answers = (with_gradients, in_part, in_half)
    assert [answer.low_res_masks.dtype for answer in answers] == 3 * [torch.bfloat16]


def test_an_overridden_decode_is_called_once(models, monkeypatch):
    _, ours = models
    calls, decode = [], ours.decode

    def counted(*args, **kwargs):
        calls.append(args)
        return decode(*args, **kwargs)

    monkeypatch.setattr(ours, "decode", counted)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours.decode(ImageFeatures(torch.zeros(1, 32, 8, 8)), PROMPTS, multimask_output=False)
    assert len(calls) == 1
