"""What we use of libraries although they do not document it.

Where it is gone, a sentence says which version no longer has it, and who needs it.
"""

import ast
import importlib
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import version

import optuna
import pytest
import torch
from ray.tune.execution.tune_controller import TuneController
from torch import Tensor, fx, nn
from torch_pruning.dependency import index_mapping

from slimfront.search.record.optuna_internals import trial_id
from slimfront.trainables.structure.pruning_internals import stride
from slimfront.trainables.torch_internals import forward_hooks, is_check, of_any_rank
from tests.test_imports import ROOT, modules

RAY = "search/engine/ray_internals"
TORCH = "trainables/torch_internals.py"
PRUNING = "trainables/structure/pruning_internals.py"
OPTUNA = "search/record/optuna_internals.py"
MLFLOW = "search/tracking/mlflow_internals.py"

FLOP_COUNTER = "torch.utils.flop_counter:_FlopCounterMode.__torch_dispatch__"
SINCE_TORCH = {f"{FLOP_COUNTER}.__wrapped__": "2.10"}
"""What older versions do not have, and do without."""

USED = [
    ("ray", "ray._private.worker:print_to_stdstream", f"{RAY}/quiet.py"),
    ("ray", "ray._private.worker:_global_node", f"{RAY}/local_ray.py"),
    ("ray", "ray._private.ray_constants:ENABLE_RAY_CLUSTER", f"{RAY}/local_ray.py"),
    ("ray", "ray._private.node:Node.start_monitor", f"{RAY}/local_ray.py"),
    ("ray", "ray._private.node:Node.start_api_server", f"{RAY}/local_ray.py"),
    ("ray", "ray._private.node:Node.start_log_monitor", f"{RAY}/local_ray.py"),
    ("ray", "ray.tune.execution.class_cache:_ActorClassCache.get", f"{RAY}/trial_actors.py"),
    ("ray", "ray.tune.execution.class_cache:DEFAULT_ENV_VARS", f"{RAY}/trial_actors.py"),
    ("ray", "ray.tune.execution.class_cache:ENV_VARS_TO_PROPAGATE", f"{RAY}/trial_actors.py"),
    ("ray", "ray.air.execution._internal:RayActorManager.next", f"{RAY}/slots.py"),
    (
        "ray",
        "ray.air.execution._internal.tracked_actor:TrackedActor.set_on_stop",
        f"{RAY}/slots.py",
    ),
    ("ray", "ray.tune.execution.tune_controller:RayActorManager", f"{RAY}/slots.py"),
    ("ray", "ray.tune.tune:TuneController._maybe_reuse_cached_actor", f"{RAY}/controller.py"),
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
    ("optuna", "optuna.distributions:BaseDistribution._contains", "search/config/space_checks.py"),
    ("torch", "torch:_fused_adam_", TORCH),
    ("torch", "torch:_fused_adamw_", TORCH),
    ("torch", "torch:_fused_sgd_", TORCH),
    ("torch", "torch:_foreach_add_", TORCH),
    ("torch", f"{FLOP_COUNTER}.__wrapped__", TORCH),
    ("torch", "torch.optim:Optimizer.add_param_group.__wrapped__", TORCH),
    ("torch", "torch.optim:Optimizer.state_dict.__wrapped__", TORCH),
    ("torch", "torch.optim:Optimizer.load_state_dict.__wrapped__", TORCH),
    ("torch", "torch._dynamo.config:skip_nnmodule_hook_guards", TORCH),
    ("torch", "torch._dynamo.config:recompile_limit", TORCH),
    ("torch", "torch.nn:Linear._register_load_state_dict_pre_hook", TORCH),
    ("torch", "torch._dynamo.exc:TorchDynamoException", TORCH),
    ("torch", "torch.nn.modules.dropout:_DropoutNd", TORCH),
    ("torch", "torch.nn.modules.batchnorm:_NormBase._check_input_dim", TORCH),
    ("torch", "torch.nn:Conv2d._conv_forward", TORCH),
    ("torch", "torch.utils._pytree:tree_flatten", TORCH),
    ("torch", "torch.utils._pytree:register_pytree_node", TORCH),
    ("torch", "torch.distributed.distributed_c10d:_abort_process_group", TORCH),
    ("torch-pruning", "torch_pruning.ops:_ConcatOp", PRUNING),
    ("torch-pruning", "torch_pruning.ops:_SplitOp", PRUNING),
    ("torch-pruning", "torch_pruning.ops:_ReshapeOp", PRUNING),
    ("torch-pruning", "torch_pruning.ops:_ExpandOp", PRUNING),
    ("torch-pruning", "torch_pruning.ops:_SliceOp", PRUNING),
    ("torch-pruning", "torch_pruning.ops:_ElementWiseOp", PRUNING),
    ("torch-pruning", "torch_pruning._helpers:GroupItem", PRUNING),
    ("torch-pruning", "torch_pruning._helpers:_HybridIndex", PRUNING),
    ("joblib", "joblib.externals.loky:ProcessPoolExecutor", "trainables/data/images.py"),
]
"""The library, what of it, and where that is used."""


@pytest.mark.parametrize(("library", "path", "user"), USED, ids=[path for _, path, _ in USED])
def test_what_a_library_does_not_document_is_still_there(
    library: str, path: str, user: str
) -> None:
    since = SINCE_TORCH.get(path)
    if since is not None and torch.__version__ < since:
        pytest.skip(f"torch has it since {since}, and what uses it does without before")
    module, _, names = path.partition(":")
    message = f"{library} {version(library)} has no {path} any more, which {user} relies on"
    try:
        found = importlib.import_module(module)
    except ImportError:
        pytest.fail(message)
    for name in names.split("."):
        if not hasattr(found, name):
            pytest.fail(message)
        found = getattr(found, name)


