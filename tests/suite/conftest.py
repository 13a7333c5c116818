"""Runs of the shipped suite on faulty copies of the product, two at a time, each made once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import planted
import pytest
from planted import Fault, Outcome

AT_A_TIME = 2


@pytest.fixture(scope="session")
def outcome(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Outcome]]:
    """The outcome of a fault's run. The runs of all selected tests start at once, and a test waits for its own.

    Not under pytest-xdist, whose workers do not know who has which test; there they already run side by side.
    """
    folder = tmp_path_factory.mktemp("planted")
    started: dict[str, Future[Outcome]] = {}
    with ThreadPoolExecutor(AT_A_TIME) as pool:

        def start(fault: Fault) -> Future[Outcome]:
            if fault.name not in started:
                at = folder / str(len(started))
                started[fault.name] = pool.submit(planted.run, fault.edits, fault.layout, at, folder / "cache")
            return started[fault.name]

        if "PYTEST_XDIST_WORKER" not in os.environ:
            for item in request.session.items:
                callspec = getattr(item, "callspec", None)
                fault = None if callspec is None else callspec.params.get("fault")
                if isinstance(fault, Fault):
                    start(fault)
        yield lambda fault: start(fault).result()
        pool.shutdown(cancel_futures=True)
