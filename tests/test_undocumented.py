"""What we use of libraries although they do not document it.

Where it is gone, a sentence says which version no longer has it, and who needs it.
"""

import importlib
from importlib.metadata import version

import optuna
import pytest

USED = [
    ("ray", "ray._private.worker:print_to_stdstream", "search/engine/ray_internals/quiet.py"),
    ("ray", "ray._private.worker:_global_node", "search/engine/ray_internals/local_ray.py"),
    ("ray", "ray._private.ray_constants:ENABLE_RAY_CLUSTER", "ray_internals/local_ray.py"),
    (
        "ray",
        "ray.air.execution._internal:RayActorManager.next",
        "search/engine/ray_internals/slots.py",
    ),
    (
        "ray",
        "ray.air.execution._internal.tracked_actor:TrackedActor.set_on_stop",
        "search/engine/ray_internals/slots.py",
    ),
    (
        "ray",
        "ray.tune.execution.tune_controller:RayActorManager",
        "search/engine/ray_internals/slots.py",
    ),
    ("ray", "ray.tune.tune:ExperimentAnalysis", "search/engine/ray_internals/snapshots.py"),
    (
        "ray",
        "ray.tune.impl.tuner_internal:TunerInternal.__getstate__",
        "search/engine/ray_internals/snapshots.py",
    ),
    (
        "ray",
        "ray.tune.execution.tune_controller:TuneController.checkpoint",
        "search/engine/ray_internals/snapshots.py",
    ),
    ("optuna", "optuna.distributions:BaseDistribution._contains", "search/config/schema.py"),
    ("torch", "torch:_fused_adam_", "trainables/training/optimizers.py"),
    ("torch", "torch:_fused_adamw_", "trainables/training/optimizers.py"),
    ("torch", "torch:_fused_sgd_", "trainables/training/optimizers.py"),
    ("torch", "torch:_foreach_add_", "trainables/training/optimizers.py"),
    ("torch", "torch._dynamo.config:skip_nnmodule_hook_guards", "trainables/training/compiled.py"),
    ("torch", "torch.nn.modules.dropout:_DropoutNd", "trainables/training/step_graphs.py"),
    ("torch", "torch.utils._pytree:tree_flatten", "trainables/structure/agreement.py"),
    (
        "torch",
        "torch.distributed.distributed_c10d:_abort_process_group",
        "trainables/training/ranks.py",
    ),
    ("torch-pruning", "torch_pruning.ops:_ConcatOp", "trainables/structure/channel_groups.py"),
    ("torch-pruning", "torch_pruning.ops:_SplitOp", "trainables/structure/channel_groups.py"),
    ("torch-pruning", "torch_pruning.ops:_ReshapeOp", "trainables/structure/channel_groups.py"),
    ("torch-pruning", "torch_pruning.ops:_ExpandOp", "trainables/structure/channel_groups.py"),
    ("torch-pruning", "torch_pruning.ops:_SliceOp", "trainables/structure/channel_groups.py"),
    ("torch-pruning", "torch_pruning.ops:_ElementWiseOp", "trainables/structure/channel_groups.py"),
    ("torch-pruning", "torch_pruning:_helpers", "trainables/structure/dependencies.py"),
]
"""The library, what of it, and where that is used."""


@pytest.mark.parametrize(("library", "path", "user"), USED, ids=[path for _, path, _ in USED])
def test_what_a_library_does_not_document_is_still_there(
    library: str, path: str, user: str
) -> None:
    module, _, names = path.partition(":")
    gone = f"{library} {version(library)} has no {path} any more, which {user} relies on"
    try:
        found = importlib.import_module(module)
    except ImportError:
        pytest.fail(gone)
    for name in names.split("."):
        if not hasattr(found, name):
            pytest.fail(gone)
        found = getattr(found, name)


def test_trials_of_optuna_have_the_number_that_its_storages_know_them_by() -> None:
    asked = optuna.create_study().ask()
    if not isinstance(getattr(asked, "_trial_id", None), int):
        pytest.fail(
            f"optuna {version('optuna')}: trials have no _trial_id any more, see searcher.py"
        )


def test_what_is_gone_is_told_with_the_version_and_who_needs_it() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"torch \d.* has no torch:_gone .* mine\.py"):
        test_what_a_library_does_not_document_is_still_there("torch", "torch:_gone", "mine.py")
