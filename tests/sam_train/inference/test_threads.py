"""Threads that share a model get the answers that one thread gets, bit for bit."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sam_train.checkpoints.build import build_model, model_config
from sam_train.checkpoints.load import load_model
from sam_train.data.synthetic import make_scene
from sam_train.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from sam_train.inference.model_registry import sam_model_registry
from sam_train.inference.predictor import SamPredictor
from sam_train.models.image_encoder import TimmEncoder
from sam_train.models.sam import Sam

VIT_TINY = Path(__file__).parent / "weights" / "vit_tiny_nuclei.pth"
NUM_THREADS = 4
ROUNDS = 2


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    """Every 0.1 ms instead of every 5 ms, so that what can go between does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(params=["sam_tiny", "vit_tiny", "tiny_vit"])
def model(request: pytest.FixtureRequest) -> Sam:
    """A model with a timm encoder and a first guess, SAM's own ViT (both trained), and TinyViT."""
    if request.param == "sam_tiny":
        return load_model("sam_tiny")
    if request.param == "vit_tiny":
        return load_model(VIT_TINY).float()
    torch.manual_seed(0)
    config = model_config("mobile_sam")
    config["image_encoder"] |= {"img_size": 128}
    return build_model(config).eval()


def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the jobs give, each in a thread of its own; all begin together."""
    barrier = threading.Barrier(len(jobs))

    def begin(job: Callable[[], Any]) -> Any:
        barrier.wait(60)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(begin, jobs))


def scene(seed: int) -> np.ndarray:
    return make_scene(np.random.default_rng(seed), (90 + 20 * seed, 150))[0]


def asked(model: Sam, seed: int) -> list[np.ndarray]:
    """Answers of a predictor to prompts of several kinds, in turns that differ by seed."""
    predictor, found = SamPredictor(model), []
    rng = np.random.default_rng(seed)
    for number in range(ROUNDS):
        predictor.set_image(scene(seed + number))
        points = rng.uniform(0, 80, (1 + (seed + number) % 3, 2))
        click = {"point_coords": points, "point_labels": np.arange(len(points)) % 2 ^ 1}
        masks, ious, low_res = predictor.predict(**click)
        found += [masks, ious, low_res]
        best = low_res[ious.argmax()][None]
        found += predictor.predict(**click, mask_input=best, multimask_output=False)
        found += predictor.predict(box=np.array([10, 10, 60, 50]), return_logits=True)
        grid = predictor.transform.apply_coords_torch(
            torch.from_numpy(rng.uniform(0, 80, (24, 1, 2))), predictor.original_size
        )
        labels = torch.ones(24, 1, dtype=torch.int64)
        found += [part.numpy() for part in predictor.predict_torch(grid, labels)]
    predictor.set_image_batch([scene(seed), scene(seed + 1)])
    for parts in predictor.predict_batch(box_batch=[np.array([5, 5, 40, 40]), []]):
        found += parts
    return found


def all_masks(model: Sam, seed: int) -> list[np.ndarray]:
    generator = SamAutomaticMaskGenerator(
        model,
        4,
        pred_iou_thresh=0.3,
        stability_score_thresh=0.5,
        crop_n_layers=1,
        crop_n_points_downscale_factor=2,
    )
    found = []
    for number in range(2):
        for mask in generator.generate(scene(seed + number)):
            found += [mask["segmentation"], np.array([mask["predicted_iou"], *mask["bbox"]])]
        found.append(np.array(generator.report))
    return found


def assert_same(got: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert len(ours) == len(theirs)
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_predictors_of_one_model_answer_as_one_after_the_other(model: Sam) -> None:
    expected = [asked(model, seed) for seed in range(NUM_THREADS)]

    got = at_once([lambda seed=seed: asked(model, seed) for seed in range(NUM_THREADS)])

    assert_same(got, expected)


def test_mask_generators_and_predictors_of_one_model_do_not_disturb_each_other(model: Sam) -> None:
    jobs: list[Callable[[], Any]] = [
        *(lambda seed=seed: all_masks(model, seed) for seed in range(2)),
        *(lambda seed=seed: asked(model, seed) for seed in range(2)),
    ]
    expected = [job() for job in jobs]

    assert_same(at_once(jobs), expected)


@pytest.mark.parametrize("name", ["xception41", "convnext_atto"])
def test_an_encoder_whose_features_timm_finds_by_hooks_keeps_threads_apart(name: str) -> None:
    torch.manual_seed(0)
    encoder = TimmEncoder(name=name, img_size=64, out_chans=8).eval()

    @torch.no_grad()
    def encode(seed: int) -> list[np.ndarray]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(4, 1, 3, 64, 64, generator=generator)
        return [encoder(image).numpy() for image in images]

    expected = [encode(seed) for seed in range(NUM_THREADS)]
    got = at_once([lambda seed=seed: encode(seed) for seed in range(NUM_THREADS)])

    assert_same(got, expected)


def test_models_are_loaded_and_built_side_by_side(tmp_path: Path) -> None:
    # A file in torch's older form, beside the newer one's.
    state = {k: v.float() for k, v in torch.load(VIT_TINY, weights_only=True).items()}
    old = tmp_path / "old.pth"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    filters = list(warnings.filters)

    def load() -> list[dict[str, torch.Tensor]]:
        models = [load_model(path) for path in ("sam_tiny", VIT_TINY, old, "sam_tiny", old)]
        model_config("sam_vit_tiny")
        return [model.state_dict() for model in models]

    expected = load()
    for states in at_once([load] * NUM_THREADS):
        for got, wanted in zip(states, expected, strict=True):
            assert got.keys() == wanted.keys()
            assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert list(warnings.filters) == filters, "a warning that is kept back here is lost elsewhere"


def test_the_registry_builds_in_several_threads_what_it_builds_in_one() -> None:
    sizes = {
        name: tensor.shape for name, tensor in sam_model_registry["vit_t"]().named_parameters()
    }

    for built in at_once([sam_model_registry["vit_t"]] * NUM_THREADS):
        assert {name: tensor.shape for name, tensor in built.named_parameters()} == sizes


def test_threads_may_be_the_first_to_import_anything() -> None:
    code = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
barrier = threading.Barrier(4)
def first(number):
    barrier.wait(60)
    import sam_train, numpy
    if number % 2:
        predictor = sam_train.SamPredictor(sam_train.load_model("sam_tiny"))
        predictor.set_image(numpy.zeros((60, 80, 3), numpy.uint8))
        return predictor.predict(box=numpy.array([5, 5, 40, 40]))[1].sum()
    generator = sam_train.SamAutomaticMaskGenerator(sam_train.load_model("sam_tiny"), 2)
    return len(generator.generate(numpy.zeros((60, 80, 3), numpy.uint8))) + 1
with ThreadPoolExecutor(4) as pool:
    print([bool(x) for x in pool.map(first, range(4))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "[True, True, True, True]", done.stderr[-2000:]