def gone(library: str, what: str, user: str) -> str:
    return f"{library} {version(library)}: {what}, which {user} relies on"


def test_trials_of_optuna_have_the_number_that_its_storages_know_them_by() -> None:
    study = optuna.create_study()
    asked = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    for trial in (asked, study.get_trials(deepcopy=False)[0]):
        try:
            again = optuna.Trial(study, trial_id(trial))
        except (AttributeError, KeyError) as error:
            pytest.fail(gone("optuna", f"trials have no _trial_id ({error})", OPTUNA))
        assert again.params == asked.params


def test_torch_pruning_says_how_many_channels_it_makes_of_each() -> None:
    flattened = index_mapping._FlattenIndexMapping(stride=16)
    if stride(flattened) != 16:
        pytest.fail(gone("torch-pruning", "index mappings have no _stride", PRUNING))


def test_the_checks_that_torch_fx_puts_in_are_called_what_they_were() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
            return x

    graph = fx.Tracer().trace(Optional(), {"mask": None, "scale": 1.0})
    checks = [node for node in graph.nodes if node.op == "call_function" and not node.users]
    wanted = [node for node in checks if is_check(node)]
    if not checks or checks[0] not in wanted:
        names = [str(node.target) for node in graph.nodes]
        pytest.fail(gone("torch", f"torch.fx checks optional arguments by {names}", TORCH))


def test_a_norm_of_torch_asks_for_the_rank_by_a_method_that_can_be_replaced() -> None:
    norm = nn.BatchNorm1d(3).eval()
    with of_any_rank(norm):
        try:
            norm(torch.zeros(2, 3, 4, 5))
        except ValueError as error:
            pytest.fail(gone("torch", f"norms do not ask by _check_input_dim ({error})", TORCH))
    with pytest.raises(ValueError, match="2D or 3D"):
        norm(torch.zeros(2, 3, 4, 5))


def test_the_forward_hooks_of_a_module_of_torch_can_be_deleted() -> None:
    layer = nn.Linear(1, 1)
    layer.register_forward_hook(lambda *_: torch.ones(3))
    try:
        forward_hooks(layer).clear()
    except AttributeError:
        pytest.fail(gone("torch", "modules have no _forward_hooks", TORCH))
    assert len(layer(torch.zeros(1, 1))) == 1


INTERNALS = (TORCH, PRUNING, OPTUNA, MLFLOW, RAY)

DOCUMENTED = ("_exit", "_asdict", "_replace")
"""Python's own names that begin with an underscore: of `os`, and of named tuples."""

ELSEWHERE = {
    ("search/config/space_checks.py", "_contains"),
    ("trainables/data/images.py", "joblib.externals.loky"),
    ("trainables/data/images.py", "joblib.externals.loky.process_executor"),
    ("trainables/packs/modules.py", "_conv_forward"),  # overridden, as torch's own subclasses do
    ("trainables/packs/step.py", "_parameters"),
    ("trainables/packs/step.py", "_buffers"),
}
"""What is used elsewhere all the same."""

UNDOCUMENTED_MODULES = re.compile(r"\._(?!_)|^_(?!_)|externals\.loky")


def own_names(trees: Iterable[ast.AST]) -> set[str]:
    """Names with an underscore that our own code gives to functions, classes and attributes."""
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return {name for name in found if name.startswith("_")}


def of_others(tree: ast.AST, ours: set[str]) -> Iterator[str]:
    """Names with an underscore that a module uses of libraries, and modules of their insides."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [node.attr] if isinstance(node.ctx, ast.Load) else []
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if UNDOCUMENTED_MODULES.search(node.module or ""):
                yield str(node.module)
        elif isinstance(node, ast.Import):
            names = []
            yield from (a.name for a in node.names if UNDOCUMENTED_MODULES.search(a.name))
        else:
            continue
        for name in names:
            private = name.startswith("_") and not name.endswith("__")
            if private and name not in ours and name not in DOCUMENTED:
                yield name


def test_what_libraries_do_not_document_is_used_in_one_place_of_each_alone() -> None:
    files = {str(path.relative_to(ROOT)): path for path in modules().values()}
    trees = {name: ast.parse(path.read_text()) for name, path in files.items()}
    rest = {name: tree for name, tree in trees.items() if not name.startswith(INTERNALS)}
    ours = own_names(rest.values()) - {"_conv_forward", "_contains", "_trial_id"}
    found = {(file, name) for file, tree in rest.items() for name in of_others(tree, ours)}
    new = [f"{file}: {name}" for file, name in sorted(found - ELSEWHERE)]
    assert not new, f"put it into one of {INTERNALS}, with a test above"


def test_a_new_use_of_what_is_not_documented_is_found() -> None:
    program = "import torch._dynamo\nfrom ray import _private\nmodule._parameters\nself._mine"
    found = set(of_others(ast.parse(program), {"_mine"}))
    assert found == {"torch._dynamo", "_private", "_parameters"}


def test_what_is_gone_is_told_with_the_version_and_who_needs_it() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"torch \d.* has no torch:_gone .* mine\.py"):
        test_what_a_library_does_not_document_is_still_there("torch", "torch:_gone", "mine.py")


def test_ray_tune_keeps_trials_where_they_are_let_go() -> None:
    known = TuneController.__init__.__code__.co_names
    for name in ("_trials", "_stopped_trials", "_trials_to_cache", "_trial_to_actor"):
        if name not in known:
            pytest.fail(gone("ray", f"TuneController has no {name}", f"{RAY}/controller.py"))
