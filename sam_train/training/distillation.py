"""Trains a small Sam from a large one: its image embeddings first, then its answers to prompts."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sam_train.checkpoints.build import build_model
from sam_train.checkpoints.load import load_model, stored_config
from sam_train.data.datamodule import SamDataModule
from sam_train.data.embedding_cache import EmbeddingCache
from sam_train.data.mixture import BySource
from sam_train.data.source import DamagedSampleError
from sam_train.losses.distillation import TeacherLoss, embedding_errors
from sam_train.metrics.agreement import TaughtMetrics, teacher_agreement
from sam_train.metrics.click_rollout import click_rollout
from sam_train.models.fingerprint import embedding_shape, encoder_id, model_id
from sam_train.models.sam import Sam
from sam_train.ops.coords import cells_inside
from sam_train.structures import ImageBatch, ImageFeatures, ImageRecord, MaskPrediction
from sam_train.training.first_guess import Question
from sam_train.training.interactive import InteractiveTraining

log = logging.getLogger(__name__)

TAKEN_OVER = ("prompt_encoder", "mask_decoder")
"""The parts that a student has from its teacher."""
NOT_ENCODED = re.compile(r"prompt_encoder\.|mask_decoder\.")
"""Names of the weights that image embeddings by themselves have no use for."""


class Teacher:
    """A trained model that is asked and never changed, and is in no checkpoint of its student.

    Args:
        checkpoint: of the teacher, in any format that `load_model` takes.
        cache: folder that sam-precompute filled with its embeddings of the whole images; by default
            they are computed as they are needed, for any crop of an image.
        img_size: another side of the square input than the checkpoint's, pixels.
    """

    def __init__(
        self, *, checkpoint: str, cache: str | None = None, img_size: int | None = None
    ) -> None:
        self.model = load_model(checkpoint, img_size=img_size).requires_grad_(False)
        self.reads_cache = cache is not None
        self.cache: EmbeddingCache | None = None
        if cache is not None:
            encoder, shape = encoder_id(self.model), embedding_shape(self.model)
            self.cache = EmbeddingCache(cache, encoder=encoder, shape=shape)

    @classmethod
    def without_weights(
        cls, *, checkpoint: str, cache: str | None = None, img_size: int | None = None
    ) -> Teacher:
        """A teacher of the checkpoint's sizes on the meta device, which costs can be reckoned with."""
        changes = {} if img_size is None else {"image_encoder": {"img_size": img_size}}
        node = stored_config(checkpoint, changes)
        teacher = cls.__new__(cls)
        with torch.device("meta"):
            teacher.model = build_model(node).requires_grad_(False).eval()
        teacher.reads_cache, teacher.cache = cache is not None, None
        return teacher

    @torch.no_grad()
    def encode(self, batch: ImageBatch) -> ImageFeatures:
        """The embeddings of a batch, of the size that its images have."""
        if self.cache is not None:
            return ImageFeatures(self.cache.read(batch.keys, batch.images))
        self.model.to(batch.images.device).set_img_size(batch.images.shape[-1])
        return self.model.encode(batch.images, batch.input_sizes)


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """What a student learns from its teacher, and when.

    Attributes:
        embeddings_share: share of the run, from its start, in which only embeddings are learnt; prompts
            are in the loop afterwards. 1 is MobileSAM's way.
        embedding_weight: of the embeddings' error beside the losses of the prompts.
        gt_weight: in [0, 1]: how much of the prompts' loss looks at the ground truth; the rest looks at
            the teacher's answers.
        truth_share: share of the run, to its end, in which the teacher is asked nothing more: steps are
            as cheap as any training's, and the student may come past a teacher that knows less.
        answers: compares answers with the teacher's.
        train_decoder: the prompt encoder and the decoder, which are copied from the teacher, learn on
            when prompts are in the loop; else they stay the teacher's.
    """

    embeddings_share: float = 1.0
    embedding_weight: float = 1.0
    gt_weight: float = 0.0
    truth_share: float = 0.0
    answers: TeacherLoss = field(default_factory=TeacherLoss)
    train_decoder: bool = False

    def __post_init__(self) -> None:
        for name in ("embeddings_share", "gt_weight", "truth_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is in [0, 1], got {getattr(self, name)}")
        if self.embeddings_share + self.truth_share > 1:
            raise ValueError(
                "embeddings_share and truth_share are of one run and come to 1 at most, got "
                f"{self.embeddings_share} and {self.truth_share}"
            )
        if self.embedding_weight < 0:
            raise ValueError(f"embedding_weight is 0 or more, got {self.embedding_weight}")


