"""`optimum-cli nm export`."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser

from optimum.commands.base import CommandInfo

from .command import Command, Outcome


class ExportCommand(Command):
    COMMAND = CommandInfo("export", help="write model.onnx, whose weights are those of the packed checkpoint")

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument("--model", required=True, default=SUPPRESS, help="folder of a packed checkpoint")
        parser.add_argument(
            "--output",
            help="folder to write to, which then holds the weights too; by default the checkpoint's own, where "
            "model.onnx points into model.safetensors and no weight is stored twice",
        )
        parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it is a model's")
        parser.add_argument(
            "--graph",
            choices=("auto", "fused", "traced"),
            default="auto",
            help="fused: constructed, the fastest, for common decoder models; traced: by optimum's exporter, any task; "
            "auto: the first that there is",
        )
        parser.add_argument(
            "--runtime",
            choices=("onnxruntime", "genai"),
            default="onnxruntime",
            help="genai: the folder runs in onnxruntime-genai as it is, and the graph gives the logits after the last "
            "token only",
        )
        parser.add_argument("--task", default="text-generation-with-past", help="task of optimum's exporter")
        parser.add_argument(
            "--accuracy-level",
            type=int,
            choices=(0, 4),
            help="0: activations stay float32; 4: they may be rounded to int8 per row and block",
        )
        parser.add_argument(
            "--no-fallback",
            action="store_true",
            help="leave out the function by which an ONNX Runtime without the library runs the model",
        )

    def outcome(self) -> Outcome:
        from ..onnx.export import export_checkpoint

        args = self.args
        path = export_checkpoint(
            args.model,
            output=args.output,
            task=args.task,
            graph=args.graph,
            runtime=args.runtime,
            accuracy_level=args.accuracy_level,
            fallback=not args.no_fallback,
            overwrite=args.overwrite,
        )
        text = f"Written to {path}."
        if args.runtime == "genai":
            text += f"\nonnxruntime-genai runs {path.parent} as it is: onnxruntime_genai.Model({str(path.parent)!r})."
        return Outcome(text, {"onnx": str(path)})
