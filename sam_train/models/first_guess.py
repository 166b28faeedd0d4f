"""A first answer straight from the features under the prompt, before the transformer looks twice."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_train.models.products import Linear
from sam_train.structures import (
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    PADDING,
    MaskPrediction,
)

CLICK_HALF_SIDE = 0.25
"""A click says nothing of the object's size; offsets from it are counted in quarters of the input."""
FARTHEST = 4.0
"""Offsets from the prompt, in its half sides, are cut off here."""
START_RADII = (1.0, 2.0, 0.5)
"""The ellipses that the candidates start as, in half sides of the prompt; repeated as needed."""
START_LOGIT = 1.5
SOFT_LOGIT = 4.0
TOKEN_PARTS = 3
"""Numbers of 8 significant bits (bfloat16) that together hold one of 24 (float32)."""
TOKEN_NUMBERS = 6 * TOKEN_PARTS
"""Places that a `PromptFrame` takes in a token."""


class PromptFrame(NamedTuple):
    """Where one prompt lies and how large it is; all of it in shares of the model input's sides.

    Attributes:
        center: (P, 2), (x, y) of the click or the box.
        half_sides: (P, 2) of the box; `CLICK_HALF_SIDE` for a click.
        is_box: (P, 1), 0 or 1.
        sign: (P, 1): 1 for what shows the object, -1 for a background click, 0 where nothing points.
            A guess at the latter two is no answer.
    """

    center: Tensor
    half_sides: Tensor
    is_box: Tensor
    sign: Tensor

    @classmethod
    def of_prompts(
        cls, coords: Tensor, labels: Tensor, pixels: tuple[int, int], *, corrects: bool
    ) -> PromptFrame:
        """Reads `Prompts`.

        Args:
            coords: (P, N, 2) of `Prompts`, model input frame.
            labels: (P, N).
            pixels: (H, W) of the model input.
            corrects: there is a mask already: the last click counts, whatever its label. Else what shows
                the object does: the box, or the last foreground click; a background click only where
                there is nothing else.
        """
        if not coords.shape[1]:
            coords = coords.new_zeros(len(coords), 1, 2)
            labels = labels.new_full((len(coords), 1), PADDING)
        size = coords.new_tensor([pixels[1], pixels[0]], dtype=torch.float32)
        is_point = labels != PADDING
        is_corner = (labels == BOX_TOP_LEFT) | (labels == BOX_BOTTOM_RIGHT)
        num_points = labels.shape[1]
        places = torch.arange(num_points, device=labels.device)
        if corrects:
            rank = (is_point & ~is_corner).long()
        else:
            rank = torch.where(is_corner, 2, (labels == FOREGROUND).long())
        last = torch.where(is_point, rank * num_points + places, -1).argmax(dim=1)
        rows = torch.arange(len(labels), device=labels.device)
        kind = labels[rows, last][:, None]
        end, start = coords[rows, last].float(), coords[rows, (last - 1).clamp(min=0)].float()
        is_box = (kind == BOX_BOTTOM_RIGHT) | (kind == BOX_TOP_LEFT)
        # A click is the index of a pixel, a box has edges.
        center = torch.where(is_box, (start + end) / 2, end + 0.5) / size
        half_sides = torch.where(is_box, (end - start).abs() / 2 / size, CLICK_HALF_SIDE)
        sign = torch.where(kind == BACKGROUND, -1.0, 1.0) * is_point.any(dim=1, keepdim=True)
        return cls(center, half_sides.clamp(min=0.5 / min(pixels)), is_box.float(), sign)

    def as_token(self, width: int, dtype: torch.dtype) -> Tensor:
        """The same as the first numbers of one token (P, 1, width), to travel with the point tokens.

        Args:
            width: of the tokens, `TOKEN_NUMBERS` at least.
            dtype: of the tokens. What it cannot hold of a number is said by two more: bfloat16 alone
                would move a click at 1,000 pixels by two.
        """
        rest = torch.cat(self, dim=1)
        parts = []
        for _ in range(TOKEN_PARTS):
            parts.append(rest.to(dtype))
            rest = rest - parts[-1].to(rest.dtype)
        return F.pad(torch.cat(parts, dim=1), (0, width - TOKEN_NUMBERS))[:, None]

    @classmethod
    def from_token(cls, token: Tensor) -> PromptFrame:
        """The inverse of `as_token`, in float32."""
        parts = token[:, 0, :TOKEN_NUMBERS].float().unflatten(1, (TOKEN_PARTS, -1))
        return cls(*parts.sum(dim=1).split((2, 2, 1, 1), dim=1))


