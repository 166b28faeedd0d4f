"""The small shards of the data tests."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

# Tests are imported by path, so one folder's helpers are no module that another can name.
_spec = spec_from_file_location("data_conftest", Path(__file__).parents[1] / "data" / "conftest.py")
assert _spec is not None and _spec.loader is not None
_shared = module_from_spec(_spec)
_spec.loader.exec_module(_shared)
make, real_set = _shared.make, _shared.real_set
