"""Whether this run is a machine's own: what a person has to look at is refused there."""

from __future__ import annotations

import os


def under_ci() -> bool:
    """Whether the environment variable `CI` is set, as CI systems do."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def refusal(what: str) -> str:
    """Why `what` is not done under CI, or an empty string where this is not CI."""
    if not under_ci():
        return ""
    return (
        f"{what} is refused under CI (CI={os.environ['CI']}): do it where a person reads the difference, and commit it"
    )
