"""The commands of `python -m converters` that read and write checkpoint folders."""
