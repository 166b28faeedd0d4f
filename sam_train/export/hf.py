"""The folder of `transformers`' `SamModel` and `SamProcessor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sam_train.checkpoints.save import save_hugging_face
from sam_train.models.sam import Sam


@dataclass(frozen=True)
class HuggingFaceExport:
    """Writes config.json, model.safetensors and preprocessor_config.json."""

    is_folder: ClassVar[bool] = True
    # What transformers would read before, or beside, what is written here.
    owned: ClassVar[tuple[str, ...]] = (
        "processor_config.json",
        "pytorch_model.bin",
        "model.safetensors.index.json",
    )

    def write(self, model: Sam, out: Path) -> list[str]:
        """Writes the folder and returns a report, a line each.

        Raises:
            ValueError: `SamModel` cannot express the model.
        """
        save_hugging_face(model, out)
        size = sum(path.stat().st_size for path in out.iterdir())
        names = ", ".join(sorted(path.name for path in out.iterdir()))
        return [
            f"{names}: {size / 1e6:.1f} MB",
            "transformers.SamModel.from_pretrained(PATH), transformers.SamProcessor.from_pretrained(PATH)",
        ]
