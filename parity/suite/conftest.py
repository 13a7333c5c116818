"""What the checks of the suite share: one bench a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from parity.case import Case
from parity.devices import lacking

if TYPE_CHECKING:
    from parity.checks.bench import Bench, Shared
    from parity.findings import Finding
    from parity.ranks import Zygote
    from parity.record import Record
    from parity.subjects import Subject

    Check = Callable[[Bench], Iterator[Finding]]


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
