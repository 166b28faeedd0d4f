"""The first guess: where a prompt is, what it starts as, and how it reaches the decoder's answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sam_train.models.first_guess import CLICK_HALF_SIDE, SOFT_LOGIT, FirstGuess, PromptFrame
from sam_train.models.sam import Sam
from sam_train.structures import (
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    PADDING,
    ImageFeatures,
    MaskPrediction,
    Prompts,
)

BOX = [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]


def frame(points: list[list[float]], labels: list[int], *, corrects: bool = False) -> PromptFrame:
    coords = torch.tensor([points]).reshape(1, -1, 2)
    kinds = torch.tensor([labels], dtype=torch.long)
    return PromptFrame.of_prompts(coords, kinds, (100, 200), corrects=corrects)


def prompts(*objects: tuple[list[list[float]], list[int]]) -> Prompts:
    return Prompts(
        torch.tensor([points for points, _ in objects]),
        torch.tensor([labels for _, labels in objects]),
    )


@pytest.fixture
def features(tiny_sam: Sam) -> ImageFeatures:
    """Of three images of noise."""
    images = torch.randint(0, 256, (3, 3, 256, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return tiny_sam.encode(images, torch.full((3, 2), 256))


def test_a_frame_is_the_centre_and_half_sides_in_shares_of_the_input() -> None:
    click = frame([[9, 19], [0, 0]], [FOREGROUND, PADDING])
    box = frame([[20, 10], [60, 50]], BOX)

    assert click.center[0].tolist() == pytest.approx([9.5 / 200, 19.5 / 100]), "a pixel's middle"
    assert click.half_sides[0].tolist() == [CLICK_HALF_SIDE] * 2
    assert box.center[0].tolist() == pytest.approx([40 / 200, 30 / 100]), "edges have none"
    assert box.half_sides[0].tolist() == pytest.approx([20 / 200, 20 / 100])
    assert [click.is_box.item(), box.is_box.item()] == [0, 1]
    assert click.sign.item() == box.sign.item() == 1


PADDED = [0.0, 0.0]
CLICK, OTHER, CORNERS = [9.0, 9.0], [29.0, 39.0], [[20.0, 10.0], [60.0, 50.0]]


@pytest.mark.parametrize(
    ("points", "labels", "corrects", "center", "sign"),
    [
        # Nothing predicted yet: what shows the object.
        ([CLICK, OTHER, PADDED], [FOREGROUND, FOREGROUND, PADDING], False, [29.5, 39.5], 1),
        ([CLICK, OTHER, PADDED], [FOREGROUND, BACKGROUND, PADDING], False, [9.5, 9.5], 1),
        ([OTHER, PADDED], [BACKGROUND, PADDING], False, [29.5, 39.5], -1),
        ([*CORNERS, OTHER], [*BOX, BACKGROUND], False, [40, 30], 1),
        # segment_anything's order has the box last.
        ([OTHER, *CORNERS], [BACKGROUND, *BOX], False, [40, 30], 1),
        # A mask is there: the click that mends it.
        ([CLICK, OTHER, PADDED], [FOREGROUND, BACKGROUND, PADDING], True, [29.5, 39.5], -1),
        ([*CORNERS, OTHER], [*BOX, BACKGROUND], True, [29.5, 39.5], -1),
        ([OTHER, *CORNERS], [BACKGROUND, *BOX], True, [29.5, 39.5], -1),
        (CORNERS, BOX, True, [40, 30], 1),
    ],
)
def test_which_prompt_counts(
    points: list[list[float]], labels: list[int], corrects: bool, center: list[float], sign: int
) -> None:
    chosen = frame(points, labels, corrects=corrects)
    assert (chosen.center[0] * torch.tensor([200, 100])).tolist() == pytest.approx(center)
    assert chosen.sign.item() == sign
    assert chosen.is_box.item() == (center == [40, 30])


@pytest.mark.parametrize(("points", "labels"), [([[0, 0]], [PADDING]), ([], [])])
def test_nothing_points_where_there_is_no_point(
    points: list[list[float]], labels: list[int]
) -> None:
    assert frame(points, labels).sign.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frame_travels_in_a_token_of_any_precision_without_moving(dtype: torch.dtype) -> None:
    coords = torch.tensor([[[1001.3, 517.0], [1018.6, 700.25]]])
    sent = PromptFrame.of_prompts(coords, torch.tensor([BOX]), (1024, 1024), corrects=False)
    token = sent.as_token(32, dtype)
    assert token.shape == (1, 1, 32)
    assert token.dtype == dtype
    for before, after in zip(sent, PromptFrame.from_token(token), strict=True):
        assert torch.equal(before, after)


def test_it_starts_as_ellipses_of_three_sizes_round_the_prompt() -> None:
    torch.manual_seed(0)
    guess = FirstGuess(embed_dim=8, high_res_dim=4)
    click = frame([[100, 50], [0, 0]], [FOREGROUND, PADDING])
    box = frame([[20, 10], [60, 90]], BOX)

    def masks(prompt: PromptFrame) -> Tensor:
        nothing = torch.zeros(1, 8, 10, 20), torch.zeros(1, 20, 40, 4)
        return guess(*nothing, prompt, torch.zeros(1, dtype=torch.long)).low_res_masks[0] > 0

    areas = masks(click).flatten(1).sum(dim=1).tolist()
    assert areas[2] < areas[0] < areas[1]
    assert masks(click)[:, 10, 20].all()
    x0, y0, x1, y1 = 4, 2, 12, 18  # the box in cells
    inside = masks(box)[0, y0:y1, x0:x1].float().mean()
    rest = masks(box)[0].sum() - masks(box)[0, y0:y1, x0:x1].sum()
    assert inside > 0.7
    assert rest < 0.3 * (y1 - y0) * (x1 - x0)


def test_features_under_the_prompt_decide() -> None:
    torch.manual_seed(0)
    guess = FirstGuess(embed_dim=8, high_res_dim=4)
    embeddings = torch.randn(1, 8, 10, 20, requires_grad=True)
    high_res = torch.randn(1, 20, 40, 4)
    click = frame([[104, 54], [0, 0]], [FOREGROUND, PADDING])

    guess(
        embeddings, high_res, click, torch.zeros(1, dtype=torch.long)
    ).low_res_masks.sum().backward()

    assert embeddings.grad is not None
    asked = embeddings.grad.abs().sum(dim=1)[0]
    y, x = divmod(int(asked.argmax()), 20)
    assert (x, y) == (10, 5)
    assert asked[3:8, 8:13].sum() > 0.99 * asked.sum()


def test_prompts_of_many_images_in_any_order_are_answered_as_one_by_one(
    tiny_sam: Sam, features: ImageFeatures
) -> None:
    asked = prompts(
        ([[30, 40], [0, 0]], [FOREGROUND, PADDING]),
        ([[10, 20], [100, 200]], BOX),
        ([[200, 9], [0, 0]], [BACKGROUND, PADDING]),
        ([[90, 90], [0, 0]], [FOREGROUND, PADDING]),
    )
    image_index = torch.tensor([2, 0, 2, 1])

    with torch.no_grad():
        guess = tiny_sam.guess(features, asked, image_index=image_index)
        for i, image in enumerate(image_index.tolist()):
            one = ImageFeatures(features.image_embeddings[image : image + 1])
            alone = tiny_sam.guess(
                one, Prompts(asked.point_coords[i : i + 1], asked.point_labels[i : i + 1])
            )
            for together, by_itself in zip(guess, alone, strict=True):
                torch.testing.assert_close(together[i : i + 1], by_itself, rtol=1e-4, atol=1e-4)


def test_under_autocast_the_cpu_guesses_and_answers_in_float32(
    tiny_sam: Sam, features: ImageFeatures
) -> None:
    one = ImageFeatures(features.image_embeddings[:1].bfloat16())
    exact = ImageFeatures(one.image_embeddings.float())
    asked = prompts(([[100, 50], [0, 0]], [FOREGROUND, PADDING]))
    with torch.no_grad():
        expected = (
            tiny_sam.guess(exact, asked),
            tiny_sam.decode(exact, asked, multimask_output=True),
        )
        with torch.autocast("cpu", torch.bfloat16):
            got = tiny_sam.guess(one, asked), tiny_sam.decode(one, asked, multimask_output=True)
    for ours, right in zip(got, expected, strict=True):
        assert all(map(torch.equal, ours, right))
        assert ours.low_res_masks.dtype == torch.float32


@pytest.fixture
def unmended(tiny_sam: Sam) -> Sam:
    """A model whose transformer has no say in the masks."""
    with torch.no_grad():
        for mlp in tiny_sam.mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight.zero_()
            mlp.layers[-1].bias.zero_()
    return tiny_sam


def test_the_answer_starts_from_the_guess(unmended: Sam, features: ImageFeatures) -> None:
    one = ImageFeatures(features.image_embeddings[:1])
    asked = prompts(([[30, 40], [0, 0]], [FOREGROUND, PADDING]))
    with torch.no_grad():
        guess = unmended.guess(one, asked)
        candidates = unmended.decode(one, asked, multimask_output=True).low_res_masks
        single = unmended.decode(one, asked, multimask_output=False).low_res_masks

    expected = F.interpolate(guess.low_res_masks, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(candidates, expected, rtol=1e-4, atol=1e-5)
    best = int(guess.iou_predictions.argmax())
    torch.testing.assert_close(single, expected[:, best : best + 1], rtol=1e-4, atol=1e-5)


def test_a_correction_starts_from_the_mask_fed_back_softly_bounded(
    unmended: Sam, features: ImageFeatures
) -> None:
    fed_back = 30 * torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    asked = prompts(([[30, 40], [90, 9], [0, 0]], [FOREGROUND, BACKGROUND, PADDING]))
    one = ImageFeatures(features.image_embeddings[:1])
    with torch.no_grad():
        answer = unmended.decode(one, asked._replace(mask_inputs=fed_back), multimask_output=False)

    bounded = SOFT_LOGIT * torch.tanh(fed_back / SOFT_LOGIT)
    torch.testing.assert_close(answer.low_res_masks, bounded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_mask", [False, True])
def test_parts_driven_by_hand_answer_as_the_model_does(
    tiny_sam: Sam, features: ImageFeatures, with_mask: bool
) -> None:
    points = torch.tensor([[[30.0, 40.0]], [[200.0, 99.0]]]), torch.tensor([[1], [0]])
    masks = torch.randn(2, 1, 128, 128) if with_mask else None
    one = features.image_embeddings[:1]
    with torch.no_grad():
        sparse, dense = tiny_sam.prompt_encoder(points=points, boxes=None, masks=masks)
        by_hand = tiny_sam.mask_decoder(
            image_embeddings=one,
            image_pe=tiny_sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        asked = tiny_sam.prompt_encoder.to_prompts(points=points, masks=masks)
        answer = tiny_sam.decode(ImageFeatures(one), asked, multimask_output=True)

    assert by_hand[0].shape == (2, 3, 128, 128)
    for hand, model in zip(by_hand, answer, strict=True):
        torch.testing.assert_close(hand, model)


def test_the_size_of_the_input_may_change(tiny_sam: Sam) -> None:
    image = torch.randint(0, 256, (1, 3, 128, 128), generator=torch.Generator().manual_seed(0))
    tiny_sam.set_img_size(128)
    with torch.no_grad():
        features = tiny_sam.encode(image, torch.tensor([[128, 128]]))
        asked = prompts(([[30, 40], [0, 0]], [FOREGROUND, PADDING]))
        answer = tiny_sam.decode(features, asked, multimask_output=True)
    assert answer.low_res_masks.shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="multiple of the stride 8, got 100"):
        tiny_sam.set_img_size(100)


def test_embeddings_without_fine_features_are_refused(tiny_sam: Sam) -> None:
    asked = prompts(([[30, 40], [0, 0]], [FOREGROUND, PADDING]))
    with pytest.raises(
        ValueError, match="embeddings of 192 channels, got 64.*fine features included"
    ):
        tiny_sam.guess(ImageFeatures(torch.zeros(1, 64, 32, 32)), asked)


def test_candidates_must_be_as_many_as_the_decoders(compose: Callable) -> None:
    from sam_train import config

    cfg = compose("train", ["model.mask_decoder.first_guess.num_candidates=2"])
    with pytest.raises(Exception, match="first guess has 2 candidates, the decoder 3"):
        config.instantiate(cfg.model)


def test_encoder_and_guess_must_agree_on_the_fine_features(compose: Callable) -> None:
    from sam_train import config

    cfg = compose("train", ["model.image_encoder.high_res_chans=0"])
    cfg.model.mask_decoder.first_guess.high_res_dim = 32
    with pytest.raises(Exception, match=r"high_res_chans is 0, but .*first_guess takes 32"):
        config.instantiate(cfg.model)
    published = ["model.image_encoder.high_res_chans=0", "model.mask_decoder.first_guess=null"]
    model = config.instantiate(compose("train", published).model)
    assert not model.prompt_encoder.feeds_guess


@pytest.mark.parametrize("labels", [[BACKGROUND, PADDING], [PADDING, PADDING]])
def test_what_is_not_the_object_is_no_place_to_start_from(
    unmended: Sam, features: ImageFeatures, labels: list[int]
) -> None:
    one = ImageFeatures(features.image_embeddings[:1])
    asked = prompts(([[30, 40], [0, 0]], labels))
    with torch.no_grad():
        answer = unmended.decode(one, asked, multimask_output=True)
    assert not answer.low_res_masks.any()


def test_nothing_is_read_where_nothing_points(tiny_sam: Sam) -> None:
    guess = tiny_sam.mask_decoder.first_guess
    assert guess is not None
    noise = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        read = guess.as_dense(
            MaskPrediction(noise, noise[..., 0, 0]), torch.tensor([[1.0], [-1], [0]])
        )
    assert read.shape == (3, 64, 8, 8)
    assert read[0].any()
    assert read[1].any()
    assert not read[2].any()
