"""Reviews, what shards hold, what was taken down, claims on shards."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

# Ordered by bytes, whatever the server's language is.
TEXT = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "reviews",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("image_id", TEXT, nullable=False),
        sa.Column("annotator", TEXT, nullable=False),
        sa.Column("before_id", TEXT, nullable=False),
        sa.Column("before", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("after", sa.JSON(none_as_null=True)),
        sa.Column("iou", sa.Double(), nullable=False),
        sa.Column("task_id", TEXT),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"], name="fk_reviews_image_id"),
        sa.PrimaryKeyConstraint("id", name="pk_reviews"),
    )
    op.create_index("ix_reviews_image_id", "reviews", ["image_id"])
    op.create_index("ix_reviews_round", "reviews", ["round"])
    op.create_table(
        "shards",
        sa.Column("path", TEXT, nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("source", TEXT, nullable=False),
        sa.Column("num_images", sa.Integer(), nullable=False),
        sa.Column("num_masks", sa.Integer(), nullable=False),
        sa.Column("sha256", TEXT, nullable=False),
        sa.Column("model_id", TEXT),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("path", name="pk_shards"),
    )
    op.create_index("ix_shards_round", "shards", ["round"])
    op.create_table(
        "shard_images",
        sa.Column("shard_path", TEXT, nullable=False),
        sa.Column("image_id", TEXT, nullable=False),
        sa.ForeignKeyConstraint(
            ["shard_path"], ["shards.path"], name="fk_shard_images_shard_path", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("shard_path", "image_id", name="pk_shard_images"),
    )
    op.create_index("ix_shard_images_image_id", "shard_images", ["image_id"])
    op.create_table(
        "tombstones",
        sa.Column("image_id", TEXT, nullable=False),
        sa.Column("key", TEXT, nullable=False),
        sa.Column("reason", TEXT, nullable=False),
        sa.Column("who", TEXT, nullable=False),
        sa.Column("shards", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("models", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("image_id", name="pk_tombstones"),
    )
    op.create_table(
        "claims",
        sa.Column("name", TEXT, nullable=False),
        sa.Column("holder", TEXT, nullable=False),
        sa.Column("lease_expires_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_claims"),
    )


def downgrade() -> None:
    for table in ("claims", "tombstones", "shard_images", "shards", "reviews"):
        op.drop_table(table)
