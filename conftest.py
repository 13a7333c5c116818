"""The project's own tests use the plugin whether or not the package is installed."""

from __future__ import annotations

from pathlib import Path

# `pytest --model NAME` in another folder finds this file above the suite of an editable installation, where pytest
# refuses the names of plugins.
if Path(__file__).parent in (Path.cwd(), *Path.cwd().parents):
    pytest_plugins = ["parity.plugin", "pytester"]
