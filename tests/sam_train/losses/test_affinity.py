"""The pairwise loss against a loop over all pairs."""

import numpy as np
import pytest
import torch

from sam_train.losses.affinity import affinity_loss


def by_hand(logits: np.ndarray, members: np.ndarray) -> float:
    alike, apart = [], []
    length = members.shape[1]
    for i in range(length):
        for j in range(length):
            of_i, of_j = members[:, i], members[:, j]
            either = (of_i | of_j).sum()
            if not either:
                continue
            target = (of_i & of_j).sum() / either
            p = 1 / (1 + np.exp(-logits[i, j]))
            loss = -(target * np.log(p) + (1 - target) * np.log(1 - p))
            alike.append((target, loss))
            apart.append((1 - target, loss))
    return 0.5 * sum(
        sum(weight * loss for weight, loss in kind) / max(1, sum(weight for weight, _ in kind))
        for kind in (alike, apart)
    )


@pytest.mark.parametrize("seed", range(3))
def test_it_equals_a_loop_over_all_pairs(seed):
    rng = np.random.default_rng(seed)
    logits, members = rng.normal(size=(12, 12)), rng.random((3, 12)) < 0.3
    members[2] = members[1] & (rng.random(12) < 0.5)  # a part of it
    got = affinity_loss(torch.tensor(logits), torch.tensor(members))
    assert got.item() == pytest.approx(by_hand(logits, members), rel=1e-5)


def test_right_affinities_cost_nothing_and_unknown_pairs_do_not_count():
    members = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
    logits = torch.full((5, 5), -30.0)
    logits[:2, :2] = logits[2, 2] = 30.0
    assert affinity_loss(logits, members) < 1e-6
    # Two tokens in no mask may be anything.
    logits[3:, 3:] = 30.0
    assert affinity_loss(logits, members) < 1e-6
    logits[0, 4] = 30.0
    assert affinity_loss(logits, members) > 0.5


def test_no_masks_and_only_one_kind_of_pairs_are_finite():
    logits = torch.randn(6, 6, requires_grad=True)
    for members in (torch.zeros(0, 6), torch.zeros(2, 6), torch.ones(1, 6)):
        loss = affinity_loss(logits, members.bool())
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logits.grad).all()
