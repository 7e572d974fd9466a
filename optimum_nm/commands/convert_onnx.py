"""`optimum-cli nm convert-onnx`."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser

from optimum.commands.base import CommandInfo

from ..config import WEIGHT_DTYPES
from .command import Command, Outcome


class ConvertOnnxCommand(Command):
    COMMAND = CommandInfo("convert-onnx", help="pack the N:M sparse MatMul and Gemm weights of an ONNX file")

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--model", required=True, default=SUPPRESS, help="ONNX file with zero-filled sparse weights"
        )
        parser.add_argument("--output", required=True, default=SUPPRESS, help="ONNX file to write")
        parser.add_argument("--pattern", default="8:16", help="N:M that every packed weight must have")
        parser.add_argument("--weight-dtype", choices=WEIGHT_DTYPES, default="float16", help="type of stored values")

    def outcome(self) -> Outcome:

        raise NotImplementedError
