"""One zygote with torch for the tests of a module, and the check that no test leaves a process or a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from leftovers import descendants, files

from parity.ranks import Zygote


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which everything temporary is made, for this module only."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("TMPDIR", str(folder))
        patch.delenv("PYTHONUNBUFFERED", raising=False)  # ranks lose no output without it
        yield folder
    assert files(folder) == set()


@pytest.fixture(scope="module")
def zygote(temporary: Path) -> Iterator[Zygote]:
    """A zygote that is warm."""
    with Zygote() as zygote:
        zygote.run("os:getpid", backend=None)
        yield zygote


@pytest.fixture(autouse=True)
def nothing_left(zygote: Zygote, temporary: Path) -> Iterator[None]:
    """Fails a test after which a process or a file is there that was not there before."""
    before = descendants(os.getpid()), files(temporary)
    yield
    assert (descendants(os.getpid()), files(temporary)) == before
