"""`sam_tiny`, the weights inside the package, works out of the box."""

import torch

from sam_train import load_model
from sam_train.checkpoints.formats import BUILT_IN
from sam_train.data.synthetic import SyntheticSource
from sam_train.metrics.click_rollout import click_rollout
from sam_train.prompts.simulator import PromptSimulator


def test_built_in_weights_load_by_name_and_know_things_from_their_ground():
    model = load_model("sam_tiny")
    scenes = SyntheticSource(num_scenes=12, split="val", seed=17)
    clicks = PromptSimulator(
        box_prob=0.0, num_corrections=2, click_sampling="center", exclude_clicked=True
    )

    curves = [click_rollout(model, scenes.record(index), clicks) for index in range(12)]

    clicked = torch.cat([curve.ious for curve in curves]).mean(dim=0)
    boxed = torch.cat([curve.box_ious for curve in curves]).mean()
    assert clicked[0] > 0.35 and clicked[2] > 0.4 and boxed > 0.6


def test_a_file_of_the_same_name_goes_before_the_built_in_weights(
    official_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sam_tiny").write_bytes(official_file[1].read_bytes())

    assert load_model("sam_tiny").image_encoder.img_size == 128


def test_built_in_weights_are_small_enough_to_travel():
    assert all(0 < path.stat().st_size < 20e6 for path in BUILT_IN.values())
