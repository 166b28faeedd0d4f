import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sam_train.metrics import click_rollout as module
from sam_train.metrics.click_rollout import EncodedImage, click_rollout, trace_clicks
from sam_train.metrics.clicks import ClickMetrics
from sam_train.models.image_encoder import TimmEncoder
from sam_train.models.mask_decoder import MaskDecoder
from sam_train.models.prompt_encoder import PromptEncoder
from sam_train.models.sam import Sam
from sam_train.models.two_way_transformer import TwoWayTransformer
from sam_train.ops.rle import encode
from sam_train.prompts.simulator import PromptSimulator
from sam_train.structures import (
    BOX_TOP_LEFT,
    FOREGROUND,
    Annotation,
    ImageFeatures,
    ImageRecord,
    MaskPrediction,
)

CLICKS = PromptSimulator(
    box_prob=0,
    click_sampling="center",
    exclude_clicked=True,
    num_corrections=19,
    num_extra_passes=0,
)
SIDE = 64


class ScriptedModel(nn.Module):
    """Knows the truth, and after k clicks gives away as much of each object as its script says.

    An object is known by where it was clicked first or by its box. All its frames are one, so that what
    it answers at low resolution is what counts.
    """

    mask_threshold = 0.0
    device = torch.device("cpu")
    postprocess_masks = Sam.postprocess_masks

    def __init__(self, gt_masks: np.ndarray, scripts: list[list[float]]) -> None:
        super().__init__()
        self.image_encoder = nn.Identity()
        self.image_encoder.img_size = SIDE
        self.gt_masks, self.scripts = gt_masks, scripts
        self.num_encoded = 0
        self.decoded: list[tuple[int, bool, int]] = []

    def encode(self, images, input_sizes):
        assert images.shape == (1, 3, SIDE, SIDE)
        self.num_encoded += 1
        return ImageFeatures(images.float())

    def decode(self, features, prompts, *, image_index=None, multimask_output):
        labels = prompts.point_labels
        num_clicks = int(((labels[0] == 0) | (labels[0] == 1)).sum())
        self.decoded.append((len(labels), multimask_output, num_clicks))
        assert (prompts.mask_inputs is None) == (num_clicks <= 1)
        answers = [
            self.part(self.find(coords, kinds), num_clicks)
            for coords, kinds in zip(prompts.point_coords, labels, strict=True)
        ]
        logits = torch.stack(answers)[:, None].float() * 2 - 1
        ious = torch.full((len(logits), 1), 0.5)
        if multimask_output:
            # A better candidate that the model thinks little of, and an empty one.
            best = torch.stack(
                [self.truth(c, k) for c, k in zip(prompts.point_coords, labels, strict=True)]
            )
            logits = torch.cat([best[:, None].float() * 2 - 1, logits, -torch.ones_like(logits)], 1)
            ious = torch.tensor([[0.1, 0.5, 0.4]]).repeat(len(logits), 1)
        return MaskPrediction(logits, ious)

    def find(self, coords, labels) -> int:
        if labels[0] == BOX_TOP_LEFT:
            centre = coords[:2].mean(0)
        else:
            assert labels[0] == FOREGROUND
            centre = coords[0]
        x, y = centre.long().tolist()
        (found,) = np.flatnonzero(self.gt_masks[:, y, x])
        return int(found)

    def truth(self, coords, labels) -> torch.Tensor:
        return torch.from_numpy(self.gt_masks[self.find(coords, labels)])

    def part(self, i: int, num_clicks: int) -> torch.Tensor:
        """Objects are 20 pixels of full rows; a share of 0.05 is a column. A box counts as no click."""
        script = self.scripts[i]
        share = script[min(max(num_clicks, 1), len(script)) - 1]
        mask = torch.from_numpy(self.gt_masks[i]).clone()
        x = int(mask.any(0).nonzero()[0])
        mask[:, x + round(share * 20) :] = False
        return mask


