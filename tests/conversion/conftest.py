"""Folders that several files of tests read."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain checkpoint and one in each FP8 format, not to be changed."""
    from fp8_folders import FORMATS, model

    from converters.quantized.export import quantize

    root = tmp_path_factory.mktemp("made")
    source = model(root / "plain")
    for name in FORMATS:
        quantize(source, root / name, name)
    return {name: root / name for name in ("plain", *FORMATS)}
