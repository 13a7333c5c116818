"""Models of Transformer Engine's layers behind the seam `parity.observation.backend`."""
