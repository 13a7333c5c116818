"""The project's own tests use the plugin whether or not the package is installed."""

from __future__ import annotations

pytest_plugins = ["parity.plugin", "pytester"]
