"""Products head by head are those of `einsum`, with its gradients, and theirs."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from sam_train.models.per_head import per_head

P, T, H, A, B = 4, 3, 2, 5, 6


@pytest.mark.parametrize("num_runs", [1, 2, 4])
@pytest.mark.parametrize("is_turned", [True, False])
def test_every_heads_rows_meet_its_matrix(num_runs, is_turned):
    torch.manual_seed(0)
    rows = torch.randn(P, T, H, A, dtype=torch.float64, requires_grad=True)
    matrices = torch.randn(num_runs, H, B, A, dtype=torch.float64, requires_grad=True).mT
    if not is_turned:
        rows, matrices = rows.transpose(1, 2).contiguous().transpose(1, 2), matrices.contiguous()

    got = per_head(rows, matrices)

    each = matrices.repeat_interleave(P // num_runs, dim=0)
    torch.testing.assert_close(got, torch.einsum("ptha,phab->pthb", rows, each))
    inputs = [x.detach().requires_grad_() for x in (rows, matrices)]
    assert gradcheck(per_head, inputs)
    assert gradgradcheck(per_head, inputs)


def test_transforms_get_the_same():
    torch.manual_seed(0)
    rows, matrices = torch.randn(P, T, H, A), torch.randn(2, H, A, B)
    transformed, _ = torch.func.vjp(per_head, rows, matrices)
    torch.testing.assert_close(transformed, per_head(rows, matrices))
