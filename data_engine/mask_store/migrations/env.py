"""What Alembic runs: the migrations, on the connection and in the transaction that `migrate.py` gives."""

from alembic import context

from data_engine.mask_store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters a table by making it anew
    transactional_ddl=True,
)
context.run_migrations()
