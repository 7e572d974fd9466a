"""`optimum-cli nm benchmark`."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser

from optimum.commands.base import CommandInfo

from .command import Command, Outcome, split_gguf


class BenchmarkCommand(Command):
    COMMAND = CommandInfo("benchmark", help="speed, memory and size beside ONNX Runtime's dense float32, int8 and int4")

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument("--model", nargs="+", required=True, default=SUPPRESS, help="folder of a packed checkpoint")

    def outcome(self) -> Outcome:
        raise NotImplementedError
