"""Hypothesis for this folder: the same examples on every run, and no verdict that depends on the clock."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "algebra",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.load_profile("algebra")
