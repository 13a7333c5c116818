"""What the model says is what it said when its golden values were made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parity.checks import golden
from parity.plugin import STATE

Run = Callable[[Any], None]


def test_golden(run: Run, request: pytest.FixtureRequest) -> None:
    """What transformers says and the imported model, within bounds measured in this run."""
    options = request.config.stash[STATE].options
    run(golden.against(golden.Shelf.of(request.config.invocation_params.dir, options.golden, options.regen_golden)))
