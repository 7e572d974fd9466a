"""`optimum-cli nm convert-onnx`."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser

from optimum.commands.base import CommandInfo

from .command import Command, Outcome
from .config_options import add_field_option, field_descriptions

STORAGE_FIELDS = ("pattern", "weight_dtype", "group_size", "positions")


class ConvertOnnxCommand(Command):
    COMMAND = CommandInfo("convert-onnx", help="pack the N:M sparse MatMul and Gemm weights of any ONNX file")

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--model",
            required=True,
            default=SUPPRESS,
            help="ONNX file whose pruned weights are zero, with its external data beside it if it has any",
        )
        parser.add_argument(
            "--output",
            required=True,
            default=SUPPRESS,
            help="ONNX file to write; its weights go to one file beside it, called as it with .data behind",
        )
        described = field_descriptions()
        described["pattern"] = (
            "N:M that every packed weight has: of every M consecutive inputs at most N are not zero; M in 4, 8, 16, "
            "32; N = M packs any weight"
        )
        for name in STORAGE_FIELDS:
            add_field_option(parser, name, described[name])
        parser.add_argument(
            "--exclude",
            nargs="*",
            default=SUPPRESS,
            metavar="WILDCARD",
            help="shell wildcards of the weights left as they are, by the name of their module, tensor or node, as "
            "lm_head or '*.mlp.*' (default: nothing)",
        )
        parser.add_argument(
            "--skip-dense",
            action="store_true",
            help="leave the weights that do not satisfy the pattern as they are, and list them; without it one such "
            "weight is an error",
        )
        parser.add_argument(
            "--accuracy-level",
            type=int,
            choices=(0, 4),
            help="0: activations stay float32; 4: they may be rounded to int8 per row and block; by default 4 where "
            "the stored values are integers and 0 elsewhere",
        )
        parser.add_argument(
            "--no-fallback",
            action="store_true",
            help="leave out the function by which an ONNX Runtime without the library runs the model; it needs opset "
            "13, for float16 weights 15",
        )
        parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")

    def outcome(self) -> Outcome:
        from ..onnx.convert import convert_onnx

        args = self.args
        storage = {name: value for name, value in vars(args).items() if name in STORAGE_FIELDS}
        summary = convert_onnx(
            args.model,
            args.output,
            **storage,
            accuracy_level=args.accuracy_level,
            exclude=getattr(args, "exclude", ()),
            skip_dense=args.skip_dense,
            fallback=not args.no_fallback,
            overwrite=args.overwrite,
        )
        return Outcome(f"{summary}\nWritten to {args.output}.", {"output": args.output, **summary.to_dict()})
