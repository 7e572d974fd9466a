"""`optimum-cli nm evaluate`."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterator

from optimum.commands.base import CommandInfo

from .command import Command, Outcome, check_device, positive, split_gguf


class EvaluateCommand(Command):
    COMMAND = CommandInfo("evaluate", help="perplexity on a text, or tasks of lm-eval, of any model")

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

        tasks = parser.add_argument_group("tasks", "of lm-eval (extra [tasks]), instead of perplexity")
        tasks.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks, groups or tags to run")
        tasks.add_argument(
            "--include-path", metavar="DIR", help="folder with the YAML files of further tasks, as of lm-eval"
        )
        tasks.add_argument("--num-fewshot", type=int, help="examples before each question; by default the task's own")
        tasks.add_argument("--limit", type=positive, help="only so many questions of each task; by default all")
        tasks.add_argument("--batch-size", type=positive, default=1, help="questions read at once")

    def outcome(self) -> Outcome:
        check_device(self.args.device)
        return self._tasks() if self.args.tasks else self._perplexities()

    def _models(self) -> Iterator[tuple[str, str, str]]:
        """(label, model, runtime); a reference is run in torch."""
        yield "model", self.args.model, self.args.runtime
        if self.args.reference is not None:
            yield "reference", self.args.reference, "torch"

    def _perplexities(self) -> Outcome:
        from ..calibration.sources import read_documents
        from ..evaluate.perplexity import evaluate_onnx, evaluate_torch, format_perplexities

        args = self.args
        documents = read_documents(args.text, "evaluation")
        protocol = {"window": args.window, "stride": args.stride, "limit": args.tokens}
        results = {}
        for label, model, runtime in self._models():
            if runtime == "onnxruntime":
                results[label] = evaluate_onnx(model, documents, device=args.device, **protocol)
            else:
                name, location = split_gguf(model)
                options = {"device": args.device, "dtype": args.dtype, **protocol}
                results[label] = evaluate_torch(name, documents, load_options=location, **options)
        data = {label: result.to_dict() for label, result in results.items()}
        return Outcome(format_perplexities(list(results.values())), data)

    def _tasks(self) -> Outcome:
        from ..evaluate.tasks import evaluate_tasks, format_tasks

        args = self.args
        options = {name: getattr(args, name) for name in ("num_fewshot", "limit", "batch_size", "device", "dtype")}
        results = {}
        for label, model, runtime in self._models():
            name, location = split_gguf(model)
            options |= {"runtime": runtime, "load_options": location}
            results[label] = evaluate_tasks(name, args.tasks, args.include_path, **options)
        data = {label: [result.to_dict() for result in found] for label, found in results.items()}
        return Outcome(format_tasks([result for found in results.values() for result in found]), data)
