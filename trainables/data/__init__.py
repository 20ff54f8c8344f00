"""Data sets by name. A new one is one file here with a class under `@DATA.register`."""

from slimfront.trainables.data.base import DATA, Data, Dataset, Split, split
from slimfront.trainables.data.cache import load_once
from slimfront.trainables.data.digits import Digits
from slimfront.trainables.data.factory import Factory
from slimfront.trainables.data.huggingface import DataFiles, HuggingFace
from slimfront.trainables.data.transforms import Augment

__all__ = [
    "DATA",
    "Augment",
    "Data",
    "DataFiles",
    "Dataset",
    "Digits",
    "Factory",
    "HuggingFace",
    "Split",
    "load_once",
    "split",
]
