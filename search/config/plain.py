"""A config as plain data: what may be recorded and printed, and what is secret in it."""

from collections.abc import Mapping
from typing import Any

from slimfront.search.config.schema import Config
from slimfront.search.config.space import flatten
from slimfront.search.config.yaml_files import write
from slimfront.trainables.candidate import Candidate
from slimfront.trainables.redaction import redact_values, without_secrets

_STORES = (("tracking", "uri"), ("search", "storage"), ("search", "storage_path"))


def own_code(config: Config) -> list[str]:
    """The import paths of all code of the user's that a config names: factories and plug-ins."""
    factories = _factories(config.model_dump(mode="json"))
    distinct = dict.fromkeys([*factories, *config.plugins])
    return list(distinct)


def _factories(value: object) -> list[str]:
    """The values of all keys `factory` in plain data."""
    found = []
    below: list[object] = []
    if isinstance(value, Mapping):
        below = list(value.values())
        factory = value.get("factory")
        if factory:
            found.append(str(factory))
    elif isinstance(value, list):
        below = value
    for one in below:
        found += _factories(one)
    return found


def as_plain(config: Config) -> dict[str, Any]:
    """The resolved config as plain data, without its secrets: what may be recorded and printed.

    URIs of stores stay usable, where their passwords come from the environment; elsewhere `***`
    stands for a secret.
    """
    plain = config.model_dump(mode="json")
    plain["space"] = _space(config)
    shown: dict[str, Any] = redact_values(plain)
    for section, key in _STORES:
        uri = plain[section][key]
        if uri:
            uri = without_secrets(uri)
        shown[section][key] = uri
    return shown


def _space(config: Config) -> dict[str, Any]:
    """What varies as the config says it, without what each parameter leaves out."""
    space = {}
    for path, parameter in config.space.items():
        space[path] = parameter.model_dump(mode="json", exclude_unset=True)
    return space


def secret_paths(config: Config) -> list[str]:
    """Where a config holds a secret, by dotted path."""
    shown = flatten(as_plain(config))
    plain = config.model_dump(mode="json")
    plain["space"] = _space(config)
    found = []
    for path, value in flatten(plain).items():
        if repr(shown[path]) != repr(value):
            found.append(path)
    return found


def dump(config: Config) -> str:
    """The resolved config as YAML that `load` reads back to an equal config, but for secrets."""
    plain = as_plain(config)
    order = dict.fromkeys(["name", *Candidate.model_fields, *Config.model_fields])
    ordered = {key: plain[key] for key in order}
    return write(ordered)
