"""`optimum-cli nm`: imported whenever optimum-cli starts, so every command imports what is heavy when it runs."""

from __future__ import annotations

import sys
from dataclasses import replace

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .benchmark import BenchmarkCommand
from .convert_onnx import ConvertOnnxCommand
from .evaluate import EvaluateCommand
from .export import ExportCommand
from .inspect import InspectCommand
from .report import ReportCommand
from .sparsify import SparsifyCommand
from .verify import VerifyCommand

COMMANDS = (
    SparsifyCommand,
    ExportCommand,
    ConvertOnnxCommand,
    EvaluateCommand,
    InspectCommand,
    VerifyCommand,
    BenchmarkCommand,
    ReportCommand,
)


class NMCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(
        name="nm", help="N:M sparse models: sparsify, export, evaluate, inspect, verify, benchmark, report"
    )
    SUBCOMMANDS = tuple(replace(command.COMMAND, subcommand_class=command) for command in COMMANDS)

    def run(self) -> None:
        self.parser.print_help(sys.stderr)
        sys.exit(2)
