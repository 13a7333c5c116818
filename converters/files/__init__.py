"""Checkpoint files of every format as boxes of tensors at byte ranges of files; nothing here imports torch at load."""
