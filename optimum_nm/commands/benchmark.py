"""`optimum-cli nm benchmark`."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

from optimum.commands.base import CommandInfo

from ..evaluate.dense_variants import VARIANTS
from .benchmark_kernels import BenchmarkKernelsCommand
from .command import Command, Outcome, positive, split_gguf


class BenchmarkCommand(Command):
    COMMAND = CommandInfo("benchmark", help="speed, memory and size beside ONNX Runtime's dense float32, int8 and int4")
    SUBCOMMANDS = (replace(BenchmarkKernelsCommand.COMMAND, subcommand_class=BenchmarkKernelsCommand),)

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--model",
            nargs="+",
            help="folders of packed checkpoints, each with its model.onnx; needed unless `kernels` follows, which "
            "measures single matrix products instead",
        )
        parser.add_argument(
            "--reference",
            metavar="MODEL",
            help="dense model, exported and quantized once, to measure beside: a folder, a name on the Hugging Face "
            "Hub, or a .gguf file",
        )
        parser.add_argument(
            "--dense",
            nargs="+",
            choices=VARIANTS,
            default=VARIANTS,
            help="what to make of the reference: int8-dynamic is ONNX Runtime's dynamic quantization; int8 and int4 "
            "are MatMulNBits with blocks of 128 and 32 and accuracy level 4",
        )
        parser.add_argument("--threads", type=positive, help="of ONNX Runtime; by default its own choice")
        parser.add_argument("--prompt-tokens", type=positive, default=256, help="read before the first new token")
        parser.add_argument("--new-tokens", type=positive, default=64, help="decoded one by one")
        parser.add_argument("--rounds", type=positive, default=5, help="measurements of each model")
        parser.add_argument(
            "--profile",
            action="store_true",
            help="where the time goes, in place of speed and memory: milliseconds by operator type, for one token and "
            "for the prompt",
        )
        parser.add_argument("--work", default=_work_folder(), help="folder that keeps the dense variants for next time")

    def outcome(self) -> Outcome:
        from ..evaluate.benchmark import benchmark
        from ..evaluate.dense_variants import dense_variants
        from ..evaluate.operator_profile import profile

        args = self.args
        if args.model is None:
            self.parser.error("the following arguments are required: --model")
        dense = {}
        if args.reference is not None:
            name, location = split_gguf(args.reference)
            dense = dense_variants(name, location, list(args.dense), Path(args.work).expanduser())
        measure = profile if args.profile else benchmark
        result = measure(
            [Path(folder) for folder in args.model],
            dense,
            threads=args.threads,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            rounds=args.rounds,
        )
        return Outcome(str(result), result.to_dict())


def _work_folder() -> str:
    cache = os.environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    return os.path.join(cache, "optimum-nm", "benchmark")
