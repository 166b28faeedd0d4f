"""Images, rounds, models, tasks and the masks handed in."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

# Ordered by bytes, whatever the server's language is.
TEXT = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "images",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("key", TEXT, nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("path", TEXT, nullable=False),
        sa.Column("member", TEXT),
        sa.Column("offset", sa.BigInteger()),
        sa.Column("held_out", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_images"),
        sa.UniqueConstraint("key", name="uq_images_key"),
    )
    op.create_index("ix_images_path_member", "images", ["path", "member"])
    op.create_table(
        "rounds",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("stage", TEXT, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("plan_step", sa.Integer(), nullable=False),
        sa.Column("model_id", TEXT),
        sa.Column("config", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double()),
        sa.PrimaryKeyConstraint("number", name="pk_rounds"),
    )
    op.create_table(
        "models",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("path", TEXT, nullable=False),
        sa.Column("parent", TEXT),
        sa.Column("round", sa.Integer()),
        sa.Column("trained_on", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("data_fingerprint", TEXT, nullable=False),
        sa.Column("config", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("code_version", TEXT, nullable=False),
        sa.Column("metrics", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("promoted", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
    )
    op.create_table(
        "tasks",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("stage", TEXT, nullable=False),
        sa.Column("image_id", TEXT, nullable=False),
        sa.Column("state", TEXT, nullable=False),
        sa.Column("priority", sa.Double(), nullable=False),
        sa.Column("reserved_for", TEXT),
        sa.Column("annotator", TEXT),
        sa.Column("lease_expires_at", sa.Double()),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("payload", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_tasks_image_id"),
        sa.PrimaryKeyConstraint("id", name="pk_tasks"),
    )
    op.create_index("ix_tasks_image_id", "tasks", ["image_id"])
    op.create_index("ix_tasks_queue", "tasks", ["state", sa.text("priority DESC"), "id"])
    op.create_index("ix_tasks_round", "tasks", ["round"])
    op.create_table(
        "submissions",
        sa.Column("submission_id", TEXT, nullable=False),
        sa.Column("task_id", TEXT, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("annotator", TEXT, nullable=False),
        sa.Column("digest", TEXT, nullable=False),
        sa.Column("mask_ids", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("events", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("received_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_submissions_task_id"),
        sa.PrimaryKeyConstraint("submission_id", name="pk_submissions"),
        sa.UniqueConstraint("task_id", name="uq_submissions_task_id"),
    )
    op.create_table(
        "masks",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("image_id", TEXT, nullable=False),
        sa.Column("task_id", TEXT, nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("source", TEXT, nullable=False),
        sa.Column("rle", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("bbox", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("area", sa.BigInteger(), nullable=False),
        sa.Column("author", TEXT, nullable=False),
        sa.Column("model_id", TEXT),
        sa.Column("label", TEXT),
        sa.Column("point_coords", sa.JSON(none_as_null=True)),
        sa.Column("predicted_iou", sa.Double()),
        sa.Column("stability_score", sa.Double()),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("num_clicks", sa.Integer(), nullable=False),
        sa.Column("corrects", TEXT),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_masks_image_id"),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.id"], name="fk_masks_task_id"),
        sa.PrimaryKeyConstraint("id", name="pk_masks"),
    )
    op.create_index("ix_masks_image_id", "masks", ["image_id"])
    op.create_index("ix_masks_round", "masks", ["round"])
    op.create_index("ix_masks_task_id", "masks", ["task_id"])


def downgrade() -> None:
    for table in ("masks", "submissions", "tasks", "models", "rounds", "images"):
        op.drop_table(table)
