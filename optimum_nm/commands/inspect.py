"""`optimum-cli nm inspect`."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser

from optimum.commands.base import CommandInfo

from .command import Command, Outcome


class InspectCommand(Command):
    COMMAND = CommandInfo("inspect", help="what a packed checkpoint holds, tensor by tensor, and what it takes")

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument("--model", required=True, default=SUPPRESS, help="folder of a packed checkpoint")
        parser.add_argument(
            "--plot",
            metavar="FILE.png",
            help="also draw the weights by magnitude and their bits by layer type (extra [report])",
        )

    def outcome(self) -> Outcome:
        from ..evaluate.inspect import inspect_checkpoint

        inspection = inspect_checkpoint(self.args.model)
        data = inspection.to_dict()
        text = str(inspection)
        if self.args.plot is not None:
            from ..evaluate.histogram import plot_checkpoint

            plot_checkpoint(self.args.model, self.args.plot)
            data["plot"] = self.args.plot
            text += f"\nPlot written to {self.args.plot}."
        return Outcome(text, data)
