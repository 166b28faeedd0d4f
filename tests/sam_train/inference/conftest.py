"""Real images, and models that answer with real masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sam_train.data.sa1b import Sa1bSource
