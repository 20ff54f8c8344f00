"""Weights that make up for what was taken out of a network, without training."""

from slimfront.trainables.reconstruction.reconstruct import reconstruct

__all__ = ["reconstruct"]