class FirstGuess(nn.Module):
    """Candidates for what a prompt points at: filters from the features under it.

    The features at a click, or averaged over a box, give each candidate a filter over fine features of
    the image and an ellipse round the prompt; the sum of the two is its mask. Nothing is attended to and
    nothing of the image is made anew for a prompt, so that a thousand prompts cost little more than one:
    a training step can teach the encoder with every mask of every image. Masks by filters made of the
    features at the object: Tian et al. 2020, "Conditional Convolutions for Instance Segmentation"; Wang
    et al. 2020, "SOLOv2".

    Shapes: N images, P prompts, K candidates, C x h x w embedding, fine features F x 2h x 2w.

    Args:
        embed_dim: C.
        high_res_dim: F.
        num_candidates: K.
        filter_dim: width of the filters.
        hidden_dim: inner width of the layers that make them.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        high_res_dim: int,
        num_candidates: int = 3,
        filter_dim: int = 32,
        hidden_dim: int = 128,
    ) -> None:
        super().__init__()
        self.embed_dim, self.high_res_dim = embed_dim, high_res_dim
        self.num_candidates = num_candidates
        self.scale = filter_dim**-0.5
        self.keys = Linear(high_res_dim, filter_dim)
        self.is_box_embed = nn.Embedding(2, embed_dim)
        self.norm = nn.LayerNorm(2 * embed_dim)
        self.mlp = nn.Sequential(
            Linear(2 * embed_dim + 2, hidden_dim),
            nn.GELU(),
            Linear(hidden_dim, hidden_dim),
            nn.GELU(),
        )
        self.filters = Linear(hidden_dim, num_candidates * filter_dim)
        self.ellipses = Linear(hidden_dim, num_candidates * 6)
        self.ious = Linear(hidden_dim, num_candidates)
        self.read = nn.Sequential(
            Linear(4 * 2 * num_candidates, embed_dim), nn.GELU(), Linear(embed_dim, embed_dim)
        )
        self._start_as_ellipses()

    @torch.no_grad()
    def _start_as_ellipses(self) -> None:
        nn.init.normal_(self.ellipses.weight, std=0.02)
        bias = self.ellipses.bias.view(self.num_candidates, 6).zero_()
        for k, terms in enumerate(bias):
            radius = START_RADII[k % len(START_RADII)]
            # Of x, y, x^2, y^2, xy and 1, in half sides of the prompt.
            terms[2:4] = -(radius**-2)
            terms[5] = START_LOGIT

    def forward(
        self, image_embeddings: Tensor, high_res: Tensor, frame: PromptFrame, image_index: Tensor
    ) -> MaskPrediction:
        """Guesses.

        Args:
            image_embeddings: (N, C, h, w).
            high_res: (N, 2h, 2w, F) features.
            frame: of P prompts.
            image_index: (P,) the image that each prompt belongs to.

        Returns:
            Masks at half the decoder's resolution, (P, K, 2h, 2w), and their predicted IoUs.
        """
        slots = _Slots.of(image_index, len(image_embeddings))
        under = self._under_prompt(image_embeddings, frame, slots)
        kind = self.is_box_embed(frame.is_box[:, 0].long())
        described = self.norm(torch.cat([under, kind], dim=1))
        hidden = self.mlp(torch.cat([described, frame.half_sides.log().to(under.dtype)], dim=1))
        filters = self.scale * self.filters(hidden).unflatten(1, (self.num_candidates, -1))
        keys = self.keys(high_res).flatten(1, 2).transpose(1, 2)
        masks = slots.gather(slots.pad(filters).flatten(1, 2) @ keys, self.num_candidates)
        masks = masks.unflatten(2, high_res.shape[1:3])
        terms = self.ellipses(hidden).unflatten(1, (self.num_candidates, 6))
        ellipses = _ellipses(terms, frame, masks.shape[-2:]).to(masks.dtype)
        return MaskPrediction(masks + ellipses, self.ious(hidden))

    def _under_prompt(self, image_embeddings: Tensor, frame: PromptFrame, slots: _Slots) -> Tensor:
        """The embedding at a click, or averaged over the middle of a box: (P, C)."""
        h, w = image_embeddings.shape[-2:]
        windows = []
        for axis, length in ((1, h), (0, w)):
            places = (torch.arange(length, device=image_embeddings.device) + 0.5) / length
            # Half a token is as sharp as a click gets.
            sigma = torch.where(frame.is_box > 0, frame.half_sides[:, axis, None] / 2, 0.0)
            sigma = sigma.clamp(min=0.5 / length)
            weights = torch.exp(-0.5 * ((places - frame.center[:, axis, None]) / sigma) ** 2)
            windows.append(weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-6))
        window = (windows[0][:, :, None] * windows[1][:, None]).flatten(1)
        tokens = image_embeddings.flatten(2).transpose(1, 2)
        rows = slots.pad(window[:, None].to(tokens.dtype)).flatten(1, 2)
        return slots.gather(rows @ tokens, 1)[:, 0]

    def as_dense(self, guess: MaskPrediction, sign: Tensor) -> Tensor:
        """Reads the guess as a mask prompt is read: (P, C, h, w), zero where nothing points.

        What a background click points at is read apart from what a foreground click does.
        """
        maps = torch.tanh(guess.low_res_masks / SOFT_LOGIT)
        sign = sign[:, :, None, None].to(maps.dtype)
        maps = torch.cat([maps * sign.clamp(min=0), maps * (-sign).clamp(min=0)], dim=1)
        cells = F.pixel_unshuffle(maps, 2).permute(0, 2, 3, 1)
        return self.read(cells).permute(0, 3, 1, 2) * sign.abs()


class _Slots(NamedTuple):
    """P prompts of N images, as N rows of as many places as the fullest image needs.

    One matrix product an image, with no copy of the image for each prompt.
    """

    image_index: Tensor
    place: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, image_index: Tensor, num_images: int) -> _Slots:
        if num_images == 1:
            place = torch.arange(len(image_index), device=image_index.device)
            return cls(image_index, place, (1, len(image_index)))
        same = image_index[:, None] == image_index
        place = same.tril(-1).sum(dim=1)
        counts = torch.bincount(image_index, minlength=num_images)
        return cls(image_index, place, (num_images, int(counts.max())))

    def pad(self, rows: Tensor) -> Tensor:
        """(P, K, D) to (N, places, K, D)."""
        if self.shape[0] == 1:
            return rows[None]
        padded = rows.new_zeros(*self.shape, *rows.shape[1:])
        return padded.index_put((self.image_index, self.place), rows)

    def gather(self, padded: Tensor, k: int) -> Tensor:
        """(N, places * K, L) to (P, K, L)."""
        padded = padded.unflatten(1, (-1, k))
        return padded[0] if self.shape[0] == 1 else padded[self.image_index, self.place]


def _ellipses(terms: Tensor, frame: PromptFrame, size: tuple[int, int]) -> Tensor:
    """Quadratic forms of the offset from the prompt: (P, K, 6) terms to (P, K, H, W) logits, in float32."""
    with torch.autocast(device_type=terms.device.type, enabled=False):
        powers = []
        for axis, length in ((0, size[1]), (1, size[0])):
            places = (torch.arange(length, device=terms.device) + 0.5) / length
            offset = (places - frame.center[:, axis, None]) / frame.half_sides[:, axis, None]
            offset = offset.clamp(-FARTHEST, FARTHEST)
            powers.append(torch.stack([torch.ones_like(offset), offset, offset**2], dim=1))
        x, y, xx, yy, xy, one = terms.float().unbind(-1)
        zero = torch.zeros_like(one)
        # Rows are powers of y, columns of x.
        form = torch.stack([one, x, xx, y, xy, zero, yy, zero, zero], dim=-1).unflatten(-1, (3, 3))
        along_x = form @ powers[0][:, None]  # (P, K, 3, W)
        return powers[1].transpose(1, 2)[:, None] @ along_x
