"""Many first prompts a mask, a few masks played, half the size to begin with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sam_train.prompts.draws import PromptDraws
from sam_train.prompts.simulator import PromptSimulator
from sam_train.structures import ImageBatch
from sam_train.training.first_guess import GuessTeaching, covered_share, halve, select_masks
from sam_train.training.interactive import InteractiveTraining

MakeTraining = Callable[..., InteractiveTraining]
FIRST = PromptSimulator(num_corrections=0, num_extra_passes=0)


def draws_of(batch: ImageBatch) -> PromptDraws:
    counts = torch.bincount(batch.image_index, minlength=len(batch.images)).tolist()
    return PromptDraws.from_seeds(batch.seeds, counts)


def test_guesses_at_a_batch_are_learnt_by_heart(
    make_training: MakeTraining, blobs: ImageBatch
) -> None:
    training = make_training()
    teaching = GuessTeaching(prompts=FIRST, prompts_per_mask=3)
    optimizer = torch.optim.AdamW(training.model.parameters(), lr=2e-3)
    losses = []
    for _ in range(80):
        features = training.model.encode(blobs.images, blobs.input_sizes)
        losses_of_guesses = teaching.loss(
            training.model, features, blobs, draws_of(blobs), training.loss
        )
        assert losses_of_guesses.shape == (12,)
        optimizer.zero_grad()
        losses_of_guesses.mean().backward()
        optimizer.step()
        losses.append(losses_of_guesses.mean().item())
    assert losses[-1] < 0.35 * losses[0]


def test_guesses_at_one_mask_have_prompts_of_their_own(
    make_training: MakeTraining, blobs: ImageBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make_training()
    asked: list[Any] = []
    guess = training.model.guess
    monkeypatch.setattr(
        training.model,
        "guess",
        lambda features, prompts, **kwargs: (
            asked.append(prompts) or guess(features, prompts, **kwargs)
        ),
    )
    features = training.model.encode(blobs.images, blobs.input_sizes)
    teaching = GuessTeaching(prompts=FIRST, prompts_per_mask=4)
    teaching.loss(training.model, features, blobs, draws_of(blobs), training.loss)

    of_first_mask = asked[0].point_coords[:: len(blobs.masks)]
    assert len(of_first_mask) == 4
    assert len(torch.unique(of_first_mask.flatten(1), dim=0)) == 4
    played = training.prompts.first_prompts(blobs.masks, None, draws_of(blobs))
    assert not torch.equal(asked[0].point_coords[:4], played.point_coords), "draws of their own"


def test_some_masks_of_each_image_are_played_whatever_else_is_in_the_batch(
    blobs: ImageBatch,
) -> None:
    many = blobs._replace(
        masks=blobs.masks[[0, 1] * 4 + [2, 3] * 2],
        boxes=blobs.boxes[[0, 1] * 4 + [2, 3] * 2],
        image_index=torch.tensor([0] * 8 + [1] * 4),
    )
    teaching = GuessTeaching(prompts=FIRST, played_per_image=3)
    rows = teaching.played(many, draws_of(many))
    second = select_masks(many, torch.arange(8, 12))
    alone = second._replace(
        images=many.images[1:], seeds=many.seeds[1:], image_index=torch.zeros(4, dtype=torch.long)
    )

    assert torch.bincount(many.image_index[rows]).tolist() == [3, 3]
    assert (teaching.played(alone, draws_of(alone)) + 8).tolist() == rows[3:].tolist()
    others = {
        tuple(
            teaching.played(
                many._replace(seeds=(seed, 4)), draws_of(many._replace(seeds=(seed, 4)))
            ).tolist()
        )
        for seed in range(8)
    }
    assert len(others) > 3, "drawn by seed"
    everything = GuessTeaching(prompts=FIRST).played(many, draws_of(many))
    assert everything.tolist() == list(range(12))


def test_half_a_batch_is_the_same_scene(blobs: ImageBatch) -> None:
    half = halve(blobs)

    assert half.images.shape == (2, 3, 32, 32)
    assert half.masks.shape == (4, 16, 16)
    assert half.input_sizes.tolist() == [[32, 32], [24, 32]]
    assert torch.equal(half.boxes, blobs.boxes / 2)
    for small, large in zip(half.masks, blobs.masks, strict=True):
        assert small.sum() * 4 == pytest.approx(int(large.sum()), rel=0.25)
    torch.testing.assert_close(half.images.mean((2, 3)), blobs.images.float().mean((2, 3)))


def test_thin_masks_are_not_lost_at_half_size(blobs: ImageBatch) -> None:
    masks = torch.zeros_like(blobs.masks)
    masks[0, 5, 3:20] = True
    half = halve(blobs._replace(masks=masks)).masks
    assert half[0].any()
    assert not half[1].any(), "an empty mask stays empty"


def test_odd_rows_and_columns_do_not_darken_at_half_size(blobs: ImageBatch) -> None:
    sizes = torch.tensor([[64, 63], [47, 64]])
    images = torch.full_like(blobs.images, 100)
    images[0, :, :, 63:] = 0
    images[1, :, 47:] = 0
    half = halve(blobs._replace(images=images, input_sizes=sizes))
    assert half.input_sizes.tolist() == [[32, 32], [24, 32]]
    assert (half.images[0] == 100).all()
    assert (half.images[1, :, :24] == 100).all()
    assert not half.images[1, :, 24:].any()
    assert images[0, 0, 0, 63] == 0, "the batch itself stays as it is"


def test_a_mask_smaller_than_half_a_cell_is_still_there() -> None:
    masks = torch.zeros(3, 16, 16, dtype=torch.bool)
    masks[0, 5, 6] = True  # an eighth of a cell of 4 x 4, and less
    masks[1, 4:12, 4:12] = True
    shares = covered_share(masks, 4)
    assert shares[0].max() == 1
    assert (shares[0] > 0).sum() == 1
    assert torch.equal(shares[1] > 0.5, masks[1, ::4, ::4])
    assert not shares[2].any()


@pytest.mark.parametrize(("share", "sizes"), [(0.0, {64}), (0.5, {32, 64}), (1.0, {32})])
def test_the_first_share_of_a_run_sees_half_the_size(
    make_training: MakeTraining,
    blobs: ImageBatch,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    sizes: set[int],
) -> None:
    training = make_training(f"task.half_size_share={share}", "task=from_scratch")
    seen: list[int] = []
    encode = training.model.encode
    monkeypatch.setattr(
        training.model,
        "encode",
        lambda images, input_sizes: seen.append(images.shape[-1]) or encode(images, input_sizes),
    )
    monkeypatch.setattr(training, "log", lambda *args, **kwargs: None)
    monkeypatch.setattr(training, "log_dict", lambda *args, **kwargs: None)
    for step in range(4):
        monkeypatch.setattr(training, "_progress_of_all", lambda step=step: step / 4)
        training._trainer = None
        loss = training._at_current_size(blobs)
        assert torch.isfinite(loss)
        assert training.model.image_encoder.img_size == 64, "validation sees the whole size"
    assert set(seen) == sizes
    assert seen == sorted(seen)


def test_a_recipe_for_the_guess_trains_the_published_form_too(make_training: MakeTraining) -> None:
    training = make_training(
        "task=from_scratch",
        "model.mask_decoder.first_guess=null",
        "model.image_encoder.high_res_chans=0",
    )
    assert training.first_guess is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts_per_mask": 0}, "prompts_per_mask >= 1"),
        ({"played_per_image": 0}, "played_per_image >= 1"),
        ({"weight": -1.0}, "weight >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuessTeaching(prompts=FIRST, **settings)
