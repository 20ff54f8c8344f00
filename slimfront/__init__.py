"""slimfront: the front between quality and compactness of a PyTorch network, as networks that are
really smaller.

What is listed here may be relied on; everything else is internal. Each name is imported when it is
first asked for, so that a command that trains nothing does not wait for torch.

- `Candidate`: what is trained, and how: data, network, penalties, sparsifier and training, checked
  when it is made.
- `train`: trains one candidate, and gives the compact network with its measures.
- `compact`: makes a trained sparse network smaller, with the same outputs; what it returns is
  `Compacted`: the network and a report.
- `prune`: makes a trained network smaller without training it, by what is worth least on batches.
- `Slimming`: penalties and a sparsifier at work in a training loop of your own.
- `Trial`: what a training function of your own is given in a search.
- `measure`: the parameters, FLOPs and bytes of a network.
- `save_network`: writes a network to an ONNX, pt2 or safetensors file; `load_network` reads it.
- `search`: runs the search of a config; the same name is the package that the command is made of.
- `load`: reads a search by name, which may be running. Both give an object with the `front` as a
  pandas DataFrame and `pick`, whose networks can be used, exported and described by a card.
- `Task`, `Encoded`, `Penalty`, `Sparsifier`, `Model`, `Data`: what a task, a penalty, a sparsifier,
  a network and a data set of your own are subclasses of; `TASKS`, `PENALTIES`, `SPARSIFIERS`,
  `MODELS` and `DATA` are where a plug-in registers them by name.
- `register_handler`: teaches what an operation or a layer does to units, so that what flows through
  it can be made smaller; `Known` is what is known of a tensor there.
- `integrations`: `Slimming` in Lightning's and in Hugging Face's trainer.
- `MultiObjectiveASHA`: a scheduler of Ray Tune that stops trials early by several objectives, for
  any trainable.
- `UserError`: a mistake in what was asked, as the sentence that the command would print.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimfront.search.engine.scheduler import MultiObjectiveASHA as MultiObjectiveASHA
    from slimfront.search.python_api import load as load
    from slimfront.search.python_api import search as search
    from slimfront.trainables.candidate import Candidate as Candidate
    from slimfront.trainables.compaction import Compacted as Compacted
    from slimfront.trainables.data import DATA as DATA
    from slimfront.trainables.data import Data as Data
    from slimfront.trainables.errors import UserError as UserError
    from slimfront.trainables.models import MODELS as MODELS
    from slimfront.trainables.models import Model as Model
    from slimfront.trainables.penalties import PENALTIES as PENALTIES
    from slimfront.trainables.penalties import Penalty as Penalty
    from slimfront.trainables.post_training import prune as prune
    from slimfront.trainables.shipping.any_inputs import compact as compact
    from slimfront.trainables.shipping.any_inputs import load_network as load_network
    from slimfront.trainables.shipping.any_inputs import measure as measure
    from slimfront.trainables.shipping.any_inputs import save_network as save_network
    from slimfront.trainables.sparsifiers import SPARSIFIERS as SPARSIFIERS
    from slimfront.trainables.sparsifiers import Sparsifier as Sparsifier
    from slimfront.trainables.structure.coupling.graph_of_units import (
        register_handler as register_handler,
    )
    from slimfront.trainables.structure.coupling.known import Known as Known
    from slimfront.trainables.tasks import TASKS as TASKS
    from slimfront.trainables.tasks import Encoded as Encoded
    from slimfront.trainables.tasks import Task as Task
    from slimfront.trainables.training.own_loop import Trial as Trial
    from slimfront.trainables.training.slimming import Slimming as Slimming
    from slimfront.trainables.training.train import train as train

__all__ = [
    "DATA",
    "MODELS",
    "PENALTIES",
    "SPARSIFIERS",
    "TASKS",
    "Candidate",
    "Compacted",
    "Data",
    "Encoded",
    "Known",
    "Model",
    "MultiObjectiveASHA",
    "Penalty",
    "Slimming",
    "Sparsifier",
    "Task",
    "Trial",
    "UserError",
    "compact",
    "load",
    "load_network",
    "measure",
    "prune",
    "register_handler",
    "save_network",
    "search",
    "train",
]

_HOMES = {
    "Candidate": "trainables.candidate",
    "Compacted": "trainables.compaction",
    "DATA": "trainables.data",
    "Data": "trainables.data",
    "Encoded": "trainables.tasks",
    "Known": "trainables.structure.coupling.known",
    "MODELS": "trainables.models",
    "Model": "trainables.models",
    "PENALTIES": "trainables.penalties",
    "Penalty": "trainables.penalties",
    "Slimming": "trainables.training.slimming",
    "SPARSIFIERS": "trainables.sparsifiers",
    "Sparsifier": "trainables.sparsifiers",
    "TASKS": "trainables.tasks",
    "Task": "trainables.tasks",
    "Trial": "trainables.training.own_loop",
    "MultiObjectiveASHA": "search.engine.scheduler",
    "UserError": "trainables.errors",
    "compact": "trainables.shipping.any_inputs",
    "load": "search.python_api",
    "load_network": "trainables.shipping.any_inputs",
    "measure": "trainables.shipping.any_inputs",
    "save_network": "trainables.shipping.any_inputs",
    "prune": "trainables.post_training",
    "register_handler": "trainables.structure.coupling.graph_of_units",
    "train": "trainables.training.train",
}


def __dir__() -> list[str]:
    """What completion offers."""
    of_modules = [name for name in globals() if name.startswith("__")]
    return sorted({*of_modules, *__all__, "integrations"})


def __getattr__(name: str) -> Any:
    if name in ("search", "integrations"):
        return importlib.import_module(f"slimfront.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'slimfront' has no attribute '{name}'")
    return getattr(importlib.import_module(f"slimfront.{_HOMES[name]}"), name)
