"""What a computation costs, counted operation by operation."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sam_train.training.ledger import Ledger

KB = 1024


def test_memory_is_counted_while_it_is_held() -> None:
    with FakeTensorMode(), Ledger() as ledger:
        with ledger.part("first"):
            first = torch.zeros(256)
        with ledger.part("second"):
            second = torch.ones(512)
            view = second.view(2, 256)
            del second
        assert ledger.alive == {"first": KB, "second": 2 * KB}
        del view
        assert ledger.alive["second"] == 0
        again = first + 1

    assert ledger.peak == 3 * KB
    assert ledger.at_peak == {"first": KB, "second": 2 * KB}
    assert again.shape == (256,)


def test_what_was_there_before_is_left_out() -> None:
    with FakeTensorMode():
        weight = torch.zeros(256)
        ledger = Ledger()
        ledger.leave_out([weight])
        with ledger:
            weight.add_(1)

    assert ledger.peak == 0


def test_arithmetic_and_traffic_of_a_product() -> None:
    with FakeTensorMode(), Ledger() as ledger:
        left, right = torch.zeros(8, 16), torch.zeros(16, 4)
        ledger.operations.clear()
        left @ right
        left.t()

    (product,) = ledger.operations
    assert product.flops == 2 * 8 * 16 * 4
    assert product.moved == 4 * (8 * 16 + 16 * 4 + 8 * 4)


def test_the_backward_pass_and_recomputing_are_counted() -> None:
    def cost(checkpointed: bool) -> tuple[int, int]:
        with FakeTensorMode():
            layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
            with Ledger() as ledger:
                x = torch.zeros(128, 64)
                if checkpointed:
                    y = torch.utils.checkpoint.checkpoint(layers, x, use_reentrant=False)
                else:
                    y = layers(x)
                kept = sum(ledger.alive.values())
                y.sum().backward()
        return kept, sum(operation.flops for operation in ledger.operations)

    kept, flops = cost(checkpointed=False)
    kept_less, flops_more = cost(checkpointed=True)
    layer = 2 * 128 * 64 * 64
    assert flops == 4 * layer + 7 * layer  # the first layer's input needs no gradient
    assert layer <= flops_more - flops <= 4 * layer
    assert kept_less < kept


def test_real_tensors_beside_fake_ones_keep_their_numbers() -> None:
    index = torch.tensor([0, 0, 1])
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        most = int(torch.bincount(index).max())
        rows = torch.zeros(2, 4)[index]

    assert most == 2
    assert rows.shape == (3, 4)
    assert all(operation.moved for operation in ledger.operations)
