"""FP8 checkpoints in the formats that servers load: made from plain ones, and made plain again."""
