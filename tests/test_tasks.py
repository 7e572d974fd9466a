"""Tasks of lm-eval from local files, in torch and in ONNX Runtime, against log-likelihoods computed here."""

import importlib.util
import json
import sys

import pytest
import torch
from packed_models import packed_checkpoint
from transformers import AutoTokenizer

from optimum_nm import NMConfig, NMModelForCausalLM, NMOptimizer
from optimum_nm import __main__ as program
from optimum_nm.errors import NMError
from optimum_nm.evaluate.tasks import evaluate_tasks, format_tasks
from optimum_nm.onnx.export import export_checkpoint

ENDINGS = ["bright city", "old stone", "letters to winter"]
QUESTIONS = [
    {"question": f"the {first} of {second} runs under", "answer": number % 3}
    for number, (first, second) in enumerate((a, b) for a in ("river", "city", "birds") for b in ("stone", "winter"))
]
CHOICE = """task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: {endings}
doc_to_target: answer
"""
GENERATION = """task: continued
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 4, until: ["."]}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    for name, text in (("endings", CHOICE), ("continued", GENERATION)):
        (folder / f"{name}.yaml").write_text(text.format(data=json.dumps(str(data)), endings=json.dumps(ENDINGS)))
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_llama_folder, text):
    folder = tmp_path_factory.mktemp("packed") / "out"
    config = NMConfig(calibration_samples=2, calibration_length=32)
    NMOptimizer.from_pretrained(tiny_llama_folder).optimize(folder, config, [text], progress=False)
    export_checkpoint(folder, graph="traced", accuracy_level=0)
    return folder


def right_answers(folder, tokenizer):
    """The share of questions whose right ending is the most likely of all."""
    model = NMModelForCausalLM.from_pretrained(folder).eval()

    def likelihood(question, ending):
        read = tokenizer(question)["input_ids"]
        tokens = tokenizer(f"{question} {ending}")["input_ids"]
        with torch.no_grad():
            predicted = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        return sum(predicted[i - 1, tokens[i]].item() for i in range(len(read), len(tokens)))

    chosen = [max(range(3), key=lambda i: likelihood(asked["question"], ENDINGS[i])) for asked in QUESTIONS]
    return sum(choice == asked["answer"] for choice, asked in zip(chosen, QUESTIONS, strict=True)) / len(QUESTIONS)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_chooses_as_the_model_does(exported, task_folder, tokenizer, runtime):
    results = evaluate_tasks(str(exported), ["endings"], task_folder, runtime=runtime, batch_size=2)
    found = {result.metric: result for result in results}
    assert found["acc"].value == pytest.approx(right_answers(exported, tokenizer))
    assert found["acc"].samples == len(QUESTIONS) and found["acc"].error > 0
    assert found["acc"].runtime == runtime and "endings" in format_tasks(results)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_generates(exported, task_folder, runtime):
    (result,) = evaluate_tasks(str(exported), ["continued"], task_folder, runtime=runtime, limit=2)
    assert (result.task, result.metric, result.samples) == ("continued", "exact_match", 2)


def test_graph_of_the_last_token_only_is_refused(exported, task_folder, tmp_path):
    packed_checkpoint(tmp_path, vocab_size=300)
    AutoTokenizer.from_pretrained(exported).save_pretrained(tmp_path)
    export_checkpoint(tmp_path, graph="fused", runtime="genai")
    with pytest.raises(NMError, match="logits of the last token only; export it with --runtime onnxruntime"):
        evaluate_tasks(str(tmp_path), ["endings"], task_folder, runtime="onnxruntime")


@pytest.mark.parametrize(
    "tasks,include_path,options,message",
    [
        (["beginnings"], "{tasks}", {}, r"task 'beginnings' is not one of .* and lm-eval"),
        (["endings"], "{tasks}/none", {}, "none is no folder; one with the YAML files"),
        (["endings"], "{tasks}", {"runtime": "onnxruntime"}, r"model.onnx does not exist; `optimum-cli nm export`"),
    ],
)
def test_refuses(tiny_llama_folder, task_folder, tmp_path, monkeypatch, tasks, include_path, options, message):
    monkeypatch.setattr(
        "lm_eval.tasks.manager.__file__", str(tmp_path / "manager.py")
    )  # its own tasks are a lot to read
    with pytest.raises(NMError, match=message):
        evaluate_tasks(str(tiny_llama_folder), tasks, include_path.format(tasks=task_folder), **options)


def test_task_that_fails_is_named(tiny_llama_folder, task_folder, tmp_path):
    (tmp_path / "broken.yaml").write_text(
        CHOICE.format(data=tmp_path / "none.jsonl", endings=json.dumps(ENDINGS)).replace("endings", "broken", 1)
    )
    with pytest.raises(NMError, match=r"lm-eval cannot run broken on .*: Unable to find") as refusal:
        evaluate_tasks(str(tiny_llama_folder), ["broken"], tmp_path)
    assert "\n" not in str(refusal.value)


def test_says_which_extra_is_missing(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    with pytest.raises(NMError, match=r"lm-eval is not installed; `pip install optimum-nm\[tasks\]` brings it"):
        evaluate_tasks("model", ["endings"])


def test_command(exported, tiny_llama_folder, task_folder, monkeypatch, capsys):
    arguments = ["--model", exported, "--reference", tiny_llama_folder, "--tasks", "endings"]
    arguments += ["--include-path", task_folder, "--limit", 3, "--runtime", "onnxruntime", "--json"]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "evaluate", *map(str, arguments)])
    program.main()
    outcome = json.loads(capsys.readouterr().out)
    runtimes = {label: {result["runtime"] for result in results} for label, results in outcome.items()}
    assert runtimes == {"model": {"onnxruntime"}, "reference": {"torch"}}
    assert all(result["samples"] == 3 for results in outcome.values() for result in results)
