"""Models on Transformer Engine's layers behind the seam `parity.observation.backend`."""

from __future__ import annotations

from parity.observation.te.building import answered, bare, beside, built, misplaced, saved, set_fields
from parity.observation.te.decoding import decoded
from parity.observation.te.observe import tapped
from parity.observation.te.training import train

__all__ = ["answered", "bare", "beside", "built", "decoded", "misplaced", "saved", "set_fields", "tapped", "train"]
