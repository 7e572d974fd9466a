"""`optimum-cli nm sparsify`."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser

from optimum.commands.base import CommandInfo

from ..errors import Interrupted
from .calibration_option import add_calibration_option, read_calibration
from .command import Command, Outcome, check_device, split_gguf
from .config_options import add_config_options, read_config


class SparsifyCommand(Command):
    TOGETHER = True
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
        add_calibration_option(parser)
        parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it is a model's")
        parser.add_argument(
            "--restart", action="store_true", help="begin anew instead of going on with a run that ended early"
        )
        parser.add_argument(
            "--memory-budget",
            metavar="SIZE",
            help="what hidden states may take in memory, as 4GB; if they take more, they live on the disk",
        )
        parser.add_argument(
            "--device",
            default="cpu",
            help="where to compute: cpu, cuda (of several processes, each its own GPU), cuda:1, …, or auto, a GPU if "
            "there is one",
        )
        parser.add_argument(
            "--dtype",
            choices=("float32", "float16", "bfloat16"),
            help="to load the model in and to save what is not packed; by default the checkpoint's own",
        )
        parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
        add_config_options(parser)

    def outcome(self) -> Outcome | None:
        from ..sparsify.together import together

        with together():
            return self._outcome()

    def _outcome(self) -> Outcome | None:
        config = read_config(self.args)

        from ..optimizer import NMOptimizer
        from ..sparsify.ranks import rank
        from ..sparsify.together import own_device

        device = own_device(self.args.device)
        check_device(device)
        name, location = split_gguf(self.args.model)
        optimizer = NMOptimizer.from_pretrained(
            name, dtype=self.args.dtype, trust_remote_code=self.args.trust_remote_code, **location
        )
        try:
            summary = optimizer.optimize(
                self.args.output,
                config,
                read_calibration(self.args.calibration),
                overwrite=self.args.overwrite,
                restart=self.args.restart,
                memory_budget=self.args.memory_budget,
                device=device,
            )
        except KeyboardInterrupt as interrupt:
            raise Interrupted(str(interrupt)) from None
        if rank() > 0:
            return None
        memory = f"{summary.peak_bytes / 1e9:.1f} GB of memory at most"
        written = f"Written to {self.args.output} in {summary.seconds:.0f} s, with {memory}."
        measured = {"seconds": summary.seconds, "peak_bytes": summary.peak_bytes}
        data = {"output": self.args.output, **measured, **summary.to_dict()}
        return Outcome(f"{summary}\n{written}", data)
