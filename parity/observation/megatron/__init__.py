"""Megatron-Core behind the seam `parity.observation.backend`."""

from __future__ import annotations

from parity.observation.megatron.building import answered, bare, beside, built, misplaced, saved, set_fields
from parity.observation.megatron.decoding import decoded
from parity.observation.megatron.taps import tapped
from parity.observation.megatron.training import train

__all__ = ["answered", "bare", "beside", "built", "decoded", "misplaced", "saved", "set_fields", "tapped", "train"]
