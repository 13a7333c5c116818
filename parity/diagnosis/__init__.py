"""Why something differs: weights, config or computation, and which."""
