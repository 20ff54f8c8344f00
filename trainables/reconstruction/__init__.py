"""Weights that make up for what was taken out of a network, without training."""

from slimfront.trainables.reconstruction.reconstruct import Reconstruction, reconstruct

__all__ = ["Reconstruction", "reconstruct"]
