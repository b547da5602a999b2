"""YAML + overrides -> dataclasses. The only reader of YAML in the project.

A configuration is a tree of frozen dataclasses, each written beside the code that uses it. A YAML file
may `include:` others (paths relative to itself), which are merged below its own keys; `key=value`
arguments are merged on top. Every key must name a field and every value must have the field's type:
anything else fails with the nearest valid name and the file.
"""

import dataclasses
import difflib
import json
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from egom2p import resources
from egom2p.errors import UserError

T = TypeVar("T")


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read `path` and its includes, apply `key=value` overrides and build a `cls`.

    Raises UserError for a missing or malformed file, an unknown key or an ill-typed value.
    """
    tree = _merged(read_yaml(Path(path)), _parse_overrides(overrides), f"{path} and {' '.join(overrides)}")
    try:
        values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_one_line(error)}") from error
    for item in overrides:
        key, _, text = item.partition("=")
        _keep_text(cls, values, key.split("."), text)
    return build(cls, values, "", str(path))


def _keep_text(kind: Any, tree: Any, keys: list[str], text: str) -> None:
    """Where a field is text, `key=4711` means the text 4711, not the number that YAML sees in it, and `key=a #2` all of
    it."""
    if not isinstance(tree, dict) or keys[0] not in tree:
        return
    if dataclasses.is_dataclass(kind):
        kind = typing.get_type_hints(kind).get({_key(f): f.name for f in dataclasses.fields(kind)}.get(keys[0], ""))
    elif typing.get_origin(kind) is dict:
        kind = typing.get_args(kind)[1]
    options = [o for o in typing.get_args(kind) or (kind,) if o is not type(None)]
    if len(keys) > 1:
        _keep_text(options[0] if typing.get_origin(kind) in (typing.Union, types.UnionType) else kind,
                   tree[keys[0]], keys[1:], text)
    elif options == [str] and (isinstance(tree[keys[0]], (bool, int, float)) or text.startswith(f"{tree[keys[0]]} #")):
        tree[keys[0]] = text  # YAML saw a number, or a comment


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> DictConfig:
    """The YAML mapping in `path` (here or shipped) merged over the files it includes (unresolved)."""
    path = resources.locate(path)
    if path.resolve() in seen:
        raise UserError(f"{path}: includes itself")
    if not path.is_file():
        raise UserError(f"no configuration file {path}{_nearest_file(path)}")
    try:
        tree = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError, OSError) as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path}: expected a mapping of keys to values at the top level")
    included = _includes(path, tree)
    tree.pop("include", None)
    merged = OmegaConf.create()
    for file in included:
        merged = _merged(merged, read_yaml(file, (*seen, path.resolve())), f"{path}: its include {file}")
    return _merged(merged, tree, str(path))


def _merged(below: DictConfig, above: DictConfig, what: str) -> DictConfig:
    """`above` over `below`. Raises UserError where one has a mapping and the other a list."""
    try:
        return OmegaConf.merge(below, above)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        clash = _clash(below, above) or _one_line(error)
        raise UserError(f"{what}: {clash}") from error


def _clash(below: Any, above: Any, where: str = "") -> str:
    """Which key is a mapping on one side and a list on the other; "" when none is."""
    if isinstance(below, DictConfig) and isinstance(above, DictConfig):
        both = [key for key in above if key in below and not OmegaConf.is_missing(below, key)]
        return next(filter(None, (_clash(below._get_node(k), above._get_node(k), f"{where}.{k}" if where else str(k))
                                  for k in both)), "")
    kinds = {DictConfig: "a mapping (NAME: value)", ListConfig: "a list"}
    if type(below) in kinds and type(above) in kinds and type(below) is not type(above):
        return f"{where} must be {kinds[type(below)]}, not {kinds[type(above)]}"
    return ""


def included_files(path: Path) -> list[Path]:
    """Every file that the YAML `path` includes, those that they include too."""
    direct = _includes(path, OmegaConf.load(path))
    return [file for included in direct for file in (included, *included_files(included))]


def _includes(path: Path, tree: DictConfig) -> list[Path]:
    names = tree.get("include") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, ListConfig | list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: include must be a file's name or a list of them, not {names}")
    return [_included(path.parent, name) for name in names]


def _included(folder: Path, name: str) -> Path:
    """The file `name`, relative to the one that includes it; else the shipped one of that name (`cfgs/...`)."""
    places = (folder / name, os.path.normpath(folder / name), name)
    return next((place for place in map(resources.locate, places) if place.exists()), folder / name)


def build(cls: Any, value: Any, where: str, file: str) -> Any:
    """Turn plain values into `cls`: a dataclass, a builtin, or a container of them.

    `where` is the dotted path so far ("" at the root) and `file` the YAML's name; both are for messages.
    """
    if dataclasses.is_dataclass(cls):
        return _build_dataclass(cls, value, where, file)
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if origin in (typing.Union, types.UnionType):
        return _build_union(args, value, where, file)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise _wrong_type(where, file, "a list", value)
        return origin(build(args[0], item, f"{where}[{i}]", file) for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong_type(where, file, "a mapping", value)
        # `NAME: null` drops an entry that an included file has.
        dropped = {k for k, v in value.items() if v is None and dataclasses.is_dataclass(args[1])}
        return {str(k): build(args[1], v, f"{where}.{k}", file) for k, v in value.items() if k not in dropped}
    if origin is typing.Literal:
        if value not in args:
            hint = _did_you_mean(str(value), [str(a) for a in args])
            raise UserError(f"{where} ({file}): {value!r} is not one of {', '.join(map(str, args))}{hint}")
        return value
    return _build_scalar(cls, value, where, file)


def to_plain(config: Any) -> Any:
    """A configuration as plain dictionaries, lists and scalars."""
    if dataclasses.is_dataclass(config):
        return {_key(f): to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {k: to_plain(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(v) for v in config]
    return config


def dump(config: Any) -> str:
    """A configuration as YAML text that `load` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def read_json(path: Path) -> Any:
    """A JSON file's value; UserError with the file's name when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable JSON: {_one_line(error)}") from error


def _build_dataclass(cls: Any, value: Any, where: str, file: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong_type(where or "the configuration", file, "a mapping", value)
    hints = typing.get_type_hints(cls)
    fields = {_key(f): f for f in dataclasses.fields(cls)}
    place = where or "the configuration"
    for key in value:
        if key not in fields:
            raise UserError(f"unknown key '{key}' in {place} ({file}){_did_you_mean(str(key), list(fields))}")
    for key, field in fields.items():
        if key not in value and _required(field):
            raise UserError(f"missing key '{key}' in {place} ({file})")
    prefix = f"{where}." if where else ""
    built = {fields[k].name: build(hints[fields[k].name], v, f"{prefix}{k}", file) for k, v in value.items()}
    try:
        return cls(**built)
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"{where or 'the configuration'} ({file}): {error}") from error


def _build_union(args: tuple, value: Any, where: str, file: str) -> Any:
    if value is None and type(None) in args:
        return None
    errors = []
    for option in args:
        if option is type(None):
            continue
        try:
            return build(option, value, where, file)
        except UserError as error:
            errors.append(error)
    raise errors[-1]


def _build_scalar(cls: Any, value: Any, where: str, file: str) -> Any:
    if cls is Any:
        return value
    if cls is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if cls is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) != (cls is bool) or not isinstance(value, cls):
        wanted = {"int": "a whole number", "float": "a number", "str": "text (in quotes)"}
        raise _wrong_type(where, file, wanted.get(cls.__name__, cls.__name__), value)
    return value


def _key(field: dataclasses.Field) -> str:
    """A field's name in YAML; a trailing underscore only keeps it clear of Python's own words (`from_`)."""
    return field.name.removesuffix("_")


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _wrong_type(where: str, file: str, expected: str, value: Any) -> UserError:
    return UserError(f"{where} ({file}) must be {expected}, not {value!r}")


def _did_you_mean(word: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; it may be one of {', '.join(choices)}"


def _nearest_file(path: Path) -> str:
    siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item or item.startswith("="):
            raise UserError(f"'{item}' is not an override; write key=value, for instance train.steps=100")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"cannot read the overrides {' '.join(overrides)}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
