"""What `--against` runs in place of the suite: one checkpoint held against another."""
