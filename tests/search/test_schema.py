"""Every mistake in a config gets one sentence that says what, where and what would be right."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.distributions import FloatDistribution, IntDistribution
from pydantic import ValidationError

from slimfront.search.config.loading import load, load_recorded
from slimfront.search.config.plain import dump
from slimfront.search.config.schema import Config
from slimfront.search.config.space import set_path
from slimfront.trainables.errors import UserError
from slimfront.trainables.sparsifiers import LotteryTicket
from tests.conftest import SMALL_CONFIG

ROOT = Path(__file__).parents[2]

BAD_VALUES = [
    (
        "space",
        {"penalties.node.strength": "auto"},
        "'space': 'penalties.node.strength' is auto, and how strong is strong differs from "
        "training to training; it has a range of its own in units of the training "
        "alone: set relative to true",
    ),
    (
        "space",
        {"int8": "auto"},
        "'space': 'int8' is auto, and it has no range of its own; give low and high. What has one",
    ),
    (
        "space",
        {"penalties.noed.strength": "auto"},
        "'space': 'penalties.noed.strength' is auto, and unknown penalty 'noed'; did you mean",
    ),
    (
        "space",
        {"penalties.node.strength": "auto", "penalties.node.relative": {"choices": [True]}},
        "'space': 'penalties.node.strength' is auto, and its range depends on "
        "penalties.node.relative, which varies too; set that outside of space",
    ),
    (
        "space",
        {"training.lr": "auto"},
        "'space': 'training.lr' is auto, and it has no range of its own; give low and high. What "
        "has one: penalties.NAME.strength and sparsifier.sparsity",
    ),
    (
        "space",
        {"distill.weight": "auto"},
        "'space': 'distill.weight' is auto, and the config has no distill, which would say that "
        "range; add it",
    ),
    ("trainings", {}, "unknown key 'trainings'; did you mean 'training'?"),
    ("training.epoch", 3, "in 'training': unknown key 'epoch'; did you mean 'epochs'?"),
    (
        "penalties.layer.strenght",
        3,
        "in 'penalties.layer': unknown key 'strenght'; did you mean 'strength'?",
    ),
    ("training.epochs", "many", "'training.epochs': it should be a valid integer"),
    (
        "training.epochs",
        -1,
        "'training.epochs': it should be greater than or equal to 0, and it is -1",
    ),
    ("training", 5, "'training': it should be a mapping of keys to values, and it is 5"),
    ("model", {"name": "mpl"}, "in 'model': unknown model 'mpl'; did you mean 'mlp'?"),
    ("model", {"depth": 3}, "'model': the model has no 'name'; known: factory, lenet, mlp"),
    ("data", "digit", "in 'data': unknown data set 'digit'; did you mean 'digits'?"),
    (
        "sparsifier",
        "magnitud",
        "in 'sparsifier': unknown sparsifier 'magnitud'; did you mean 'magnitude'?",
    ),
    (
        "sparsifier",
        {"name": "random", "every": 5},
        "'sparsifier': 'every' is not an option of the sparsifier 'random', only of channels, "
        "granet, magn",
    ),
    (
        "sparsifier",
        {"name": "nm", "sparsity": 0.5},
        "'sparsifier': 'sparsity' is not an option of the sparsifier 'nm', only of channels, "
        "granet,",
    ),
    ("sparsifier", {"name": "nm", "n": 4, "m": 4}, "'sparsifier': n (4) must be below m (4)"),
    ("sparsifier", {"name": "rigl", "start": 0.9}, "'sparsifier': start (0.9) is after end (0.75)"),
    ("sparsifier", {"name": "granet", "start": 0.75}, "'sparsifier': start and end are both 0.75"),
    (
        "sparsifier",
        {"name": "set", "densities": "global"},
        "'sparsifier.densities': it should be 'uniform' or 'erk'",
    ),
    (
        "penalties.cka",
        {"stages": [["0"]]},
        "'penalties.cka.stages': a stage is a list of two or more different layers",
    ),
    ("penalties.aug_cka", {"stages": [["0"]]}, "in 'penalties.aug_cka': unknown key 'stages'"),
    ("penalties", {"layr": {}}, "in 'penalties': unknown penalty 'layr'; did you mean 'layer'?"),
    (
        "penalties.layer.strength",
        -1,
        "'penalties.layer.strength': it should be greater than or equal to 0, and it is -1",
    ),
    (
        "penalties.layer.strength",
        float("inf"),
        "'penalties.layer.strength': it should be a finite number",
    ),
    ("penalties.cka", {"samples": 2}, "'penalties.cka.samples': it needs at least 4 samples"),
    ("sparsifier.sparsity", 1.0, "'sparsifier.sparsity': it should be less than 1, and it is 1.0"),
    (
        "sparsifier.sparsity",
        -0.5,
        "'sparsifier.sparsity': it should be greater than or equal to 0, and it is -0.5",
    ),
    ("search.sampler", "tep", "'search.sampler': unknown sampler 'tep'; did you mean 'tpe'?"),
    ("search.trials", 0, "'search.trials': it should be greater than or equal to 1, and it is 0"),
    ("search.concurrency", 0, "'search.concurrency': it must be at least 1, and it is 0"),
    ("search.concurrency", "some", "'search.concurrency': it should be a valid integer"),
    ("resources.cpu", 0, "'resources.cpu': it should be greater than 0, and it is 0"),
    ("resources.gpu", 1.5, "'resources.gpu': several GPUs must be a whole number, and it is 1.5"),
    (
        "resources",
        {"gpu": 2, "processes": 4},
        "'resources': processes (4) must be the number of GPUs (2), one each; leave it out",
    ),
    (
        "resources",
        {"gpu": 0.5, "processes": 2},
        "'resources': processes (2) must be the number of GPUs (1), one each; leave it out",
    ),
    (
        "resources.processes",
        2,
        "'resources': processes (2) must not be more than the cores of a trial; set cpu to 2 or "
        "more",
    ),
    ("resources.processes", 0, "'resources': processes must be at least 1, and it is 0"),
    (
        "resources.memory",
        "4 gigs",
        "'resources.memory': '4 gigs' is not an amount of memory; it needs the form 4000000000",
    ),
    ("resources.memory", 0, "'resources.memory': it should be greater than 0, and it is 0"),
    (
        "resources.custom",
        {"big": 0},
        "'resources.custom.big': it should be greater than 0, and it is 0",
    ),
    (
        "resources.custom",
        {"GPU": 1},
        "'resources.custom': 'GPU' is not a resource of yours; set resources.gpu",
    ),
    (
        "resources.custom",
        {"object_store_memory": 1},
        "'resources.custom': 'object_store_memory' cannot name a resource of yours",
    ),
    (
        "objectives",
        ["val_accuracy"],
        "'objectives': a front needs two or more objectives, and there is 1",
    ),
    (
        "objectives",
        ["val_accuracy", "layer"],
        "'objectives': unknown objective 'layer'; did you mean 'layers'?",
    ),
    ("objectives", ["layers", "layers"], "'objectives': an objective is named twice"),
    ("name", "no spaces please", "'name': 'no spaces please' cannot name a directory"),
    ("space", {}, "'space': nothing varies"),
]

BAD_SPACES = [
    ("training.lr", {"low": 3, "high": 1}, "'space.training.lr': low (3) is greater than high (1)"),
    (
        "training.lr",
        {"low": 0, "high": 1, "log": True},
        "'space.training.lr': with log: true, low must be above 0, and it is 0",
    ),
    (
        "training.lr",
        {"lo": 1, "high": 2},
        "in 'space.training.lr': unknown key 'lo'; did you mean 'low'?",
    ),
    ("training.lr", 5, "'space.training.lr': it should be a mapping of keys to values"),
    (
        "penalties.layr.strength",
        {"low": 1, "high": 2},
        "space 'penalties.layr.strength': in 'penalties': unknown penalty 'layr'",
    ),
    (
        "training.epoch",
        {"low": 1, "high": 2},
        "space 'training.epoch': in 'training': unknown key 'epoch'; did you mean 'epochs'?",
    ),
    (
        "training.epochs.x",
        {"low": 1, "high": 2},
        "space 'training.epochs.x': names nothing: 'epochs' is 2, which has no 'x'",
    ),
    (
        "search.trials",
        {"low": 1, "high": 2},
        "space 'search.trials': names nothing: it is not part of the candidate",
    ),
    (
        "penalties.layer.strength",
        {"low": -1, "high": 2},
        "it should be greater than or equal to 0, and it is -1",
    ),
    (
        "sparsifier.sparsity",
        {"low": 0, "high": 1},
        "space 'sparsifier.sparsity': it should be less than 1, and it is 1",
    ),
    ("model.depth", {"low": 1.5, "high": 4}, "space 'model.depth': it should be a valid integer"),
    (
        "model.depth",
        {"low": 1, "high": 4, "step": 0.5},
        "space 'model.depth': is a whole number, so",
    ),
    ("model", {"low": 1, "high": 4}, "space 'model': "),
    (
        "training.optimizer",
        {"choices": ["adam", "admw"]},
        "space 'training.optimizer': it should be 'adam', 'adamw' or 'sgd'",
    ),
    ("training.lr", {"choices": ["fast"]}, "space 'training.lr': it should be a valid number"),
]


def refusal(tmp_path: Path, tree: dict[str, Any]) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(("path", "value", "expected"), BAD_VALUES)
def test_a_bad_value_is_explained(tmp_path: Path, path: str, value: object, expected: str) -> None:
    assert refusal(tmp_path, set_path(SMALL_CONFIG, path, value)).startswith(expected)


@pytest.mark.parametrize(("path", "parameter", "expected"), BAD_SPACES)
def test_a_bad_space_is_explained(
    tmp_path: Path, path: str, parameter: object, expected: str
) -> None:
    assert expected in refusal(tmp_path, SMALL_CONFIG | {"space": {path: parameter}})


@pytest.mark.parametrize("key", ["name", "space"])
def test_a_missing_section_is_named(tmp_path: Path, key: str) -> None:
    tree = copy.deepcopy(SMALL_CONFIG)
    del tree[key]
    assert refusal(tmp_path, tree) == f"'{key}' is missing"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "line 1: this is not YAML"),
        ("a: 1\na: 2", "line 1: this is not YAML: the key 'a' stands twice"),
        ("- 1", "a config is a mapping of keys to values, and this is list"),
        ("", "a config is a mapping of keys to values, and this is NoneType"),
    ],
)
def test_text_that_is_no_config_is_explained(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(path)
    assert expected in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the config .*none\.yaml: No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        load(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load(binary)


def test_overrides_replace_single_values(config_file: Path) -> None:
    loaded = load(
        config_file, ["training.epochs=5", "objectives=[layers, flops]", "training.lr=1e-2"]
    )
    assert loaded.training.epochs == 5
    assert loaded.training.lr == 0.01
    assert loaded.objectives == ("layers", "flops")
    assert loaded.training.batch_size == SMALL_CONFIG["training"]["batch_size"]


@pytest.mark.parametrize("override", ["training.epochs", "=5", "training.epochs=[", "name.first=x"])
def test_overrides_that_make_no_sense_are_refused(config_file: Path, override: str) -> None:
    with pytest.raises(UserError, match="--set"):
        load(config_file, [override])


def test_the_resolved_config_reads_back_as_itself(config_file: Path, tmp_path: Path) -> None:
    loaded = load(config_file)
    again = tmp_path / "again.yaml"
    again.write_text(dump(loaded))
    assert load(again) == loaded


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_that_we_ship_is_valid(path: Path) -> None:
    assert load(path).search.trials > 0


def test_numbers_without_a_point_before_the_exponent_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(SMALL_CONFIG | {"space": {"training.lr": {"choices": []}}}).replace(
            "[]", "[1e-3, 2E+1]"
        )
    )
    assert load(path).space["training.lr"].choices == (1e-3, 20.0)


def test_ranges_take_the_type_of_what_they_vary() -> None:
    tree = SMALL_CONFIG | {
        "space": {"model.depth": {"low": 1, "high": 3}, "training.lr": {"low": 1, "high": 3}}
    }
    assert Config.model_validate(tree).distributions() == {
        "model.depth": IntDistribution(1, 3),
        "training.lr": FloatDistribution(1, 3),
    }


def test_arguments_of_a_factory_can_have_a_range() -> None:
    model = {"factory": "some.module:network", "args": {"width": 3}}
    space = {
        "model.args.width": {"low": 1, "high": 4},
        "model.args.dropout": {"low": 0, "high": 0.5},
    }
    assert Config.model_validate(
        SMALL_CONFIG | {"model": model, "space": space}
    ).distributions() == {
        "model.args.width": IntDistribution(1, 4),
        "model.args.dropout": FloatDistribution(0, 0.5),
    }


def test_the_space_may_switch_on_a_penalty_that_the_config_leaves_out() -> None:
    tree = SMALL_CONFIG | {
        "penalties": {},
        "space": {"penalties.cka.strength": {"low": 0.0, "high": 1.0}},
    }
    candidate = Config.model_validate(tree).candidate({"penalties.cka.strength": 0.5})
    assert candidate.penalties["cka"].strength == 0.5


def test_a_candidate_has_the_values_put_in(config: Config) -> None:
    candidate = config.candidate({"sparsifier.sparsity": 0.25, "model.depth": 5})
    assert candidate.sparsifier is not None
    assert candidate.sparsifier.sparsity == 0.25
    assert candidate.model.model_dump()["depth"] == 5


def test_the_sparsifier_itself_can_vary_with_its_target(tmp_path: Path) -> None:
    space = {
        "sparsifier.name": {"choices": ["random", "magnitude", "lottery"]},
        "sparsifier.sparsity": {"low": 0.5, "high": 0.9},
    }
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(SMALL_CONFIG | {"sparsifier": {"name": "random"}, "space": space})
    )
    drawn = (
        load(path).candidate({"sparsifier.name": "lottery", "sparsifier.sparsity": 0.7}).sparsifier
    )
    assert isinstance(drawn, LotteryTicket)
    assert drawn.sparsity == 0.7


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {
                "sparsifier.start": {"low": 0.0, "high": 0.7},
                "sparsifier.end": {"low": 0.0, "high": 1.0},
            },
            "is after end",
        ),
        ({"penalties.cka.samples": {"low": -1, "high": 8}}, "at least 4 samples"),
        (
            {
                "sparsifier": {"choices": ["magnitude"]},
                "sparsifier.sparsity": {"low": 0.1, "high": 0.5},
            },
            "vary one of the two",
        ),
        ({"data.seed": {"choices": [0, 1]}}, "data that cannot be compared"),
        ({"model.depth": {"low": 1, "high": 10, "step": 4}}, "do not end at high"),
    ],
)
def test_values_that_do_not_go_together_are_refused_before_a_search(
    tmp_path: Path, space: dict[str, Any], message: str
) -> None:
    tree = SMALL_CONFIG | {
        "sparsifier": {"name": "magnitude", "start": 0.0, "end": 1.0},
        "space": space,
    }
    assert message in refusal(tmp_path, tree)


def test_optuna_and_mlflow_cannot_share_a_database(config_file: Path) -> None:
    wanted = [
        "tracking.uri=postgresql://anna:a@host/one",
        "search.storage=postgresql://anna:b@host/one",
    ]
    with pytest.raises(
        UserError,
        match=r"search\.storage and tracking\.uri are the same database; give each one of its own",
    ):
        load(config_file, wanted)
    load(config_file, [wanted[0], "search.storage=postgresql://anna:b@host/two"])


def test_a_password_in_a_uri_is_neither_dumped_nor_shown(config_file: Path) -> None:
    loaded = load(
        config_file,
        ["tracking.uri=http://me:secret@host:1/x", "search.storage=postgresql://me:secret@host/y"],
    )
    assert loaded.tracking.absolute_uri() == "http://me:secret@host:1/x"
    assert loaded.tracking.shown_uri() == "http://me@host:1/x"
    assert "secret" not in dump(loaded)


def test_one_value_of_the_space_can_be_overridden(config_file: Path) -> None:
    loaded = load(
        config_file,
        ["space.penalties.layer.strength.high=7", "space.model.depth={low: 1, high: 2}"],
    )
    assert loaded.space["penalties.layer.strength"].high == 7
    assert loaded.space["penalties.layer.strength"].low == 0.1
    assert loaded.space["model.depth"].high == 2


def test_objectives_and_constraints_say_which_extra_measures_trials_take() -> None:
    tree = SMALL_CONFIG | {
        "objectives": ["val_accuracy", "speedup"],
        "constraints": {"latency_ms": "<= 5"},
    }
    tree |= {"space": {"model.width": {"low": 8, "high": 16}}}
    config = Config.model_validate(tree)
    candidate = config.candidate({"model.width": 9})
    assert candidate.measures == ("latency_ms", "speedup")
    # Not the trial's own network, which is narrower.
    assert candidate.latency.against == config.model
    assert config.candidate({}).measures == candidate.measures
    plain = Config.model_validate(SMALL_CONFIG).candidate({})
    assert plain.measures == ()
    assert plain.latency.against is None


def test_what_takes_times_is_kept_in_candidates_and_named_in_labels() -> None:
    tree = SMALL_CONFIG | {
        "objectives": ["val_accuracy", "latency_ms"],
        "constraints": {"speedup": ">= 2"},
        "latency": {"runtime": "onnx"},
    }
    config = Config.model_validate(tree)
    assert config.candidate({}).latency.runtime == "onnx"
    assert config.chosen_objectives()[1].measure.label.endswith("in ONNX Runtime")
    assert config.chosen_constraints()[0].head == "speedup_onnx"
    assert Config.model_validate(tree | {"int8": True}).candidate({}).int8
    assert load_recorded(dump(config)).latency == config.latency


def test_how_times_are_taken_does_not_vary() -> None:
    space = {"latency.batch_size": {"low": 1, "high": 4}}
    tree = SMALL_CONFIG | {"objectives": ["val_accuracy", "speedup"], "space": space}
    with pytest.raises(
        ValidationError, match=r"'latency\.batch_size' would have networks timed in"
    ):
        Config.model_validate(tree)


def test_what_would_take_times_of_nothing_is_refused() -> None:
    for latency in ({"runtime": "onnx"}, {"command": "time {file}"}):
        with pytest.raises(ValidationError, match="is for latency_ms and speedup, and neither"):
            Config.model_validate(SMALL_CONFIG | {"latency": latency})
    torch_alone = SMALL_CONFIG | {"objectives": ["val_accuracy", "speedup"], "int8": True}
    with pytest.raises(ValidationError, match=r"set latency\.runtime to onnx, or leave out"):
        Config.model_validate(torch_alone)


@pytest.mark.parametrize(
    ("resources", "expected", "processes"),
    [
        ({}, {"CPU": 1}, 1),
        ({"cpu": 0.5, "gpu": 0.25}, {"CPU": 0.5, "GPU": 0.25}, 1),
        ({"cpu": 8, "gpu": 2}, {"CPU": 8, "GPU": 2}, 2),
        ({"cpu": 4, "processes": 4}, {"CPU": 4}, 4),
        ({"memory": "4GB", "custom": {"big": 0.5}}, {"CPU": 1, "memory": 4 * 10**9, "big": 0.5}, 1),
        ({"memory": "1.5GiB"}, {"CPU": 1, "memory": 3 * 2**29}, 1),
        ({"memory": 1000}, {"CPU": 1, "memory": 1000}, 1),
    ],
)
def test_resources_are_told_to_ray_by_its_names(
    resources: dict[str, Any], expected: dict[str, float], processes: int
) -> None:
    config = Config.model_validate(SMALL_CONFIG | {"resources": resources})
    assert config.resources.for_ray() == expected
    assert config.resources.processes_of_a_trial() == processes


def test_what_came_after_a_config_was_recorded_is_off_when_it_goes_on() -> None:
    tree = {
        "sparsifier": {"name": "channels"},
        "space": {"sparsifier.sparsity": {"choices": [0.5]}},
    }
    now = Config.model_validate(SMALL_CONFIG | {"penalties": {}} | tree)
    recorded = yaml.safe_load(dump(now))
    del recorded["sparsifier"]["of"], recorded["one_shot"]["refine"]
    before = load_recorded(yaml.safe_dump(recorded))
    assert before.one_shot.refine == 0
    assert before.sparsifier.of == "channels"  # type: ignore[union-attr]
    assert load_recorded(dump(now)) == now


def test_what_is_auto_varies_in_the_range_that_the_option_has_of_its_own() -> None:
    tree = copy.deepcopy(SMALL_CONFIG)
    tree["penalties"] = {"node": {"relative": True}}
    tree["sparsifier"] = {"name": "magnitude"}
    paths = ("penalties.node.strength", "penalties.cka.strength", "sparsifier.sparsity")
    tree["space"] = dict.fromkeys(paths, "auto")
    config = Config.model_validate(tree)
    assert config.distributions() == {
        "penalties.node.strength": FloatDistribution(0.3, 10, log=True),
        "penalties.cka.strength": FloatDistribution(1e-5, 1e-2, log=True),
        "sparsifier.sparsity": FloatDistribution(0.5, 0.98),
    }
    recorded = config.space["sparsifier.sparsity"]
    assert (recorded.low, recorded.high) == (0.5, 0.98)
