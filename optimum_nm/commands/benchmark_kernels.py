"""`optimum-cli nm benchmark kernels`."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

from optimum.commands.base import CommandInfo

from .command import Command, Outcome, positive


class BenchmarkKernelsCommand(Command):
    COMMAND = CommandInfo(
        "kernels", help="time of one matrix product by every kernel, beside ONNX Runtime's dense ones"
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        size = parser.add_mutually_exclusive_group()
        size.add_argument(
            "--shapes",
            nargs="+",
            type=_shape,
            metavar="KxN",
            help="input by output features of the weights; by default five from 576x1536 to 14336x4096",
        )
        size.add_argument("--quick", action="store_true", help="4096x4096 alone")
        parser.add_argument("--rows", nargs="+", type=positive, default=[1, 16, 128], help="of activations")
        parser.add_argument(
            "--threads", nargs="+", type=positive, help="by default 1, and as many as there are processor cores"
        )
        parser.add_argument(
            "--kernels", nargs="+", metavar="NAME", default=["*"], help="shell wildcards of the names in the table"
        )
        parser.add_argument("--pattern", default="8:16", metavar="N:M", help="of the sparse weights (default: 8:16)")
        parser.add_argument("--rounds", type=positive, default=5, help="measurements of each figure")
        parser.add_argument("--plot", metavar="FILE.png", help="write latency, bandwidth and size as a picture")

    def outcome(self) -> Outcome:
        from ..evaluate.kernel_benchmark import QUICK_SHAPES, SHAPES, benchmark_kernels
        from ..evaluate.kernel_plot import check_plot_file, plot
        from ..patterns import NMPattern

        args = self.args
        picture = None if args.plot is None else check_plot_file(Path(args.plot))
        result = benchmark_kernels(
            shapes=QUICK_SHAPES if args.quick else args.shapes or SHAPES,
            rows=sorted(set(args.rows)),
            threads=args.threads,
            names=args.kernels,
            pattern=NMPattern.parse(args.pattern),
            rounds=args.rounds,
        )
        if picture is not None:
            plot(result, picture)
        return Outcome(str(result), result.to_dict())


def _shape(text: str) -> tuple[int, int]:
    """`"4096x14336"` as (K, N)."""
    try:
        in_features, out_features = map(int, text.lower().split("x"))
    except ValueError:
        in_features = out_features = 0
    if min(in_features, out_features) < 1:
        raise ArgumentTypeError(f"{text!r} is not of the form 4096x14336, input by output features")
    return in_features, out_features
