import numpy as np
import pytest

from sam_train.ops import many_runs, rle
from sam_train.ops.many_runs import ManyRuns


def summed_area(mask: np.ndarray, x_edges: np.ndarray, y_edges: np.ndarray) -> np.ndarray:
    """The area in each cell by brute force: every pixel's overlap with every cell."""
    height, width = mask.shape

    def overlap(edges: np.ndarray, length: int) -> np.ndarray:
        pixels = np.arange(length)
        low = np.maximum(edges[:-1, None], pixels)
        high = np.minimum(edges[1:, None], pixels + 1)
        return np.maximum(high - low, 0)

    return overlap(y_edges, height) @ mask @ overlap(x_edges, width).T


def padded(lines: list[np.ndarray]) -> np.ndarray:
    """Grids of different numbers of lines, the last of each repeated."""
    most = max(map(len, lines))
    return np.array([np.pad(own, (0, most - len(own)), mode="edge") for own in lines])


def random_masks(size: tuple[int, int], count: int = 12) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(size))
    masks = [rng.random(size) < rng.random() for _ in range(count)]
    masks[3][:], masks[7][:] = False, True
    return masks


@pytest.mark.parametrize("most_positions", [1, 2**16])  # one mask at a time, and all together
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 1), (24, 31), (60, 17)])
def test_coverage_is_the_exact_area_in_each_cell_of_any_grid(size, most_positions, monkeypatch):
    monkeypatch.setattr(many_runs, "MOST_POSITIONS", most_positions)
    masks, rng = random_masks(size), np.random.default_rng(0)
    which = rng.permutation(len(masks))[:9].tolist()
    x_edges = [np.sort(rng.uniform(-2, size[1] + 2, rng.integers(2, 9))) for _ in which]
    y_edges = [np.sort(rng.uniform(-2, size[0] + 2, rng.integers(2, 9))) for _ in which]
    x_edges[0], y_edges[0] = np.arange(size[1] + 1.0), np.arange(size[0] + 1.0)
    x_edges[1] = x_edges[1] * 0 + size[1] / 2  # no column at all

    runs = ManyRuns([rle.encode(mask) for mask in masks])

    assert runs.areas.tolist() == [mask.sum() for mask in masks]
    covered = [np.zeros((len(y) - 1, len(x) - 1)) for x, y in zip(x_edges, y_edges, strict=True)]
    for some, cells in runs.coverage(which, padded(x_edges), padded(y_edges)):
        for i, of_one in zip(some.tolist(), cells, strict=True):
            height, width = covered[i].shape
            covered[i][: len(of_one), : of_one.shape[1]] = of_one[:height, :width]
            assert not of_one[height:].any() and not of_one[:, width:].any()
    for mask, x, y, cells in zip(which, x_edges, y_edges, covered, strict=True):
        np.testing.assert_allclose(cells, summed_area(masks[mask], x, y), atol=1e-9)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (37, 1), (24, 31), (60, 17)])
def test_what_a_window_leaves_of_a_mask_is_that_of_its_pixels(size):
    masks, rng = random_masks(size), np.random.default_rng(1)
    masks.append(rng.random(size) < 0.02)
    which = np.sort(rng.permutation(len(masks))[:10]).tolist()
    corners = np.sort(rng.integers(-1, max(size) + 2, (len(which), 2, 2)), axis=1)
    windows = corners.reshape(-1, 4)

    areas, boxes = ManyRuns([rle.encode(mask) for mask in masks]).inside(which, windows)

    for i, (x0, y0, x1, y1), area, box in zip(which, windows, areas, boxes, strict=True):
        left = np.zeros(size, bool)
        rows, columns = slice(max(y0, 0), max(y1, 0)), slice(max(x0, 0), max(x1, 0))
        left[rows, columns] = masks[i][rows, columns]
        assert area == left.sum()
        y, x = np.nonzero(left)
        assert box.tolist() == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0] * 4)


def test_many_large_masks_are_measured_as_exactly_as_one():
    """All in one row of pixels: 64 of 4,000 x 4,000 px leave a float 25 binary digits for the fractions."""
    size = (4000, 4000)
    masks = [
        rle.from_runs(np.array([4000 * 1000 + 1000, 1, size[0] * size[1] - 4001001]), size)
    ] * 64
    x_edges, y_edges = np.array([1000.25, 1000.5]), np.array([1000.1, 1000.3])

    ((_, last),) = ManyRuns(masks).coverage([63], x_edges[None], y_edges[None])

    np.testing.assert_allclose(last, 0.25 * 0.2, rtol=1e-12)


def test_uncompressed_and_compressed_counts_may_stand_side_by_side():
    masks = random_masks((9, 13))
    rles = [rle.encode(mask) for mask in masks]
    rles[1] = {"size": [9, 13], "counts": rle.run_lengths(rles[1]).tolist()}
    rles[2] = {"size": [9, 13], "counts": rles[2]["counts"].encode()}

    assert ManyRuns(rles).areas.tolist() == [mask.sum() for mask in masks]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("z", "characters outside"),
        ("\u00e9", "not ASCII"),
        ("o", "end within a number"),
        ("", "cover 0 pixels"),
        ("4", "cover 4 pixels"),
        ([200, -59, 1], "negative"),
        ([0.5], "list of integers"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_damaged_mask_among_others_is_refused_with_what_is_wrong_with_it(
    counts, message, place
):
    masks = [rle.encode(mask) for mask in random_masks((11, 13), 10)[:3]]
    masks[place] = {"size": [11, 13], "counts": counts}

    with pytest.raises(ValueError, match=message):
        ManyRuns(masks)


def test_counts_that_only_together_cover_the_pixels_are_refused():
    # 100 pixels of the first of two masks of 16 x 8, and the 156 that are missing there in the second.
    masks = [{"size": [16, 8], "counts": [100]}, {"size": [16, 8], "counts": [156]}]

    with pytest.raises(ValueError, match="cover 100 pixels"):
        ManyRuns(masks)


def test_masks_of_another_size_are_refused():
    masks = [rle.encode(np.ones((4, 5), bool)), rle.encode(np.ones((5, 4), bool))]

    with pytest.raises(ValueError, match=r"one size, got \[\(4, 5\), \(5, 4\)\]"):
        ManyRuns(masks)
