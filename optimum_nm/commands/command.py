"""What all commands share: how they run, what they print and how they fail."""

from __future__ import annotations

import json
import math
import signal
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand

from ..errors import NMError
from ..launch import launched_processes


@dataclass(frozen=True)
class Outcome:
    """What a command has to say: `text` for people, `data` for machines. Not `ok` makes the exit status 1."""

    text: str
    data: dict[str, Any]
    ok: bool = True


class Command(BaseOptimumCLICommand):
    """A command whose result alone goes to standard output; progress, warnings and errors go to standard error.

    A child gives COMMAND, `add_options` and `outcome`. The exit status is 0, 1 after an NMError (one line on standard
    error) or an outcome that is not ok, and 2 for wrong usage.

    Attributes:
        TOGETHER: whether processes that a launcher starts work together; `outcome` is None for all but one.
    """

    TOGETHER = False

    @classmethod
    def parse_args(cls, parser: ArgumentParser) -> None:
        parser.formatter_class = ArgumentDefaultsHelpFormatter
        parser.description = cls.COMMAND.help
        cls.add_options(parser)
        parser.add_argument(
            "--json", action="store_true", help="print one JSON object on standard output and nothing else"
        )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        raise NotImplementedError

    def outcome(self) -> Outcome | None:
        raise NotImplementedError

    def run(self) -> None:
        try:
            if launched_processes() > 1 and not self.TOGETHER:
                raise NMError(f"`{self.COMMAND.name}` runs in one process, and {launched_processes()} were started.")
            with redirect_stdout(sys.stderr):  # libraries print, and what is printed here is for programs to read
                outcome = self.outcome()
        except NMError as error:
            if launched_processes() > 1:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or the launcher would change the exit status
            sys.exit(1 if error.reported else f"{self.parser.prog}: error: {' '.join(str(error).split())}")
        if outcome is None:
            return
        print(json.dumps(_without_nan(outcome.data), indent=2) if self.args.json else outcome.text)
        if not outcome.ok:
            sys.exit(1)


def positive(text: str) -> int:
    """An option's whole number above 0."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def split_gguf(model: str) -> tuple[str, dict[str, str]]:
    """A model name as users write it, and what `from_pretrained` needs besides: a .gguf file is named in its folder."""
    path = Path(model)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" and path.is_file() else (model, {})


def check_device(name: str) -> None:
    """Raise NMError unless torch can compute on the device."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise NMError(f"device {name!r} is not one that torch can use here; 'cpu' always is.") from None


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity; null stands for them."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
