"""Command-line options for the fields of NMConfig: names, defaults, choices and help all come from `config.py`."""

from __future__ import annotations

import dataclasses
import json
import re
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace, _ArgumentGroup
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import config as definitions
from ..config import NMConfig
from ..errors import NMError

CHOICES = {
    "score": definitions.SCORES,
    "solver": definitions.SOLVERS,
    "equalization_mode": definitions.EQUALIZATION_MODES,
    "variance_correction": (*definitions.VARIANCE_CORRECTIONS, None),
    "weight_dtype": definitions.WEIGHT_DTYPES,
    "positions": (*definitions.POSITION_FORMATS, None),
    "outlier_dtype": definitions.OUTLIER_DTYPES,
    "preset": (*definitions.PRESETS, None),
}
FIELDS = {field.name: field for field in dataclasses.fields(NMConfig)}


def add_config_options(parser: ArgumentParser) -> None:
    """One option per field of NMConfig, beside `--config`, whose values they override."""
    group = parser.add_argument_group("configuration (NMConfig)")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="JSON file with fields of NMConfig, or a checkpoint folder to take them from; options given here win",
    )
    described = field_descriptions()
    for name in FIELDS:
        if name == "overrides":
            group.add_argument(
                "--override",
                action="append",
                type=_override,
                default=SUPPRESS,
                metavar="PATTERN=FIELD:VALUE,…",
                help="settings of layers whose name matches, as 'lm_head=pattern:16:16,weight_dtype:int8' or with a "
                f"JSON object behind '='; may be repeated, of several matches the later wins. Fields: "
                f"{', '.join(definitions.LAYER_FIELDS)} (default: nothing)",
            )
        elif FIELDS[name].type == "bool":
            option, help_text = f"--{name.replace('_', '-')}", _help(described[name], name)
            group.add_argument(option, action=BooleanOptionalAction, default=SUPPRESS, help=help_text)
        elif name == "exclude":
            help_text = _help(described[name], name)
            group.add_argument("--exclude", nargs="*", default=SUPPRESS, metavar="PATTERN", help=help_text)
        else:
            add_field_option(group, name, described[name])


def add_field_option(parser: ArgumentParser | _ArgumentGroup, name: str, description: str) -> None:
    """The option of one field of NMConfig; it is absent from the parsed arguments unless it was given."""
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        type=_reader(name),
        choices=CHOICES.get(name),
        default=SUPPRESS,
        metavar=_metavar(name),
        help=_help(description, name),
    )


def _help(description: str, name: str) -> str:
    return f"{description} (default: {_as_typed(getattr(NMConfig(), name))})".replace("%", "%%")


def read_config(args: Namespace) -> NMConfig:
    """The configuration that the options of `add_config_options` describe.

    Raises:
        NMError: the file or a value is not what it should be.
    """
    return NMConfig.from_dict(given_fields(args))


def given_fields(args: Namespace) -> dict[str, Any]:
    """What the options of `add_config_options` set, by field.

    Raises:
        NMError: the file cannot be read.
    """
    values = {} if args.config is None else _read_file(Path(args.config))
    given = vars(args)
    values |= definitions.PRESETS.get(given.get("preset") or "", {})
    values |= {name: given[name] for name in FIELDS if name in given}
    if "override" in given:
        values["overrides"] = {**values.get("overrides", {}), **dict(given["override"])}
    return values


def field_descriptions() -> dict[str, str]:
    """What the docstring of NMConfig says about each field."""
    arguments = (NMConfig.__doc__ or "").partition("Args:")[2].partition("Raises:")[0]
    parts = re.split(r"^ {8}(\w+): ", arguments, flags=re.MULTILINE)[1:]
    described = {name: " ".join(text.split()).rstrip(".") for name, text in zip(parts[::2], parts[1::2], strict=True)}
    return {name: described.get(name, "") for name in FIELDS}


def _read_file(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return NMConfig.from_pretrained(path).to_dict()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NMError(f"configuration file {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise NMError(f"configuration file {path} is not valid JSON ({error}).") from None
    if not isinstance(values, dict):
        raise NMError(f"configuration file {path} holds no JSON object; fields of NMConfig are needed.")
    return values


def _reader(name: str) -> Callable[[str], Any]:
    """How the text of an option becomes the value of a field, by the field's annotation."""
    kinds = [kind.strip() for kind in str(FIELDS[name].type).split("|")]

    def read(text: str) -> Any:
        if "None" in kinds and text.lower() == "none":
            return None
        for kind in (int, float, str):
            if kind.__name__ in kinds:
                try:
                    return kind(text)
                except ValueError:
                    continue
        try:
            return json.loads(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not {' or '.join(kinds)}") from None

    return read


def _override(text: str) -> tuple[str, dict[str, Any]]:
    pattern, separator, settings = text.partition("=")
    try:
        if not (pattern and separator):
            raise ValueError
        if settings.startswith("{"):
            return pattern, json.loads(settings)
        pairs = [setting.partition(":") for setting in settings.split(",")]
        if not all(name in definitions.LAYER_FIELDS and value for name, _, value in pairs):
            raise ValueError
        return pattern, {name: _reader(name)(value) for name, _, value in pairs}
    except ValueError:
        fields = ", ".join(definitions.LAYER_FIELDS)
        raise ArgumentTypeError(f"{text!r} is not PATTERN=FIELD:VALUE,… with fields {fields}") from None


def _metavar(name: str) -> str:
    if name in CHOICES:
        return "{" + ",".join(_as_typed(choice) for choice in CHOICES[name]) + "}"
    return name.rpartition("_")[2].upper()


def _as_typed(value: Any) -> str:
    """A value as one would type it on the command line."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "nothing"
    return "none" if value is None else str(value)