def scene(num_objects: int) -> np.ndarray:
    masks = np.zeros((num_objects, SIDE, SIDE), bool)
    for i, mask in enumerate(masks):
        y, x = 2 + 6 * (i // 2), 2 + 30 * (i % 2)
        mask[y : y + 5, x : x + 20] = True
    return masks


def record_of(masks: np.ndarray, image: np.ndarray | None = None) -> ImageRecord:
    size = masks.shape[1:]
    image = np.zeros((*size, 3), np.uint8) if image is None else image
    annotations = tuple(
        Annotation(id=7 + i, rle=encode(mask), bbox=(0, 0, 1, 1), area=float(mask.sum()))
        for i, mask in enumerate(masks)
    )
    return ImageRecord("scene", size, annotations, lambda: image, "scenes")


SCRIPTS = [
    [0.5, 0.9, 0.5],  # 0.90 at the second click, then worse again
    [
        0.1,
        0.2,
        0.3,
        0.4,
        0.5,
        0.6,
        0.7,
        0.8,
        0.85,
        0.85,
        0.95,
    ],  # 0.85 at the ninth, 0.90 at the 11th
    [0.25],  # never
    [1.0],
]


def test_curves_worked_by_hand():
    masks = scene(4)
    model = ScriptedModel(masks, SCRIPTS)

    result = click_rollout(model, record_of(masks), CLICKS)

    assert result.ious.shape == (4, 20)
    for ious, script in zip(result.ious.tolist(), SCRIPTS, strict=True):
        expected = script + script[-1:] * 20
        assert ious[:9] == pytest.approx(expected[:9])
    assert result.ious[1, 9:11].tolist() == pytest.approx([0.85, 0.95])
    assert result.ious[2].tolist() == pytest.approx([0.25] * 20)
    assert result.predicted_ious[:, :9].eq(0.5).all()
    assert result.oracle_ious.tolist() == [1.0] * 4
    assert result.box_ious.tolist() == pytest.approx([0.5, 0.1, 0.25, 1.0])
    assert result.areas.tolist() == [100] * 4

    metrics = ClickMetrics(20)
    metrics.update(result)
    values = metrics.compute()
    assert values["noc@85"] == pytest.approx((2 + 9 + 20 + 1) / 4)
    assert values["noc@90"] == pytest.approx((2 + 11 + 20 + 1) / 4)
    assert values["failures@90"] == 0.25
    assert values["mean_iou@1"] == pytest.approx((0.5 + 0.1 + 0.25 + 1) / 4)


def test_after_nine_clicks_only_unfinished_objects_go_on():
    masks = scene(4)
    model = ScriptedModel(masks, SCRIPTS)

    result = click_rollout(model, record_of(masks), CLICKS, with_box=False)

    assert model.num_encoded == 1
    objects = [n for n, _, _ in model.decoded]
    assert objects == [4] * 9 + [2, 2] + [1] * 9
    assert [multimask for _, multimask, _ in model.decoded] == [True] + [False] * 19
    assert [clicks for _, _, clicks in model.decoded] == list(range(1, 21))
    assert result.ious.isnan().sum(1).tolist() == [11, 9, 0, 11]
    assert result.box_ious.isnan().all()


def test_nothing_depends_on_how_objects_are_chunked(monkeypatch):
    masks = scene(5)
    scripts = [SCRIPTS[i % 4] for i in range(5)]
    uniform = dataclasses.replace(CLICKS, click_sampling="uniform", num_corrections=3)
    for simulator in (CLICKS, uniform):
        whole = click_rollout(ScriptedModel(masks, scripts), record_of(masks), simulator)
        parts = click_rollout(
            ScriptedModel(masks, scripts), record_of(masks), simulator, chunk_size=2
        )
        monkeypatch.setattr(module, "MAX_MASK_BYTES", 1)
        monkeypatch.setattr(module, "MAX_LOGITS", 1)
        bounded = click_rollout(ScriptedModel(masks, scripts), record_of(masks), simulator)
        monkeypatch.undo()
        for a, b, c in zip(whole, parts, bounded, strict=True):
            assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
            assert torch.equal(a.nan_to_num(-1), c.nan_to_num(-1))


def test_a_short_protocol_is_a_simulator_of_fewer_corrections():
    masks = scene(4)
    short = dataclasses.replace(CLICKS, num_corrections=2)

    result = click_rollout(ScriptedModel(masks, SCRIPTS), record_of(masks), short)

    assert result.ious.shape == (4, 3)
    assert result.ious[0].tolist() == pytest.approx([0.5, 0.9, 0.5])


def test_annotations_without_a_pixel_are_left_out():
    masks = scene(3)
    masks[1] = False
    model = ScriptedModel(masks, [SCRIPTS[0], SCRIPTS[0], SCRIPTS[2]])

    result = click_rollout(model, record_of(masks), CLICKS, chunk_size=1)

    assert result.objects.tolist() == [0, 2]
    assert result.ious[:, 0].tolist() == pytest.approx([0.5, 0.25])


def test_an_image_without_a_single_usable_object_gives_an_empty_result():
    masks = np.zeros((2, SIDE, SIDE), bool)

    result = click_rollout(ScriptedModel(masks, SCRIPTS), record_of(masks), CLICKS)
    metrics = ClickMetrics(20)
    metrics.update(result)

    assert result.ious.shape == (0, 20)
    assert metrics.num_masks == 0


def test_a_trace_shows_what_the_rollout_saw():
    masks = scene(4)
    traces = trace_clicks(ScriptedModel(masks, SCRIPTS), record_of(masks), [1, 3], CLICKS)

    assert [[step.caption for step in steps] for steps in traces] == [
        ["1 click: IoU 0.10", "2 clicks: IoU 0.20", "3 clicks: IoU 0.30", "9 clicks: IoU 0.85"],
        ["1 click: IoU 1.00", "2 clicks: IoU 1.00", "3 clicks: IoU 1.00", "9 clicks: IoU 1.00"],
    ]
    assert (traces[1][0].mask == masks[3]).all()
    assert (traces[0][3].labels >= 0).sum() == 9


class SpyModel(nn.Module):
    """Answers with a constant low-resolution ramp and keeps what it was given."""

    mask_threshold = 0.0
    device = torch.device("cpu")
    postprocess_masks = Sam.postprocess_masks

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Identity()
        self.image_encoder.img_size = 32

    def encode(self, images, input_sizes):
        self.images, self.input_sizes = images, input_sizes
        return ImageFeatures(images.float())

    def decode(self, features, prompts, *, image_index=None, multimask_output):
        self.coords = prompts.point_coords
        ramp = torch.linspace(-1, 1, 8).expand(len(prompts.point_coords), 1, 8, 8)
        return MaskPrediction(ramp, torch.ones(len(ramp), 1))


def test_images_go_in_as_segment_anything_prepares_them_and_prompts_in_the_input_frame():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
    masks = np.zeros((1, 40, 80), bool)
    masks[0, 20:24, 40:48] = True
    model = SpyModel()

    click_rollout(model, record_of(masks, pixels), dataclasses.replace(CLICKS, num_corrections=0))

    assert model.input_sizes.tolist() == [[16, 32]]
    assert model.images.dtype == torch.uint8
    expected = np.asarray(Image.fromarray(pixels).resize((32, 16), Image.Resampling.BILINEAR))
    assert (model.images[0, :, :16].permute(1, 2, 0).numpy() == expected).all()
    assert (model.images[0, :, 16:] == 0).all()
    # The box, asked for last, has its edges at 40 and 48, 20 and 24 of the original image.
    assert torch.allclose(model.coords, torch.tensor([[[16.0, 8.0], [19.2, 9.6]]]))


def test_masks_come_back_at_original_resolution():
    image = EncodedImage(SpyModel(), ImageFeatures(torch.zeros(1)), (40, 80), (16, 32))
    ramp = torch.linspace(-1, 1, 8).expand(3, 8, 8)

    masks = image.masks(ramp)

    assert masks.shape == (3, 40, 80)
    assert masks.dtype == torch.bool
    assert masks[:, :, 40:].all()
    assert not masks[:, :, :40].any()


def test_a_sam_of_random_weights_is_measured():
    torch.manual_seed(0)
    sam = Sam(
        image_encoder=TimmEncoder(name="test_convnext", img_size=64, out_chans=32),
        prompt_encoder=PromptEncoder(embed_dim=32, mask_in_chans=4),
        mask_decoder=MaskDecoder(
            transformer_dim=32,
            transformer=TwoWayTransformer(depth=1, embedding_dim=32, num_heads=2, mlp_dim=32),
            iou_head_hidden_dim=16,
        ),
    ).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    record = record_of(scene(5), pixels)

    first, again = (click_rollout(sam, record, CLICKS) for _ in range(2))

    assert all(
        torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in zip(first, again, strict=True)
    )
    assert ((first.ious >= 0) & (first.ious <= 1))[:, :9].all()
    assert (first.oracle_ious >= first.ious[:, 0]).all()
    assert ((first.box_ious >= 0) & (first.box_ious <= 1)).all()
