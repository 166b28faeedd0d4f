import torch

from sam_train.prompts.masks import best_candidate, chosen_logits, given_mask_logits
from sam_train.structures import MaskPrediction


def test_the_candidate_of_highest_predicted_iou_is_fed_back_as_it_is_and_without_a_graph():
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 7
    logits.requires_grad_()
    prediction = MaskPrediction(logits, torch.tensor([[0.1, 0.9, 0.3], [0.7, 0.2, 0.6]]))

    chosen = best_candidate(prediction)
    fed_back = chosen_logits(prediction, chosen)

    assert chosen.tolist() == [1, 0]
    assert fed_back.shape == (2, 1, 4, 4)
    assert torch.equal(fed_back[:, 0], torch.stack([logits[0, 1], logits[1, 0]]))
    assert not fed_back.requires_grad


def test_a_given_mask_becomes_sure_logits():
    masks = torch.tensor([[[True, False]]])

    assert given_mask_logits(masks).tolist() == [[[[10.0, -10.0]]]]
