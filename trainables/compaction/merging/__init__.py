"""Layers that become one: products of two, and the chains in which that pays."""
