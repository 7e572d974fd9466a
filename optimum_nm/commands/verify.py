"""`optimum-cli nm verify`."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser

from optimum.commands.base import CommandInfo

from .command import Command, Outcome


class VerifyCommand(Command):
    COMMAND = CommandInfo("verify", help="check every byte of a packed checkpoint and of the model.onnx beside it")

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument("--model", required=True, default=SUPPRESS, help="folder of a packed checkpoint")
        parser.add_argument(
            "--finetuned",
            metavar="FOLDER",
            help="dense model that was fine-tuned from it, to check that it is zero wherever the checkpoint leaves a "
            "weight out",
        )

    def outcome(self) -> Outcome:
        from ..evaluate.verify import verify_checkpoint

        verification = verify_checkpoint(self.args.model, self.args.finetuned)
        return Outcome(str(verification), verification.to_dict(), ok=not verification.problems)
