import dataclasses
import itertools

import numpy as np
import pytest
import torch
from segment_anything.utils.transforms import ResizeLongestSide

from sam_train.data import transforms
from sam_train.data.augment import ColourJitter, Flips
from sam_train.data.crops import LargeScaleJitter, ObjectZoom
from sam_train.data.sa1b import ShardSource
from sam_train.data.shards import decode_record, encode_record
from sam_train.data.transforms import ToSample

IMG, GRID = 64, 32
ALL_FLIPS = Flips(horizontal=0.5, vertical=0.5, transpose=0.5)


def to_sample(**settings):
    return ToSample(**{"img_size": IMG, "mask_size": GRID, "min_mask_px": 0.0} | settings)


def rectangle(size, x0, y0, x1, y1):
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.mark.parametrize("crop", [None, LargeScaleJitter(scale=(0.5, 2.0)), ObjectZoom(prob=1)])
@pytest.mark.parametrize("flips", [None, ALL_FLIPS])
@pytest.mark.parametrize("size", [(80, 120), (100, 45)])
def test_the_mask_stays_on_what_the_image_shows(make, crop, flips, size):
    mask = rectangle(size, 12, 40, 36, 61)
    mask[40:50, 12:20] = False  # no symmetry, so that a wrong flip is seen
    record = make.record("a", mask[None])
    transform = to_sample(crop=crop, flips=flips)
    for seed in range(25):
        sample = transform(record, seed)

        height, width = sample.input_size
        assert sample.image.shape == (3, height, width)
        brightness = torch.zeros(IMG, IMG)
        brightness[:height, :width] = sample.image[0] / 255
        per_cell = torch.nn.functional.avg_pool2d(brightness[None], 2)[0]
        assert sample.masks[0][per_cell > 0.85].all()
        assert not sample.masks[0][per_cell < 0.15].any()
        assert (per_cell > 0.85).sum() >= 4
        shown = brightness > 0.5
        y, x = torch.nonzero(shown, as_tuple=True)
        tight = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
        torch.testing.assert_close(sample.boxes[0], tight.float(), atol=1.01, rtol=0)


def test_an_uncropped_box_is_the_annotations_own_to_the_fraction(make):
    record = make.record("a", rectangle((80, 120), 13, 40, 36, 61)[None])
    sample = to_sample()(record, 0)
    scale_x, scale_y = 64 / 120, 43 / 80
    expected = [13 * scale_x, 40 * scale_y, 36 * scale_x, 61 * scale_y]
    assert sample.boxes[0].tolist() == pytest.approx(expected)
    assert (sample.input_size, sample.original_size) == ((43, 64), (80, 120))


def test_the_image_is_resized_as_segment_anything_does(make):
    noise = np.random.default_rng(0).integers(0, 256, (90, 131, 3), dtype=np.uint8)
    record = make.record("a", rectangle((90, 131), 10, 10, 50, 50)[None], noise)
    sample = to_sample()(record, 0)
    expected = ResizeLongestSide(IMG).apply_image(noise)
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), expected)


def test_cells_at_least_half_covered_are_the_mask(make):
    record = make.record("a", rectangle((128, 128), 0, 0, 10, 9)[None])
    sample = to_sample()(record, 0)  # a cell is 4 x 4 original pixels
    y, x = torch.nonzero(sample.masks[0], as_tuple=True)
    # The third column is half covered and in; the third row is a quarter covered and out.
    assert (x.max().item(), y.max().item()) == (2, 1)
    assert sample.masks[0].sum() == 6


def test_an_object_thinner_than_a_cell_does_not_vanish(make):
    record = make.record("a", rectangle((128, 128), 17, 9, 18, 90)[None])
    sample = to_sample()(record, 0)
    assert sample.masks[0].any(dim=0).nonzero().flatten().tolist() == [4]
    assert sample.masks[0].sum() >= 20


def test_only_drawn_masks_are_decoded_and_each_once(make, monkeypatch):
    decoded = []

    class Counting(transforms.ManyRuns):
        def __init__(self, rles):
            decoded.extend(rle["counts"] for rle in rles)
            super().__init__(rles)

    monkeypatch.setattr(transforms, "ManyRuns", Counting)
    boxes = itertools.product(range(0, 60, 6), range(0, 60, 6))
    record = make.record("a", np.stack([rectangle((64, 64), x, y, x + 4, y + 4) for x, y in boxes]))
    for seed in range(5):
        decoded.clear()
        sample = to_sample(max_masks=7, flips=ALL_FLIPS)(record, seed)
        assert len(sample.masks) == len(decoded) == len(set(decoded)) == 7


def test_no_pixel_is_decoded_where_there_is_no_mask_to_draw(make):
    def load():
        raise AssertionError("decoded for nothing")

    record = make.record("a", np.ones((1, 30, 30), bool))
    record = type(record)(record.key, record.size, record.annotations, load)
    assert to_sample()(record, 0) is None


def test_masks_over_the_area_limit_are_not_drawn(make):
    masks = np.stack([rectangle((50, 50), 0, 0, 50, side) for side in (44, 45, 46, 50)])
    record = make.record("a", masks)
    assert len(to_sample().__call__(record, 0).masks) == 2
    assert len(to_sample(max_area_fraction=1.0)(record, 0).masks) == 4


def test_masks_too_small_on_the_grid_are_not_drawn(make):
    masks = np.stack([rectangle((64, 64), 0, 0, side, 1) for side in (1, 3, 4, 9)])
    record = make.record("a", masks)
    assert len(to_sample(min_mask_px=2.0)(record, 0).masks) == 2


