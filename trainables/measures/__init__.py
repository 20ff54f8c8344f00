"""Measures of a network: sizes, FLOPs, accuracy and latency."""
