"""Embeddings of images, computed before an annotator opens them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_engine.images import image_pixels
from data_engine.records import Image
from sam_train.inference.embedding_file import EmbeddingError
from sam_train.inference.predictor import SamPredictor
from sam_train.models.fingerprint import encoder_id


class Embeddings:
    """A file an image, in a folder of the encoder's own: another model finds none of these.

    Args:
        folder: where they are kept; it can be removed at any time.
        predictor: computes them and is set to them.
    """

    def __init__(self, folder: Path, predictor: SamPredictor) -> None:
        self._folder = folder / encoder_id(predictor.model)
        self._predictor = predictor

    def ahead(self, images: Iterable[Image]) -> int:
        """Computes those that are missing; returns how many.

        Raises:
            ImageGoneError: an image is not where it was.
            OSError: the folder cannot be written.
        """
        missing = [image for image in images if not self._path(image).is_file()]
        for image in missing:
            self._encode(image, image_pixels(image))
        return len(missing)

    def set(self, image: Image, pixels: np.ndarray) -> None:
        """Sets the predictor to an image, by its file or, where that is missing or damaged, by encoding it."""
        if not self._is_loaded(image):
            self._predictor.set_image(pixels)

    def set_and_keep(self, image: Image, pixels: np.ndarray) -> None:
        """The same, and keeps what was computed.

        Raises:
            OSError: the folder cannot be written.
        """
        if not self._is_loaded(image):
            self._encode(image, pixels)

    def _is_loaded(self, image: Image) -> bool:
        try:
            self._predictor.load_embedding(self._path(image))
        except (FileNotFoundError, EmbeddingError):
            return False
        return True

    def _encode(self, image: Image, pixels: np.ndarray) -> None:
        self._predictor.set_image(pixels)
        self._predictor.save_embedding(self._path(image))

    def _path(self, image: Image) -> Path:
        return self._folder / f"{image.id}.safetensors"
