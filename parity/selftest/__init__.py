"""The faults of the catalogue against the checks."""
