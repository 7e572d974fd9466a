"""`optimum-cli nm sparsify`."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser

from optimum.commands.base import CommandInfo

from .command import Command, Outcome, check_device, split_gguf
from .config_options import add_config_options, read_config


class SparsifyCommand(Command):
    COMMAND = CommandInfo("sparsify", help="make a packed N:M sparse checkpoint of a Hugging Face model")

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--model",
            required=True,
            default=SUPPRESS,
            help="dense causal language model: a folder, a name on the Hugging Face Hub, or a .gguf file",
        )
        parser.add_argument("--output", required=True, default=SUPPRESS, help="checkpoint folder to create")
        parser.add_argument(
            "--calibration",
            default="wikitext2",
            help="text to calibrate on: a text file, a .jsonl file with a text field, or the dataset wikitext2 or c4",
        )
        parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it is a model's")
        parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, …")
        parser.add_argument(
            "--dtype",
            choices=("float32", "float16", "bfloat16"),
            help="to load the model in and to save what is not packed; by default the checkpoint's own",
        )
        parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
        add_config_options(parser)

    def outcome(self) -> Outcome:
        config = read_config(self.args)

        from ..optimizer import NMOptimizer

        check_device(self.args.device)
        name, location = split_gguf(self.args.model)
        optimizer = NMOptimizer.from_pretrained(
            name, dtype=self.args.dtype, trust_remote_code=self.args.trust_remote_code, **location
        )
        summary = optimizer.optimize(
            self.args.output,
            config,
            self.args.calibration,
            overwrite=self.args.overwrite,
            device=self.args.device,
        )
        written = f"Written to {self.args.output} in {summary.seconds:.0f} s."
        data = {"output": self.args.output, "seconds": summary.seconds, **summary.to_dict()}
        return Outcome(f"{summary}\n{written}", data)
