"""Where the images of a COCO file lie: at their `file_name`, or where the bare name leaves no doubt."""

from __future__ import annotations

import bisect
import logging
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sam_train.data.file_lists import Names, files_below
from sam_train.data.image_files import SUFFIXES, header_size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFolder:
    """The folder that a COCO file's names are looked for in.

    Attributes:
        path: the folder.
    """

    path: str

    def at(self, name: str) -> Path | None:
        """The file at `name` below the folder, if there is one.

        Raises:
            ValueError: the name leads out of the folder, or is none that a file can have.
        """
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"its file_name {name} leads out of the folder of images")
        path = Path(self.path) / name
        try:
            return path if path.is_file() else None
        except OSError as error:
            raise ValueError(
                f"its file_name {name[:100]} cannot be looked for: {error.strerror}"
            ) from None

    @cached_property
    def files(self) -> Names:
        """The images at any depth as "bare name/path from the folder", sorted; a walk through the folder."""
        log.warning(
            "not every image of the COCO file is where its file_name says in %s: those are looked for by "
            "their bare names, at any depth",
            self.path,
        )
        found = files_below(self.path, SUFFIXES)[1]
        return Names(sorted(f"{os.path.basename(name)}/{name}" for name in found))

    def by_bare_name(
        self, name: str, *, namesake: str | None, size: tuple[int, int] | None
    ) -> Path:
        """The only file at any depth with the last part of a name that no file lies at.

        Args:
            name: the image's `file_name`.
            namesake: that of another image of the same bare name, if there is one.
            size: (H, W) as the JSON states it; the file must have it.

        Raises:
            ValueError: there is none, or more than one may be meant; the message names both.
        """
        absent = f"there is no image {name} in {self.path}"
        advice = "let data.images be the folder that file_name begins in"
        found = self._of_bare_name(Path(name).name)
        if not found:
            raise ValueError(absent)
        if len(found) > 1:
            raise ValueError(f"{absent}, and it may be {found[0]} or {found[1]}: {advice}")
        if namesake is not None:
            raise ValueError(
                f"{absent}, and {found[0]} may be that of {namesake}, another image: {advice}"
            )
        path = Path(self.path) / found[0]
        if size is not None and (its := header_size(path)) != size:
            raise ValueError(
                f"{absent}, and {found[0]} is another: it is {its[0]} x {its[1]} pixels (height x "
                f"width), the JSON says {size[0]} x {size[1]}"
            )
        return path

    def _of_bare_name(self, bare: str) -> list[str]:
        prefix = f"{bare}/"
        first = bisect.bisect_left(self.files, prefix)
        found = []
        for place in range(first, len(self.files)):
            if not self.files[place].startswith(prefix):
                break
            found.append(self.files[place].removeprefix(prefix))
        return found
