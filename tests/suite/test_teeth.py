"""The shipped suite has teeth: it passes the product, and fails every faulty one, with words that say where to look."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from planted import CHECKS, FAULTS, Fault, Outcome

Run = Callable[[Fault], Outcome]

CLEAN = Fault(name="none", edits=(), red=frozenset(), words=(), layout=("--tp", "1,2", "--pp", "1,2"))


@pytest.mark.parametrize("fault", [CLEAN], ids=["clean"])
def test_the_product_passes(fault: Fault, outcome: Run) -> None:
    """On every layout that a fault below is tried on, so that what fails there is the fault."""
    found = outcome(fault)
    assert found.red == set(), found.failures
    assert len(found.tests) == 4 * len(CHECKS)
    assert found.status == 0, found.output


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_fault_is_found(fault: Fault, outcome: Run) -> None:
    """Exactly the checks that can see the fault fail, and say what it is."""
    found = outcome(fault)
    assert found.status == 1, found.output
    assert found.red == fault.red, found.output
    assert len(found.tests) == len(CHECKS)
    missing = [words for words in fault.words if words not in found.failures]
    assert not missing, found.failures


def test_some_faults_undo_themselves() -> None:
    """A round trip alone would pass them; they are why each direction is checked by itself."""
    assert sum("round_trip" not in fault.red for fault in FAULTS) >= 5