@dataclass(frozen=True)
class AskedTeacher:
    """The `Peer` of one step: a teacher that has seen the batch."""

    model: Sam
    features: ImageFeatures
    teaching: Teaching

    def mixed(self, question: Question, answer: MaskPrediction, gt_losses: Tensor) -> Tensor:
        share = self.teaching.gt_weight
        if share == 1:
            return gt_losses
        losses = self.teaching.answers(answer, self._answer(question))
        return (1 - share) * losses + share * gt_losses

    @torch.no_grad()
    def _answer(self, question: Question) -> MaskPrediction:
        prompts, image_index = question.prompts, question.image_index
        if question.is_guess:
            return self.model.guess(self.features, prompts, image_index=image_index)
        multimask = question.multimask_output
        return self.model.decode(
            self.features, prompts, image_index=image_index, multimask_output=multimask
        )


class Distillation(InteractiveTraining):
    """Trains a student on what its teacher makes of the same images and prompts.

    The student begins with its teacher's prompt encoder and mask decoder, so its encoder is asked for
    embeddings of the teacher's shape; fine features that travel behind an embedding are part of it, or
    the teacher's first guess could not be read from the student's. Where the prompts are in the loop
    they are played on the ground truth by the same simulator as in any training, with the student's own
    answers corrected; the teacher is asked the same prompts, the student's earlier masks included.

    Validation adds the student beside its teacher to the clicks: see `TaughtMetrics`.

    Args:
        teacher: what is learnt from.
        teaching: what is learnt, and when.
        training: of `InteractiveTraining`; `model` is the student.
    """

    val_metrics: TaughtMetrics

    def __init__(self, *, teacher: Teacher, teaching: Teaching, **training: Any) -> None:
        super().__init__(**training)
        # Kept from torch: no submodule, so neither trained nor in a checkpoint.
        self._teacher = (teacher,)
        self._teacher_id = ""
        self.teaching = teaching
        self.has_asked = False
        """Whether a prompt was asked since the last optimiser step."""
        self._check_fits(teacher)
        for name in TAKEN_OVER:
            part = getattr(self.model, name)
            _copy(name, getattr(teacher.model, name), part)
            if not teaching.train_decoder:
                part.requires_grad_(False)
        self.val_metrics = TaughtMetrics(self.val_prompts.num_corrections + 1)

    @property
    def teacher(self) -> Teacher:
        """What is learnt from, on the student's device."""
        (teacher,) = self._teacher
        teacher.model.to(self.device)
        return teacher

    def _check_fits(self, teacher: Teacher) -> None:
        student, taught = self.model.image_encoder, teacher.model.image_encoder
        for name in ("img_size", "stride", "out_chans", "high_res_chans"):
            expected, got = (getattr(encoder, name, 0) for encoder in (taught, student))
            if expected != got:
                raise ValueError(
                    f"a student's embeddings have the teacher's width and grid: its {name} is "
                    f"{expected}, the student's {got}; set model.image_encoder.{name}={expected}"
                    + (f" or teacher.img_size={got}" if name == "img_size" else "")
                )
        if teacher.reads_cache and self.half_size_share:
            raise ValueError(
                "teacher.cache holds embeddings of images of full size: set task.half_size_share=0, or "
                "teacher.cache=null"
            )

    def setup(self, stage: str) -> None:
        """Refuses changes to the images that the cache knows nothing of.

        Weights that were put into the student meanwhile, as checkpoint=PATH does, are its encoder's: what
        stays the teacher's is taken over again.
        """
        super().setup(stage)
        # Once, as training sets other input sizes.
        self._teacher_id = self._teacher_id or model_id(self._teacher[0].model)
        if not self.teaching.train_decoder and (others := self._not_the_teachers()):
            log.info("%s: the teacher's, not those that the student was given", ", ".join(others))
            for name in others:
                _copy(name, getattr(self._teacher[0].model, name), getattr(self.model, name))
        data = getattr(self.trainer, "datamodule", None)
        if self.teacher.cache is None or not isinstance(data, SamDataModule):
            return
        given = data.train_transform
        transforms = (
            [given.default, *given.sources.values()] if isinstance(given, BySource) else [given]
        )
        for transform in transforms:
            for name in ("crop", "flips", "colour"):
                if getattr(transform, name) is not None:
                    raise ValueError(
                        "teacher.cache holds embeddings of whole images as they are: set "
                        f"data.train_transform.{name}=null, or teacher.cache=null"
                    )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["teacher"] = self._teacher_id

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Sees that a run goes on with the teacher that it began with.

        Raises:
            ValueError: it is another.
        """
        super().on_load_checkpoint(checkpoint)
        if checkpoint.get("teacher", self._teacher_id) != self._teacher_id:
            raise ValueError(
                "teacher.checkpoint now holds another model than when this run began: give it the file of "
                "then, or choose another run_dir=PATH"
            )

    def _not_the_teachers(self) -> list[str]:
        """The parts that are to be the teacher's and are not."""
        (teacher,) = self._teacher
        return [
            name
            for name in TAKEN_OVER
            if not _are_equal(getattr(teacher.model, name), getattr(self.model, name))
        ]

    def train(self, mode: bool = True) -> Distillation:
        """Leaves out the dropout of what is the teacher's."""
        super().train(mode)
        if not self.teaching.train_decoder:
            self.model.prompt_encoder.eval()
            self.model.mask_decoder.eval()
        return self

    def _loss(self, batch: ImageBatch) -> Tensor:
        progress = self._progress_of_all()
        features = self.model.encode(batch.images, batch.input_sizes)
        if self.teaching.truth_share > 0 and progress >= 1 - self.teaching.truth_share:
            self.has_asked = True
            return self._prompted_loss(features, batch)
        taught = self.teacher.encode(batch)
        errors = self.embedding_errors(features, taught, batch.input_sizes)
        error = errors.sum() / self._mean_over_ranks(len(errors))
        self.log("train/embedding_error", error.detach())
        if progress < self.teaching.embeddings_share:
            return error + self._nothing_left_out(NOT_ENCODED)
        self.has_asked = True
        peer = AskedTeacher(self.teacher.model, taught, self.teaching)
        loss = self._prompted_loss(features, batch, peer)
        return loss + self.teaching.embedding_weight * error

    def embedding_errors(
        self, features: ImageFeatures, taught: ImageFeatures, input_sizes: Tensor
    ) -> Tensor:
        """How far the student's embeddings are from the teacher's, padding left out: (N,)."""
        embeddings = features.image_embeddings
        encoder = self.model.image_encoder
        inside = cells_inside(input_sizes, embeddings.shape[-1], encoder.stride)
        return embedding_errors(
            embeddings, taught.image_embeddings, inside, out_chans=encoder.out_chans
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves weights alone that only prompts ask for, where none was asked."""
        if not self.has_asked:
            for name, parameter in self.model.named_parameters():
                if NOT_ENCODED.search(name):
                    parameter.grad = None
        self.has_asked = False
        super().on_before_optimizer_step(optimizer)

    def validation_step(self, record: ImageRecord, batch_idx: int) -> None:
        """Clicks through the masks of one image, and asks the teacher too."""
        model, prompts = self.model, self.val_prompts
        teacher = self.teacher.model
        teacher.set_img_size(model.image_encoder.img_size)
        try:
            curves = click_rollout(model, record, prompts, seed=self.seed)
            agreement = teacher_agreement(model, teacher, record, prompts, seed=self.seed)
        except DamagedSampleError:  # counted and logged already
            return
        self.num_val_images += 1
        self.val_source = record.source
        self.val_metrics.update_taught(curves, agreement, record.source)

    def _new_metrics(self) -> TaughtMetrics:
        return TaughtMetrics(self.val_prompts.num_corrections + 1, self.val_sources)


def _are_equal(theirs: nn.Module, ours: nn.Module) -> bool:
    state = ours.state_dict()
    return all(torch.equal(t, state[name].to(t.device)) for name, t in theirs.state_dict().items())


def _copy(name: str, theirs: nn.Module, ours: nn.Module) -> None:
    """Puts the teacher's weights of a part into the student's."""
    given, wanted = theirs.state_dict(), ours.state_dict()
    differing = [
        key
        for key in sorted(given.keys() | wanted.keys())
        if key not in given or key not in wanted or given[key].shape != wanted[key].shape
    ]
    if differing:
        raise ValueError(
            f"a student begins with its teacher's {name}, but theirs differ in {differing[0]}"
            + (f" and {len(differing) - 1} more weights" if len(differing) > 1 else "")
            + f": give model.{name} the settings of the teacher's"
        )
    ours.load_state_dict(given)
