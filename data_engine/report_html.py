"""A page as one HTML file that needs nothing else: figures inside, no script, no network."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from data_engine.report_page import Block, Drawn, Figures, Folded, Heading, Page, Table, Text

# Nothing is loaded or run, whatever a name in it may hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem;
       margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
.warns { background: #fff3cd; border-left: 4px solid #d39e00; padding: .6rem .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #e3e3e3; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7rem; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0 0 1rem; } figcaption { color: #555; font-size: .9rem; }
img { max-width: 100%; height: auto; display: block; } .wide img { min-width: 34rem; }
@media (max-width: 40rem) { td { white-space: normal; } }
pre { overflow-x: auto; background: #f6f6f6; padding: .8rem; font-size: .8rem; }
""".strip()


def as_html(page: Page, figures: Path) -> str:
    """The page, with the figures read from their folder."""
    body = "\n".join(_block(own, figures) for own in page.blocks)
    title = escape(page.title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<style>
{STYLE}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def _block(block: Block, figures: Path) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Text(text, warns):
            kind = ' class="warns"' if warns else ""
            return f"<p{kind}>{escape(text)}</p>"
        case Table(head, rows):
            return _table(head, rows)
        case Figures(drawn):
            plots = [_figure(own, figures) for own in drawn if not own.is_wide]
            sheets = [_figure(own, figures) for own in drawn if own.is_wide]
            grid = ['<div class="plots">', *plots, "</div>"] if plots else []
            return "\n".join([*grid, *sheets])
        case Folded(title, text):
            summary = f"<summary>{escape(title)}</summary>"
            return f"<details>{summary}<pre>{escape(text)}</pre></details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{_breakable(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return (
        '<div class="wide"><table>' + "".join(f"<tr>{own}</tr>" for own in lines) + "</table></div>"
    )


def _breakable(name: str) -> str:
    """A metric's name may be broken after its words: else a table of models is wider than the page."""
    return re.sub("([_@])", r"\1<wbr>", escape(name))


def _figure(own: Drawn, figures: Path) -> str:
    data = base64.b64encode((figures / own.file).read_bytes()).decode("ascii")
    image = f'<img alt="{escape(own.title)}" src="data:image/png;base64,{data}">'
    inner = f'<div class="wide">{image}</div>' if own.is_wide else image
    caption = f"<figcaption>{escape(own.caption)}</figcaption>" if own.caption else ""
    return f"<figure>{inner}{caption}</figure>"
