import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from slimfront.search.config.space import Parameter, flatten, set_path, set_paths


def test_ranges_and_choices_become_optuna_distributions() -> None:
    assert Parameter(low=1, high=9, step=2).distribution(integer=True) == IntDistribution(
        1, 9, step=2
    )
    assert Parameter(low=1, high=9).distribution(integer=False) == FloatDistribution(1, 9)
    assert Parameter(low=0.1, high=9, log=True).distribution(integer=False) == FloatDistribution(
        0.1, 9, log=True
    )
    assert Parameter(low=2, high=64, log=True).distribution(integer=True) == IntDistribution(
        2, 64, log=True
    )
    assert Parameter(choices=("a", None, 3)).distribution(integer=False) == CategoricalDistribution(
        ("a", None, 3)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 3, "high": 1}, r"low \(3\) is greater than high \(1\)"),
        ({"low": 0, "high": 1, "log": True}, "low must be above 0"),
        ({"low": 1, "high": 2, "log": True, "step": 1}, "do not go together"),
        ({"low": 1, "high": 2, "step": 0}, "step must be above 0"),
        ({"low": 1}, "needs 'low' and 'high', or 'choices'"),
        ({}, "needs 'low' and 'high', or 'choices'"),
        ({"choices": []}, "'choices' is empty"),
        ({"choices": [1], "low": 1}, "does not go together"),
    ],
)
def test_inconsistent_parameters_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Parameter.model_validate(options)


def test_a_path_is_set_in_a_copy_and_made_where_it_is_missing() -> None:
    tree = {"a": {"b": 1}, "c": None}
    assert set_paths(tree, {"a.b": 2, "c.d.e": 3}) == {"a": {"b": 2}, "c": {"d": {"e": 3}}}
    assert tree == {"a": {"b": 1}, "c": None}


def test_a_path_through_a_value_is_refused() -> None:
    with pytest.raises(KeyError, match="'a' is 1, which has no 'b'"):
        set_path({"a": 1}, "a.b", 2)


keys = st.text("abc", min_size=1, max_size=3)
trees = st.recursive(
    st.integers(), lambda children: st.dictionaries(keys, children, min_size=1), max_leaves=10
)


@given(st.dictionaries(keys, trees, min_size=1))
def test_flattening_and_setting_paths_are_inverse(tree: dict[str, object]) -> None:
    assert set_paths({}, flatten(tree)) == tree
