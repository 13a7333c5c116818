"""How cases spread over pytest-xdist's workers. Imported only where pytest-xdist is at work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling


class ByTopology(LoadScopeScheduling):  # type: ignore[misc] # pytest-xdist is untyped
    """All tests of all cases of one topology go to one worker; tests without a case go one by one.

    Not `--dist loadgroup`: pytest-xdist 3.8 writes the group into the test id in a way that pytest 9.2 does not read,
    so its groups are torn apart.

    Args:
        config: pytest's.
        log: pytest-xdist's.
        topologies: Case id to topology.
    """

    def __init__(self, config: pytest.Config, log: Any, topologies: Mapping[str, str]) -> None:
        super().__init__(config, log)
        self._topologies = topologies

    def _split_scope(self, nodeid: str) -> str:
        """What the test shares a worker by; the base class asks for each test id."""
        parameters = nodeid.partition("[")[2]
        return next((mesh for case, mesh in self._topologies.items() if case in parameters), nodeid)
