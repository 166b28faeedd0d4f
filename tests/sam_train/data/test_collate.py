import pytest
import torch

from sam_train.data.collate import collate, pack
from sam_train.structures import ImageSample


def sample(key, num_masks, size=(5, 8)):
    return ImageSample(
        key=key,
        image=torch.full((3, *size), len(key), dtype=torch.uint8),
        masks=torch.arange(num_masks)[:, None, None].expand(-1, 4, 4) % 2 == 0,
        boxes=torch.arange(num_masks * 4, dtype=torch.float).reshape(-1, 4),
        input_size=size,
        original_size=(50, 80),
        seed=len(key),
    )


def grouped(counts, **limits):
    samples = [sample(str(index), count) for index, count in enumerate(counts)]
    return [[len(one.masks) for one in group] for group in pack(samples, **limits)]


def test_a_batch_closes_at_its_images_or_before_its_masks_overflow():
    assert grouped([1, 2, 3, 4, 5], batch_size=2) == [[1, 2], [3, 4], [5]]
    assert grouped([3, 3, 3, 1, 1, 1], batch_size=3, max_masks=6) == [[3, 3], [3, 1, 1], [1]]
    assert grouped([9, 1, 9], batch_size=3, max_masks=6) == [[9], [1], [9]]


def test_masks_are_laid_end_to_end_and_none_is_repeated():
    samples = [sample("a", 3), sample("bb", 1, (8, 4)), sample("ccc", 2)]

    batch = collate(samples, 8)

    assert batch.image_index.tolist() == [0, 0, 0, 1, 2, 2]
    assert torch.equal(batch.masks, torch.cat([one.masks for one in samples]))
    assert torch.equal(batch.boxes, torch.cat([one.boxes for one in samples]))
    assert batch.input_sizes.tolist() == [[5, 8], [8, 4], [5, 8]]
    assert (batch.keys, batch.seeds) == (("a", "bb", "ccc"), (1, 2, 3))


def test_padding_is_zero_at_the_bottom_and_right():
    batch = collate([sample("a", 1, (5, 8)), sample("a", 1, (8, 4))], 8)
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (2, 3, 8, 8)
    assert batch.images[0, :, :5].eq(1).all() and batch.images[0, :, 5:].eq(0).all()
    assert batch.images[1, :, :, :4].eq(1).all() and batch.images[1, :, :, 4:].eq(0).all()


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        collate([], 8)
