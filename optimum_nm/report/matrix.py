"""Which configurations a report compares: the tables of the paper and of this package's claims, or a user's file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from ..config import INTEGER_DTYPES, NMConfig
from ..errors import NMError
from ..presets import PRESETS
from .paper import TABLES

UNSTRUCTURED = ("weights", "outliers")
Fields: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One configuration to measure.

    Attributes:
        config: None for the dense model as it is.
        unstructured: what competes over a whole layer in a baseline that is evaluated and never packed: "weights" or
            "outliers" (see `unstructured_solver`); None for a model that is packed as `config` says.
    """

    name: str
    config: NMConfig | None
    unstructured: str | None = None

    @classmethod
    def read(cls, name: str, fields: Fields | None, base: Fields) -> Row:
        """A row from fields of NMConfig, and "unstructured" beside them, over those of `base`; None is the dense model.

        A row that names a preset takes all of it, whatever `base` says.

        Raises:
            NMError: naming the row, a field or a value is none.
        """
        if fields is None:
            return cls(name, None)
        if not isinstance(fields, Mapping):
            raise NMError(f"configuration {name!r} is {fields!r}; fields of NMConfig by name are needed.")
        values = {**base, **PRESETS.get(str(fields.get("preset")), {}), **fields}
        unstructured = values.pop("unstructured", None)
        try:
            config = NMConfig.from_dict(values)
            if unstructured not in (None, *UNSTRUCTURED):
                raise NMError(f"unstructured is {unstructured!r}; it must be one of {', '.join(UNSTRUCTURED)}.")
            if unstructured is not None and config.weight_dtype in INTEGER_DTYPES:
                raise NMError(f"weight_dtype is {config.weight_dtype!r}; an unstructured baseline needs floats.")
            if unstructured is not None and config.distill is not None:
                raise NMError("distill is set; an unstructured baseline, which is not packed, cannot be distilled.")
            if unstructured == "outliers" and config.outliers is None:
                raise NMError("unstructured is 'outliers', but outliers is None; give their number, as '16:256'.")
        except NMError as error:
            raise NMError(f"configuration {name!r}: {error}") from None
        return cls(name, config, unstructured)

    def to_dict(self) -> dict[str, Any] | None:
        """What `read` takes."""
        return None if self.config is None else {**self.config.to_dict(), "unstructured": self.unstructured}


@dataclass(frozen=True)
class Matrix:
    """Rows by the title of their table; a row may stand in several."""

    tables: dict[str, list[Row]]

    @property
    def rows(self) -> list[Row]:
        """Every row once, in the order of the tables."""
        return list({row.name: row for rows in self.tables.values() for row in rows}.values())

    def select(self, patterns: list[str] | None) -> list[Row]:
        """The rows of which the name, or the title of a table, matches a shell wildcard; None for all.

        Raises:
            NMError: a wildcard matches nothing.
        """
        if patterns is None:
            return self.rows
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in (*self.tables, *(row.name for row in self.rows))):
                raise NMError(f"{pattern!r} matches no configuration; one is called {self.rows[0].name!r}.")
        chosen = {
            row.name
            for title, rows in self.tables.items()
            for row in rows
            if any(fnmatchcase(name, pattern) for pattern in patterns for name in (title, row.name))
        }
        return [row for row in self.rows if row.name in chosen]


def default_matrix(base: Fields) -> Matrix:
    """The tables of `paper.TABLES`.

    Args:
        base: fields of NMConfig for every row that does not set them itself.
    """
    return _matrix(TABLES, base)


def read_matrix(path: str | Path, base: Fields) -> Matrix:
    """One table, from a JSON or YAML file: {name of the row: {field of NMConfig: value}}, null for the dense model.

    Raises:
        NMError: the file cannot be read, or a row is none; it is named.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = _parse_yaml(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except OSError as error:
        raise NMError(f"matrix file {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise NMError(f"matrix file {path} is not valid ({' '.join(str(error).split())}).") from None
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        raise NMError(f"matrix file {path} holds no configurations; {{name: {{field of NMConfig: value}}}} is needed.")
    return _matrix({"Configurations": content}, base)


def _matrix(tables: Mapping[str, Mapping[str, Fields | None]], base: Fields) -> Matrix:
    return Matrix(
        {title: [Row.read(name, fields, base) for name, fields in rows.items()] for title, rows in tables.items()}
    )


def _parse_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """In which 8:16 is a string, not 496, a number in base 60 as YAML 1.1 has them."""

    integer = "tag:yaml.org,2002:int"
    Loader.yaml_implicit_resolvers = {
        first: [(tag, re.compile(r"[-+]?\d+$") if tag == integer else form) for tag, form in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(error) from None
