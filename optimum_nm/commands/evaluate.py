"""`optimum-cli nm evaluate`."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser

from optimum.commands.base import CommandInfo

from .command import Command, Outcome, check_device, positive, split_gguf


class EvaluateCommand(Command):
    COMMAND = CommandInfo("evaluate", help="perplexity of a packed, dense or exported model on a text")

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--model",
            required=True,
            default=SUPPRESS,
            help="packed checkpoint or dense model: a folder, a name on the Hugging Face Hub, or a .gguf file; with "
            "--runtime onnxruntime a folder that holds model.onnx",
        )
        parser.add_argument("--reference", metavar="MODEL", help="dense model to show beside it, always run in torch")
        parser.add_argument(
            "--text",
            default="wikitext2",
            help="text to predict: a text file, a .jsonl file with a text field, or the test split of wikitext2 or c4",
        )
        parser.add_argument("--window", type=positive, default=1024, help="tokens the model reads at once")
        parser.add_argument(
            "--stride",
            type=positive,
            help="tokens from one window to the next; less than the window gives every token more context and takes "
            "longer; by default the window",
        )
        parser.add_argument("--tokens", type=positive, help="read only so many tokens of the text; by default all")
        parser.add_argument("--runtime", choices=("torch", "onnxruntime"), default="torch", help="what runs the model")
        parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, …")
        parser.add_argument(
            "--dtype",
            choices=("float32", "float16", "bfloat16"),
            default="float32",
            help="type of the activations and dense weights in torch",
        )

    def outcome(self) -> Outcome:
        from ..calibration.sources import read_documents
        from ..evaluate.perplexity import evaluate_onnx, evaluate_torch, format_perplexities

        args = self.args
        documents = read_documents(args.text, "evaluation")
        protocol = {"window": args.window, "stride": args.stride, "limit": args.tokens}
        check_device(args.device)
        results = []
        for label, model in (("model", args.model), ("reference", args.reference)):
            if model is None:
                continue
            if label == "model" and args.runtime == "onnxruntime":
                results.append(evaluate_onnx(model, documents, device=args.device, **protocol))
            else:
                name, location = split_gguf(model)
                options = {"device": args.device, "dtype": args.dtype, **protocol}
                results.append(evaluate_torch(name, documents, load_options=location, **options))
        data = {label: result.to_dict() for label, result in zip(("model", "reference"), results, strict=False)}
        return Outcome(format_perplexities(results), data)
