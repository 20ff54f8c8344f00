"""Data sets by name. A new one is one file here with a class under `@DATA.register`."""

from trainables.data.base import DATA, Data, Dataset, Split, split
from trainables.data.cache import load_once
from trainables.data.digits import Digits
from trainables.data.factory import Factory
from trainables.data.huggingface import DataFiles, HuggingFace
from trainables.data.transforms import Augment

__all__ = ["DATA", "Augment", "Data", "DataFiles", "Dataset", "Digits", "Factory", "HuggingFace", "Split", "load_once", "split"]
