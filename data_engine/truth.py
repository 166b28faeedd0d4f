"""Ground truth of registered images, for simulated annotators and for measuring, and for nobody else."""

from __future__ import annotations

from collections.abc import Sequence

from data_engine.records import Image, Rle
from sam_train.data.sa1b import is_wanted
from sam_train.data.shards import parse_sample
from sam_train.data.tar_samples import read_samples


def truth(image: Image) -> Sequence[Rle]:
    """The masks of an image by the shard that it lies in."""
    if image.member is None:
        return ()
    for sample in read_samples(image.path, is_wanted, image.offset or 0):
        if "json" not in sample.files:
            return ()
        return [entry["segmentation"] for entry in parse_sample(sample.files).entries]
    return ()
