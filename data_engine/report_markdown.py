"""A page as Markdown (tables as GitHub has them); its figures are files beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from data_engine.report_page import Block, Drawn, Figures, Folded, Heading, Page, Table, Text


def as_markdown(page: Page, figures: str) -> str:
    """The page; `figures` is their folder, relative to it."""
    parts = [f"# {_plain(page.title)}", *(_block(own, figures) for own in page.blocks)]
    return "\n\n".join(parts) + "\n"


def _block(block: Block, figures: str) -> str:
    match block:
        case Heading(text):
            return f"## {_plain(text)}"
        case Text(text, warns):
            return f"> {_plain(text)}" if warns else _plain(text)
        case Table(head, rows):
            return "\n".join([_row(head), _row(["---"] * len(head), raw=True), *map(_row, rows)])
        case Figures(drawn):
            return "\n\n".join(_figure(own, figures) for own in drawn)
        case Folded(title, text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"### {_plain(title)}\n\n{fence}\n{text}\n{fence}"


def _figure(own: Drawn, figures: str) -> str:
    image = f"![{_plain(own.title)}]({figures}/{own.file})"
    return f"{image}\n\n{_plain(own.caption)}" if own.caption else image


def _row(cells: Sequence[str], *, raw: bool = False) -> str:
    return "| " + " | ".join(cell if raw else _plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: names of images and people may hold anything."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(text.split()))
