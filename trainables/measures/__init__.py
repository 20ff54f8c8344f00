"""Measures of a network: sizes, FLOPs, latency, and the user's own."""
