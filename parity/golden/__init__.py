"""Golden values: what a model said once, and must say again."""
