"""`optimum-cli nm report`."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser
from pathlib import Path

from optimum.commands.base import CommandInfo

from .calibration_option import add_calibration_option, read_calibration
from .command import Command, Outcome, check_device, positive, split_gguf
from .config_options import add_config_options, given_fields


class ReportCommand(Command):
    COMMAND = CommandInfo("report", help="size and perplexity of many configurations of one model, resumably")

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--model",
            required=True,
            default=SUPPRESS,
            help="dense causal language model: a folder, a name on the Hugging Face Hub, or a .gguf file",
        )
        parser.add_argument(
            "--output",
            required=True,
            default=SUPPRESS,
            help="folder of the report; what it holds of an earlier run is not measured again",
        )
        add_calibration_option(parser)
        parser.add_argument(
            "--text",
            default="wikitext2",
            help="held-out text to predict: a text file, a .jsonl file with a text field, or wikitext2 or c4, of which "
            "the test split is read",
        )
        parser.add_argument(
            "--matrix",
            metavar="FILE",
            help="JSON or YAML file of configurations, {name: {field of NMConfig: value}}; by default the tables of "
            "the paper and this package's own",
        )
        parser.add_argument(
            "--only",
            nargs="+",
            metavar="PATTERN",
            help="shell wildcards of the names of configurations or tables; by default all",
        )
        parser.add_argument("--list", action="store_true", help="print the names of the configurations and end")
        parser.add_argument("--keep", action="store_true", help="leave the packed models in the folder")
        parser.add_argument("--window", type=positive, default=1024, help="tokens the model reads at once")
        parser.add_argument("--stride", type=positive, help="tokens from one window to the next; by default the window")
        parser.add_argument("--tokens", type=positive, help="read only so many tokens of the text; by default all")
        parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, …")
        parser.add_argument(
            "--dtype",
            choices=("float32", "float16", "bfloat16"),
            help="to load the model in and to save what is not packed; by default the checkpoint's own",
        )
        parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
        add_config_options(parser)

    def outcome(self) -> Outcome:
        from ..report.matrix import default_matrix, read_matrix

        args = self.args
        base = given_fields(args)
        matrix = default_matrix(base) if args.matrix is None else read_matrix(args.matrix, base)
        if args.list:
            names = [row.name for row in matrix.select(args.only)]
            return Outcome("\n".join(names), {"configurations": names})

        from ..evaluate.pictures import require_matplotlib
        from ..report.document import report_data, report_text, write_report
        from ..report.pareto import pareto_front, points
        from ..report.runner import run_report

        require_matplotlib()
        check_device(args.device)
        model, location = split_gguf(args.model)
        report = run_report(
            model,
            matrix,
            args.output,
            calibration=read_calibration(args.calibration),
            text=args.text,
            only=args.only,
            keep=args.keep,
            window=args.window,
            stride=args.stride,
            tokens=args.tokens,
            device=args.device,
            dtype=args.dtype,
            load_options={**location, **({"trust_remote_code": True} if args.trust_remote_code else {})},
        )
        write_report(report, Path(args.output).expanduser())
        front = pareto_front(points(report))
        written = f"Written to {args.output}/report.md, report.json, pareto.png and errors/."
        return Outcome(f"{report_text(report, front)}\n{written}", report_data(report, front), ok=not report.failures)