def test_slivers_that_a_crop_leaves_are_dropped(make):
    record = make.record("a", rectangle((128, 128), 20, 20, 90, 90)[None])
    jitter = LargeScaleJitter(scale=(2.0, 2.0))
    shown = {}
    for minimum in (0.05, 0.5):
        transform = to_sample(crop=jitter, min_visible=minimum)
        boxes = [transform(record, seed).boxes[0] for seed in range(40)]
        sides = torch.stack([box[2:] - box[:2] for box in boxes])
        # A crop keeps the scale; where none shows enough, the whole image comes, at half of it.
        cropped = sides[(sides != 35).any(dim=1)]
        shown[minimum] = (cropped.prod(dim=1) / 70**2).min().item()
    assert shown[0.05] < 0.4 and shown[0.5] >= 0.5


def test_the_sample_follows_from_its_seed(make):
    record = make.record("a", rectangle((80, 120), 13, 40, 36, 61)[None])
    transform = to_sample(crop=LargeScaleJitter(), flips=ALL_FLIPS, colour=ColourJitter())

    first, again, other = transform(record, 5), transform(record, 5), transform(record, 6)

    assert first.seed == 5
    assert torch.equal(first.image, again.image) and torch.equal(first.masks, again.masks)
    assert first.input_size != other.input_size or not torch.equal(first.image, other.image)


def test_colour_leaves_masks_and_the_record_alone(make):
    record = make.record("a", rectangle((64, 64), 13, 30, 36, 61)[None])
    before = record.image.copy()
    sample = to_sample(colour=ColourJitter(invert=1.0))(record, 0)
    assert torch.equal(sample.masks, to_sample()(record, 0).masks)
    np.testing.assert_array_equal(record.image, before)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="mask_size"):
        ToSample(img_size=64, mask_size=128)


@pytest.mark.parametrize("name", ["nuclei", "coco_panoptic"])
def test_real_masks_agree_with_full_decoding(real_set, name):
    from sam_train.ops import rle

    source = ShardSource(path=f"{real_set(name)}/val-*.tar")
    transform = ToSample(img_size=256, mask_size=64, max_area_fraction=1.0)
    records = source.records(epoch=0, reader=0, num_readers=1, shuffle=False)
    for record in itertools.islice(records, 10):
        sample = transform(record, 0)
        height, width = sample.input_size
        by_box = {
            tuple(np.round(box, 3)): mask
            for box, mask in zip(sample.boxes.numpy(), sample.masks.numpy(), strict=True)
        }
        checked = 0
        for annotation in record.annotations:
            x, y, w, h = annotation.bbox
            scale = np.array([width / record.size[1], height / record.size[0]] * 2)
            box = np.float32([x, y, x + w, y + h] * scale)
            mask = by_box.get(tuple(np.round(box, 3)))
            if mask is None or w * h * scale[0] * scale[1] < 32**2:
                continue
            y_index, x_index = np.mgrid[: height // 4, : width // 4]
            rows = ((y_index + 0.5) * 4 / height * record.size[0]).astype(int)
            columns = ((x_index + 0.5) * 4 / width * record.size[1]).astype(int)
            nearest = rle.decode(annotation.rle)[rows, columns]
            shown = mask[: height // 4, : width // 4]
            assert (shown & nearest).sum() / (shown | nearest).sum() > 0.8
            checked += 1
        assert checked or name == "nuclei"


@pytest.mark.parametrize("crop", [None, LargeScaleJitter(scale=(0.5, 2.0))])
def test_a_view_that_is_shrunk_shows_the_same_from_a_reduced_decoding(make, crop):
    size = (301, 419)
    y, x = np.mgrid[: size[0], : size[1]]
    waves = 128 + 60 * np.sin(x / 17) + 60 * np.cos(y / 13)
    pixels = np.repeat(waves[..., None], 3, axis=2).clip(0, 255).astype(np.uint8)
    record = make.record("a", rectangle(size, 10, 10, 400, 290)[None], pixels)
    record = decode_record("a", encode_record(record))
    asked = []

    def load_reduced(shrink):
        asked.append(shrink)
        return record.load_reduced(shrink)

    reduced = dataclasses.replace(record, load_reduced=load_reduced)
    full = dataclasses.replace(record, load_reduced=None)
    transform = to_sample(crop=crop, flips=ALL_FLIPS)
    for seed in range(20):
        ours, expected = transform(reduced, seed), transform(full, seed)

        difference = (ours.image.int() - expected.image.int()).abs()
        assert difference.float().mean() < 1.5
        assert difference.max() <= 8
        assert torch.equal(ours.masks, expected.masks)
    # 419 px to 64 is 1 to 6.5; a crop that is shown larger is decoded finer.
    assert set(asked) == {4} if crop is None else len(set(asked)) > 1


@pytest.mark.parametrize("crop", [None, LargeScaleJitter(scale=(0.5, 3.0))])
def test_a_sample_is_the_same_from_a_picture_and_from_pixels_in_the_cache(make, crop):
    size = (301, 419)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    record = make.record("a", rectangle(size, 10, 10, 400, 290)[None], pixels)
    record = decode_record("a", encode_record(record))

    def from_pixels(shrink):
        picture, taken = record.load_reduced(shrink)
        return np.asarray(picture), taken

    kept = dataclasses.replace(record, load_reduced=from_pixels)
    transform = to_sample(crop=crop, flips=ALL_FLIPS)
    for seed in range(20):
        assert torch.equal(transform(record, seed).image, transform(kept, seed).image)
