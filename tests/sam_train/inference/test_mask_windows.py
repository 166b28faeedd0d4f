"""Logits in windows: those of `postprocess_masks`, and below the cut wherever no window is."""

from __future__ import annotations

import pytest
import torch

from sam_train.inference.mask_windows import MaskUpscaler
from sam_train.models.sam import Sam

CUT = -1.0


@pytest.mark.parametrize(
    ("input_size", "size"),
    [((64, 64), (64, 64)), ((40, 64), (333, 530)), ((64, 17), (50, 13)), ((64, 1), (900, 2))],
)
@pytest.mark.parametrize("max_logits", [1, 10**7])
def test_windows_hold_what_the_whole_upscaling_does(
    tiny_sam: Sam, input_size: tuple[int, int], size: tuple[int, int], max_logits: int
) -> None:
    tiny_sam.set_img_size(64)
    side = tiny_sam.low_res_size
    generator = torch.Generator().manual_seed(0)
    low_res = 3 * torch.randn(6, side, side, generator=generator) - 9
    low_res[1, 3:5, 2:4] = low_res[2, 0, 0] = low_res[3, :, :2] = low_res[4, -1, -1] = 5
    low_res[5] = -9
    expected = tiny_sam.postprocess_masks(low_res[:, None], input_size, size)[:, 0]
    seen = []

    for own in MaskUpscaler(tiny_sam, input_size, size).windows(low_res, CUT, max_logits):
        height, width = own.logits.shape[1:]
        corners = zip(own.which, own.logits, own.tops, own.lefts, strict=True)
        for which, logits, top, left in corners:
            seen.append(int(which))
            place = slice(top, top + height), slice(left, left + width)
            torch.testing.assert_close(logits, expected[which][place], rtol=0, atol=2e-5)
            rest = expected[which].clone()
            rest[place] = -99
            assert not (rest > CUT).any()

    assert sorted(seen) == list(range(6))


def test_no_masks_have_no_windows(tiny_sam: Sam) -> None:
    upscaler = MaskUpscaler(tiny_sam, (64, 64), (64, 64))
    assert not list(upscaler.windows(torch.zeros(0, 16, 16), CUT, 100))
