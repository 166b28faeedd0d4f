"""A worker of the automatic stage: takes shards, makes them, judges what came out."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_engine.code_version import code_version
from data_engine.filters import Verdict
from data_engine.image_shards import (
    DamagedImage,
    InputShardError,
    ShardImage,
    ahead,
    read_images,
    stamp,
    sum_up,
)
from data_engine.shard_claims import RENEW_S, Share
from data_engine.shard_plan import PLAN, Plan, PlannedShard
from data_engine.shard_writer import (
    LostShardError,
    ShardManifest,
    ShardWriter,
    clear,
    finished,
    write_manifest,
    write_total,
)
from data_engine.stages.automatic_labels import SOURCE, Labelled, Labeller
from sam_train.convert.manifest import MANIFEST
from sam_train.data.source import DamageTally
from sam_train.inference.candidates import FilterReport

log = logging.getLogger(__name__)

MASKS_PER_SHARD = 10**7
"""Numbers set aside for the masks of each shard, so that all are unique without workers asking around."""


@dataclass
class Counts:
    """What an open shard holds so far, and the seconds of the mask generator in it."""

    images: int = 0
    masks: int = 0
    without_masks: int = 0
    overfull: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    damaged: list[dict[str, str]] = field(default_factory=list)
    model_s: float = 0.0

    def add(self, labelled: Labelled) -> None:
        """Counts an image."""
        self.images += 1
        self.masks += labelled.num_masks
        self.without_masks += not labelled.num_masks
        self.overfull += labelled.is_overfull
        self.rejects.update(labelled.rejects)
        self.model_s += labelled.model_s


class Worker:
    """A worker's way through its share of a plan.

    Attributes:
        done: the manifests of all finished shards, whoever made them, by the shards' names.
        made: those that this worker made.
        failed: the reasons why its other shards could not be.
    """

    def __init__(
        self,
        labeller: Labeller,
        plan: Plan,
        out: Path,
        share: Share,
        max_bad_fraction: float,
    ) -> None:
        self.labeller, self.plan, self.out, self.share = labeller, plan, out, share
        self.max_bad_fraction = max_bad_fraction
        self.own = plan.shards[share.worker :: share.num_workers]
        self.done: dict[str, ShardManifest] = {}
        self.made: list[ShardManifest] = []
        self.failed: list[str] = []
        self._look_for_finished()
        self.tally, self.verdict = self._counted()

    def run(self) -> None:
        """Makes what is missing; what cannot be read is left for the end."""
        with tqdm(unit=" images", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
            for shard in self.own:
                bar.set_description(f"shard {shard.number + 1}/{len(self.plan.shards)}")
                try:
                    self._take(shard, bar)
                except InputShardError as error:
                    log.error("%s", error)
                    self.failed.append(str(error))
        self._look_for_finished()
        if len(self.done) == len(self.plan.shards):
            self._finish()
        if self.failed:
            shown = "; ".join(self.failed[:5]) + ("; ..." if len(self.failed) > 5 else "")
            raise InputShardError(
                f"{len(self.failed)} of {len(self.own)} shards cannot be read, the others are kept: "
                f"{shown}. Put them back and start again"
            )

    def _look_for_finished(self) -> None:
        for shard in self.plan.shards:
            if shard.name not in self.done and (manifest := self._finished(shard)) is not None:
                self.done[shard.name] = manifest

    def _finished(self, shard: PlannedShard) -> ShardManifest | None:
        manifest = finished(self.out / shard.name)
        if manifest is None:
            return None
        if manifest.made_with != self.plan.made_with:
            log.warning("%s was made otherwise: done anew", shard.name)
            return None
        now = None if shard.url is None else stamp(shard.url)
        if now is not None and now[0] != manifest.input["bytes"]:
            log.warning("%s was made from another %s: done anew", shard.name, shard.url)
            return None
        return manifest

    def _take(self, shard: PlannedShard, bar: Any) -> None:
        """Makes a shard, unless it is finished or another worker's."""
        if shard.name in self.done or not self.share.claim(shard.name):
            return
        try:
            if (manifest := self._finished(shard)) is None:  # meanwhile
                manifest = self._make(shard, bar)
                self.made.append(manifest)
            self.done[shard.name] = manifest
        except LostShardError:
            log.warning("%s: another worker has taken it over", shard.name)
        finally:
            self.share.release(shard.name)

    def _make(self, shard: PlannedShard, bar: Any) -> ShardManifest:
        start, counts = time.perf_counter(), Counts()
        if shard.url is None:
            raise InputShardError(f"{shard.name} is gone: {self.out / PLAN} names it")
        as_found, source = stamp(shard.url), sum_up(shard.url)
        with ShardWriter(self.out / shard.name) as writer:
            self._fill(writer, shard, counts, bar)
            if stamp(shard.url) != as_found:
                raise InputShardError(f"{shard.url}: it was changed while it was read")
            written = writer.finish()
        manifest = ShardManifest(
            name=shard.name,
            bytes=written.bytes,
            sha256=written.sha256,
            input={"name": shard.url.rsplit("/", 1)[-1], **source._asdict()},
            images=counts.images,
            masks=counts.masks,
            images_without_masks=counts.without_masks,
            images_overfull=counts.overfull,
            rejects=self._rejects(counts),
            damaged=counts.damaged,
            made_with=self.plan.made_with,
            image_files=self.labeller.image_files,
            code_version=code_version(),
            wall_clock={
                "seconds": round(time.perf_counter() - start, 3),
                "model_seconds": round(counts.model_s, 3),
                "mtime_ns": written.mtime_ns,
            },
        )
        write_manifest(self.out / shard.name, manifest)
        log.info(
            "%s: %d images, %d masks, %.1f s",
            *(shard.name, counts.images, counts.masks, manifest.wall_clock["seconds"]),
        )
        return manifest

    def _fill(self, writer: ShardWriter, shard: PlannedShard, counts: Counts, bar: Any) -> None:
        self.labeller.segmenter.report = FilterReport()
        first_id = shard.number * MASKS_PER_SHARD
        for image in self._images(shard, counts):
            labelled = self.labeller.label(image, first_id + counts.masks)
            counts.add(labelled)
            if counts.masks > MASKS_PER_SHARD:
                raise ValueError(f"{shard.url}: more than {MASKS_PER_SHARD} masks: split it")
            self.verdict.report = self.labeller.segmenter.report
            self.verdict.add(
                images=1, empty=int(not labelled.num_masks), overfull=int(labelled.is_overfull)
            )
            self.verdict.check()
            writer.add(image.key, image.suffix, labelled.data, labelled.content)
            bar.update()
            bar.set_postfix_str(f"{counts.masks} masks in it", refresh=False)

    def _images(self, shard: PlannedShard, counts: Counts) -> Iterator[ShardImage]:
        """A shard's images; damaged ones are counted, and the claim is kept up."""
        assert shard.url is not None
        asked_at = time.monotonic()
        for image in ahead(read_images(shard.url)):
            if time.monotonic() - asked_at > RENEW_S:
                asked_at = time.monotonic()
                if not self.share.claim(shard.name):
                    raise LostShardError
            self.tally.seen += 1
            if isinstance(image, ShardImage):
                yield image
            else:
                self._note_damage(shard, image, counts)

    def _note_damage(self, shard: PlannedShard, image: DamagedImage, counts: Counts) -> None:
        counts.damaged.append({"name": image.key, "reason": image.reason})
        # Raises an error, instead of returning one, where it is one too many.
        self.tally.damaged(f"{shard.url}:{image.key}", image.reason)

    def _rejects(self, counts: Counts) -> dict[str, int]:
        """Of the generator's filters, in their order, then of the stage's own."""
        report = self.labeller.segmenter.report._asdict()
        return {**report, **counts.rejects, "kept": counts.masks}

    def _counted(self) -> tuple[DamageTally, Verdict]:
        """All finished shards, to be judged together."""
        tally = DamageTally(str(self.out), self.max_bad_fraction)
        verdict = Verdict(self.labeller.limits, report=self.labeller.segmenter.report)
        for own in self.done.values():
            tally.seen += own.images + len(own.damaged)
            tally.num_bad += len(own.damaged)
            tally.names += [f"{own.name}:{damaged['name']}" for damaged in own.damaged]
            verdict.add(
                images=own.images, empty=own.images_without_masks, overfull=own.images_overfull
            )
        return tally, verdict

    def _finish(self) -> None:
        """Judges the whole, and sums it up."""
        tally, verdict = self._counted()
        tally.finish()
        verdict.check(at_end=True)
        clear(self.out / PLAN, self.out / MANIFEST)
        write_total(self.out, SOURCE, [self.done[shard.name] for shard in self.plan.shards])
