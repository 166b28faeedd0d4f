"""Which shards a stage works through, fixed by its first worker: `generate.json` beside what is written.

Workers know of each other by this file alone. It gives every shard its number, from which its masks are
numbered, and tells a shard that was removed from one that never was.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.shardlists import expand_urls

from data_engine.shard_writer import manifest_path
from sam_train.data.sa1b import ShardSource
from sam_train.data.tar_samples import local_path
from sam_train.ops.files import write_atomically
from sam_train.training.run_folder import differences

PLAN = "generate.json"


class PlannedShard(NamedTuple):
    """A shard to be made.

    Attributes:
        name: of its file, and of its input's, but where two inputs share one: then a folder's name is
            put before it.
        number: among all of the stage.
        url: of its input; None where that is gone.
    """

    name: str
    number: int
    url: str | None


@dataclass(frozen=True)
class Plan:
    """All shards of a stage, in the order of their numbers.

    Attributes:
        made_with: what decides what is in them, as plain values.
        shards: all, whoever makes them.
    """

    made_with: Mapping[str, Any]
    shards: tuple[PlannedShard, ...]


def open_plan(out: Path, paths: str | Sequence[str], made_with: Mapping[str, Any]) -> Plan:
    """Reads the plan of a folder, or makes it.

    Args:
        out: the folder.
        paths: of the inputs, as `ShardSource` takes them.
        made_with: what decides what is in the shards, as plain values.

    Raises:
        FileNotFoundError: there are no inputs.
        ValueError: the folder holds the work of another model or configuration, or there are inputs
            that the plan does not know.
    """
    made_with = json.loads(json.dumps(made_with))
    path = out / PLAN
    urls, absent = _inputs(paths)
    named = _named(urls)
    for url in named.values():
        if (local := local_path(url)) and Path(local).resolve().parent == out.resolve():
            raise ValueError(f"{out} holds the shards of images themselves: choose another out=DIR")
    if not path.is_file():
        if absent:
            raise FileNotFoundError(f"no file {absent[0]}: expected a shard of images, a .tar file")
        _publish(path, {"made_with": made_with, "shards": list(named)})
    there = _read(path)
    changes = differences(there["made_with"], made_with)
    if changes and not _is_begun(out, there["shards"]):
        # Nothing is finished: a mistake in the thresholds, say, that may be mended.
        write_atomically(path, _text({"made_with": made_with, "shards": list(named)}))
        there, changes = _read(path), []
    if changes:
        lines = "\n".join(f"  {line}" for line in changes[:20])
        raise ValueError(
            f"{out} holds shards made otherwise:\n{lines}\nChoose another out=DIR, or delete this one"
        )
    if more := sorted(named.keys() - set(there["shards"])):
        raise ValueError(
            f"{len(more)} shards were added since {out} was begun ({', '.join(more[:5])}): choose "
            "another out=DIR for them"
        )
    shards = (
        PlannedShard(name, i, named.get(name))
        for i, name in enumerate(there["shards"])
        if name not in there["left_out"]
    )
    return Plan(made_with, tuple(shards))


def planned(out: Path) -> list[str]:
    """The names of a plan's shards; none where there is no plan.

    Raises:
        ValueError: it is damaged.
    """
    if not (out / PLAN).is_file():
        return []
    there = _read(out / PLAN)
    return [name for name in there["shards"] if name not in there["left_out"]]


def leave_out(out: Path, name: str) -> None:
    """Takes a shard out of a plan, if there is one: its input was emptied. The others keep their numbers."""
    path = out / PLAN
    if path.is_file():
        there = _read(path)
        write_atomically(path, _text({**there, "left_out": [*there["left_out"], name]}))
    for left in (out / name, manifest_path(out / name)):
        left.unlink(missing_ok=True)


def _inputs(paths: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """The inputs that exist, and of what was named, what does not."""
    stated = [paths] if isinstance(paths, str) else list(paths)
    entries = [
        url for text in stated for url in ([text] if os.path.exists(text) else expand_urls(text))
    ]
    urls, absent = [], []
    for entry in entries:
        try:
            urls += ShardSource(path=entry).shards()
        except FileNotFoundError:
            absent.append(entry)
    return urls, absent


def _named(urls: Sequence[str]) -> dict[str, str]:
    """The inputs by the name of what is made of them."""
    names = [url.rsplit("/", 1)[-1] for url in urls]
    if len(set(names)) < len(names):
        names = ["-".join(url.split("/")[-2:]) for url in urls]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"several shards are called {twice[0]}: rename one, or its folder")
    return dict(zip(map(_tar_name, names), urls, strict=True))


def _tar_name(name: str) -> str:
    """`a.tar` of `a.tar`, `a.tar.gz` or `a.tar?version=2`: what is written is not compressed."""
    return re.sub(r"(\.tar(\.\w+)?|\.tgz)?$", ".tar", name.split("?")[0], count=1)


def _is_begun(out: Path, names: Sequence[str]) -> bool:
    return any(manifest_path(out / name).is_file() for name in names)


def _publish(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file that is not there; of several who try at once, one wins."""
    own = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    write_atomically(own, _text(content))
    try:
        os.link(own, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            "made_with": dict(content["made_with"]),
            "shards": list(content["shards"]),
            "left_out": list(content.get("left_out", ())),
        }
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is damaged or no plan of data-engine generate: choose another out=DIR"
        ) from None


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
