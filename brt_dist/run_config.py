"""A run's configuration: YAML files and dotted overrides become one RunConfig, checked whole before anything starts.

Every section is a dataclass that its own part of the library owns; this file composes them and is above all of them.
Whatever is wrong is a ConfigError of one line.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from brt_dist.data.config import DataConfig
from brt_dist.model.config import ModelConfig
from brt_dist.parallel.config import ParallelConfig
from brt_dist.train.config import OptimizerConfig, RunFolderConfig, TrainConfig
from preprocessing.config import CorpusConfig, DocumentsConfig, ShardsConfig, SplitsConfig, TokenizerConfig

Sections = dict[str, dict[str, Any]]

# The section of sections.
CORPORA = "corpora"


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line that names the key and the numbers."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class RunConfig:
    """All sections of a run. No part receives the whole: each is handed the sections it needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    corpora: dict[str, CorpusConfig] = field(default_factory=dict)
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    splits: SplitsConfig = field(default_factory=SplitsConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunFolderConfig = field(default_factory=RunFolderConfig)

    def check(self) -> None:
        """ConfigError where sections do not fit together, whatever the number of processes."""
        try:
            self.model.check_segment(self.data.segment)
        except ValueError as error:
            raise ConfigError(f"data.segment and model.window: {error}") from error
        parallel = self.parallel
        # Before check_combination, which says of a pipeline to set ZeRO-1: this optimizer could not run there either.
        if self.optimizer.whole_matrices and (parallel.zero_stage != 0 or parallel.pipeline > 1 or parallel.tensor > 1):
            raise ConfigError(
                f"optimizer.name is {self.optimizer.name}, which looks at whole matrices, and {_what_cuts(parallel)}; "
                "set parallel.zero_stage=0, parallel.tensor=1 and parallel.pipeline=1, or optimizer.name=adamw"
            )
        try:
            parallel.check_combination()
            parallel.check_model(self.model)
            parallel.check_segment(self.data.segment)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if self.data.lanes % parallel.lane_groups:
            raise ConfigError(
                f"data.lanes is {self.data.lanes}, which parallel.micro_batches {parallel.micro_batches} does not "
                "divide"
            )

    def check_world(self, world_size: int) -> None:
        """ConfigError where `world_size` processes cannot share the lanes of this run evenly."""
        try:
            ranks = self.parallel.data_ranks(world_size)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        groups = self.parallel.lane_groups
        if self.data.lanes % (ranks * groups):
            by_micro_batches = f" x parallel.micro_batches {groups}" if self.parallel.segments_per_step == 1 else ""
            raise ConfigError(
                f"data.lanes is {self.data.lanes}, which {ranks} data ranks{by_micro_batches} = {ranks * groups} does "
                "not divide"
            )

    def corpora_by_name(self) -> dict[str, CorpusConfig]:
        """What `brt prepare` reads: the corpora, or the one of the section `corpus`, whose name is "".

        ConfigError where no corpus has a path, or both sections name some.
        """
        if not self.corpora:
            self.require("corpus.path")
            return {"": self.corpus}
        if self.corpus.path:
            names = ", ".join(self.corpora)
            raise ConfigError(f"corpus.path is {self.corpus.path}, but there are corpora too ({names}): leave one out")
        for name, corpus in self.corpora.items():
            if not corpus.path:
                raise ConfigError(f"corpora.{name}.path is not set: name it in the configuration")
        return self.corpora

    def require(self, *keys: str) -> None:
        """ConfigError unless each of `keys` ("section.key", strings) has a value."""
        for dotted in keys:
            section, key = dotted.split(".")
            if not getattr(getattr(self, section), key):
                raise ConfigError(f"{dotted} is not set: name it in the configuration, or as {dotted}=...")

    def as_dict(self) -> Sections:
        """Every key of every section with its value, as YAML and JSON hold it; load_run_config accepts it again."""
        return {section: _as_plain(values) for section, values in asdict(self).items()}


def _what_cuts(parallel: ParallelConfig) -> str:
    """Why this layout has no whole matrices."""
    if parallel.zero_stage:
        return f"parallel.zero_stage {parallel.zero_stage} flattens and cuts them"
    if parallel.pipeline > 1:
        return f"parallel.pipeline {parallel.pipeline} needs ZeRO, which flattens and cuts them"
    return f"parallel.tensor {parallel.tensor} cuts them"


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in the YAML file `path`, with `section.key=value` overrides (value in YAML) on top.

    The section `corpora` holds sections itself, by name: `corpora.books.path=...`.

    A file may hold `include: other.yaml`, or a list of files, relative to its own folder: they are read first and the
    file's own keys win. The vocabulary is one number: given in `model` or in `tokenizer`, it holds for both. An empty
    data.shards is shards.dir. Raises ConfigError.
    """
    given = _read_file(Path(path), ())
    for override in overrides:
        given = _assigned(given, *_read_override(override))
    config = _resolved(RunConfig(**{name: _section(name, given.get(name, {})) for name in _sections()}), given)
    config.check()
    return config


def _resolved(config: RunConfig, given: Sections) -> RunConfig:
    """`config` with the keys filled in that follow from others."""
    model_size, tokenizer_size = config.model.vocab_size, config.tokenizer.vocab_size
    if "vocab_size" not in given.get("model", {}):
        config = replace(config, model=replace(config.model, vocab_size=tokenizer_size))
    elif "vocab_size" not in given.get("tokenizer", {}):
        config = replace(config, tokenizer=replace(config.tokenizer, vocab_size=model_size))
    elif model_size != tokenizer_size:
        raise ConfigError(f"model.vocab_size is {model_size}, but tokenizer.vocab_size is {tokenizer_size}")
    if not config.data.shards:
        config = replace(config, data=replace(config.data, shards=config.shards.dir))
    return config


# --- files and overrides: from text to plain values with known names ---


class _Loader(yaml.SafeLoader):
    """YAML that reads 3e-4 as a number, as YAML 1.2 does, and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for index, name in enumerate(names):
            if name in names[:index]:
                problem = f"the key {name!r} stands here twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.value[index][0].start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _read_file(path: Path, including: tuple[Path, ...]) -> Sections:
    """The sections given in `path`, its includes beneath; `including` are the files that led here."""
    if path.resolve() in including:
        raise ConfigError(f"{path}: this file includes itself, by way of {including[-1].name}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error
    except OSError as error:
        by_way_of = f" (included by {including[-1]})" if including else ""
        raise ConfigError(f"configuration {path}{by_way_of}: {error.strerror}") from error
    values = _parse(text, str(path))
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as 'model:', found {_show(values)}")
    own = dict(values or {})
    includes = own.pop("include", None) or []
    if isinstance(includes, str):
        includes = [includes]
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ConfigError(f"{path}: include is {_show(includes)}; expected a file name or a list of them")
    merged: Sections = {}
    for name in includes:
        merged = _merged(merged, _read_file(path.parent / name, (*including, path.resolve())))
    return _merged(merged, _named(own, f"{path}: "))


def _read_override(override: str) -> tuple[list[str], Any]:
    """The names that lead to the key, the section first, and its new value."""
    dotted, equals, text = override.partition("=")
    section, dot, key = dotted.strip().partition(".")
    if not equals or not dot:
        meant = [f"{name}.{section}" for name in _sections() if section in _types(name)] if equals else []
        hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
        raise ConfigError(f"override {override!r} is not of the form section.key=value{hint}")
    path, value = [section, *key.split(".")], _parse(text, f"override {override!r}")
    _named(_assigned({}, path, value), "")
    return path, value


def _parse(text: str, source: str) -> Any:
    """`text` as YAML; ConfigError with the line where it is broken."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}{line}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error


def _merged(under: Sections, over: Sections) -> Sections:
    """`over` on top of `under`, key by key all the way down."""
    merged = dict(under)
    for name, value in over.items():
        below = merged.get(name)
        merged[name] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _assigned(under: Sections, path: Sequence[str], value: Any) -> Sections:
    """`under` with `value` where `path` leads; nothing is left of what stood there, and all else is."""
    name, *rest = path
    if rest:
        below = under.get(name)
        value = _assigned(below if isinstance(below, dict) else {}, rest, value)
    return {**under, name: value}


def _named(values: dict[Any, Any], source: str) -> Sections:
    """`values` as sections, after a look at every name; `source` begins the line of an error."""
    for section, keys in values.items():
        if section not in _sections():
            raise ConfigError(f"{source}there is no section {section!r}; {_nearest(section, None)}")
        if section == CORPORA:
            _check_corpora(keys, source)
        else:
            _check_keys(section, keys, section, source)
    return {section: keys or {} for section, keys in values.items()}


def _check_keys(shown: str, keys: Any, section: str, source: str) -> None:
    """ConfigError unless `keys` are keys of `section`; shown: what it is called where they were given."""
    if keys is not None and not isinstance(keys, dict):
        raise ConfigError(f"{source}{shown} is {_show(keys)}; expected keys under it: {_list_keys(section)}")
    for key in keys or {}:
        if key not in _types(section):
            raise ConfigError(f"{source}{shown} has no key {key!r}; {_nearest(key, section)}")


def _check_corpora(corpora: Any, source: str) -> None:
    if corpora is not None and not isinstance(corpora, dict):
        raise ConfigError(f"{source}{CORPORA} is {_show(corpora)}; expected the names of corpora under it")
    for name, keys in (corpora or {}).items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(f"{source}{CORPORA}: {_show(name)} is no name of letters, digits, '_' and '-'")
        _check_keys(f"{CORPORA}.{name}", keys, "corpus", source)


def _nearest(name: object, section: str | None) -> str:
    """What the writer of an unknown `name` may have meant, among the keys of `section` or (None) the sections."""
    known = list(_types(section)) if section else list(_sections())
    if near := difflib.get_close_matches(str(name), known, n=1):
        return f"did you mean {near[0]!r}?"
    if elsewhere := [f"{other}.{name}" for other in _sections() if name in _types(other)]:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"its keys are {_list_keys(section)}" if section else f"the sections are {', '.join(known)}"


def _list_keys(section: str) -> str:
    return ", ".join(_types(section))


# --- values: from plain values to the sections' dataclasses ---


@cache
def _sections() -> dict[str, Any]:
    """The dataclass of every section, by the section's name."""
    return get_type_hints(RunConfig)


@cache
def _types(section: str) -> dict[str, Any]:
    """The type of every key of a section; the keys of `corpora` are names that anybody chooses."""
    if section == CORPORA:
        return {}
    kind = _sections()[section]
    hints = get_type_hints(kind)
    return {key.name: hints[key.name] for key in fields(kind)}


def _section(name: str, given: Mapping[str, Any]) -> Any:
    """The dataclass of section `name`, made from the values given for it; of `corpora`, one for each name."""
    if name == CORPORA:
        return {corpus: _dataclass(f"{CORPORA}.{corpus}", "corpus", keys or {}) for corpus, keys in given.items()}
    return _dataclass(name, name, given)


def _dataclass(shown: str, name: str, given: Mapping[str, Any]) -> Any:
    """The dataclass of section `name`; shown: what it is called where the values were given."""
    values = {key: _converted(f"{shown}.{key}", value, _types(name)[key]) for key, value in given.items()}
    try:
        return _sections()[name](**values)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _converted(dotted: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, without guessing: no text becomes a number, no number a truth value."""
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # steps: 1e5
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))
        return adapter.validate_python(_as_tuples(value), strict=True)
    except ValidationError as error:
        raise ConfigError(f"{dotted} is {_show(value)}; expected {_describe(kind)}") from error


def _describe(kind: Any) -> str:
    """The type `kind` in words."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    if kind in words:
        return words[kind]
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if get_origin(kind) is dict:
        return f"names, and for each {_describe(arguments[1])}"
    if get_origin(kind) is tuple and arguments[-1] is Ellipsis:
        return f"a list, each of them {_describe(arguments[0])}"
    if get_origin(kind) is tuple:
        return f"a list of {len(arguments)}: {', '.join(_describe(argument) for argument in arguments)}"
    return str(kind)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value


def _as_plain(value: Any) -> Any:
    """`value` with lists in place of tuples, all the way down."""
    if isinstance(value, dict):
        return {key: _as_plain(item) for key, item in value.items()}
    return [_as_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _show(value: Any) -> str:
    """A value as it would stand in a configuration, on one line."""
    return json.dumps(_as_plain(value), default=str, ensure_ascii=False)
