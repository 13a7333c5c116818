"""Weights from one layout of live ranks to another: each rank sends what another lacks, and nothing is gathered."""
