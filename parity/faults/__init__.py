"""The catalogue of faults, and how each is injected into an honest conversion."""
