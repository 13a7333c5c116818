"""What the checks of the suite share: one bench a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from parity.backends import below_bf16
from parity.case import Case
from parity.devices import lacking

if TYPE_CHECKING:
    from parity.checks.bench import Bench, Shared
    from parity.findings import Finding
    from parity.ranks import Zygote
    from parity.record import Record
    from parity.subjects import Subject

    Check = Callable[[Bench], Iterator[Finding]]


WITHOUT_GOLDEN = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the goldens of models that have none; `pytest_report_collectionfinish` and every report say so."""
    from parity.checks.golden import Shelf
    from parity.plugin import LEFT_OUT, STATE

    state = config.stash.get(STATE, None)
    if state is None:
        return
    shelf = Shelf.of(config.invocation_params.dir, state.options.golden, state.options.regen_golden)
    reasons = {case.id: shelf.skips(case) for case in state.cases}
    out = [item for item in items if item.name.startswith("test_golden[") and reasons.get(_case_id(item))]
    config.stash[WITHOUT_GOLDEN] = list(dict.fromkeys(reasons[_case_id(item)] for item in out))
    told = [(f"{name}, golden", reasons[name]) for name in dict.fromkeys(map(_case_id, out))]
    # What is about a kind of precision is no test of another.
    of_precision = {"test_products[": below_bf16, "test_fp8_state[": "fp8-delayed".__eq__}
    precisions = {case.id: case.precision for case in state.cases}
    out += [
        item
        for item in items
        for name, applies in of_precision.items()
        if item.name.startswith(name) and not applies(precisions.get(_case_id(item), ""))
    ]
    state.left_out += told
    if hasattr(config, "workeroutput"):
        config.workeroutput[LEFT_OUT] = told
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    """Why golden values are not checked."""
    return [f"parity: {reason}" for reason in config.stash.get(WITHOUT_GOLDEN, [])]


def _case_id(item: pytest.Item) -> str:
    case = item.callspec.params["case"]  # type: ignore[attr-defined]
    return str(case.id)


@pytest.fixture(scope="session")
def shared(zygote: Zygote) -> Iterator[Shared]:
    """What is made once for all cases."""
    from parity.checks.bench import Shared

    made = Shared(zygote=zygote)
    yield made
    made.close()


@pytest.fixture
def bench(case: Case, subject: Subject, shared: Shared) -> Bench:
    """The case on the bench, with the converter that the case names."""
    from parity.checks.bench import Bench
    from parity.converter import Named

    return Bench(case=case, subject=subject, shared=shared, converter=Named(case.converter))


@pytest.fixture
def run(bench: Bench, record: Record) -> Callable[[Check], None]:
    """Runs one check on the bench, and records what it finds; skips where this machine lacks the case's device."""
    reason = lacking(bench.case)
    if reason:
        pytest.skip(reason)

    def on(check: Check) -> None:
        from parity.checks.bench import NotApplicable

        try:
            record.all(check(bench))
        except NotApplicable as error:
            pytest.skip(str(error))

    return on


@pytest.fixture
def run_on_metadata(bench: Bench, record: Record) -> Callable[[Check], None]:
    """Runs one check that needs no ranks."""
    return lambda check: record.all(check(bench))
