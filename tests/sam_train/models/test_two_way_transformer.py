"""What the decoder's attention promises beyond equalling the published one."""

import pytest
import torch

from sam_train.models.two_way_transformer import Attention, TwoWayTransformer


def test_matched_projections_find_the_token_with_the_same_code():
    torch.manual_seed(0)
    attention = Attention(64, num_heads=1)
    attention.match_queries_to_keys(gain=8.0)
    codes = torch.nn.functional.normalize(torch.randn(1, 10, 64), dim=-1)

    q, k = attention.q_proj(codes), attention.k_proj(codes)

    assert (q @ k.mT)[0].argmax(-1).tolist() == list(range(10))


def test_only_the_cross_attentions_are_matched():
    transformer = TwoWayTransformer(
        depth=2, embedding_dim=32, num_heads=4, mlp_dim=16, matched_qk_gain=2.0
    )
    for name, module in transformer.named_modules():
        if isinstance(module, Attention):
            is_matched = torch.equal(module.q_proj.weight, module.k_proj.weight)
            assert is_matched == ("self_attn" not in name), name


def test_heads_that_do_not_divide_the_inner_width_are_refused():
    with pytest.raises(ValueError, match="num_heads must divide the inner width 16, got 5"):
        Attention(32, num_heads=5, downsample_rate=2)


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_the_epsilon_is_that_of_the_blocks_norms_alone(eps):
    transformer = TwoWayTransformer(
        depth=1, embedding_dim=16, num_heads=2, mlp_dim=8, layer_norm_eps=eps
    )
    block = transformer.layers[0]
    assert {n.eps for n in (block.norm1, block.norm2, block.norm3, block.norm4)} == {eps}
    assert transformer.norm_final_attn.eps == 1e-5


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    transformer = TwoWayTransformer(depth=1, embedding_dim=16, num_heads=2, mlp_dim=8, dropout=0.5)
    arguments = (torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4), torch.randn(1, 3, 16))
    with torch.no_grad():
        once, twice = transformer.train()(*arguments), transformer(*arguments)
        steady, again = transformer.eval()(*arguments), transformer(*arguments)
    assert not torch.equal(once[0], twice[0])
    assert torch.equal(steady[0], again[0])
