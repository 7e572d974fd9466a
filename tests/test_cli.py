"""`optimum-cli nm`: what each command prints, its exit status, and how it refuses what it cannot use."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optimum_nm import __main__ as program
from optimum_nm import optimizer
from optimum_nm.calibration.mixing import read_windows
from optimum_nm.commands import COMMANDS

QUICK = ["--calibration-samples", "2", "--calibration-length", "32"]


@pytest.fixture(scope="module")
def articles(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "articles.txt"
    path.write_text(text)
    return str(path)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Runs a command in this process: (exit status, standard output, lines of the error message)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, arguments)])
        capsys.readouterr()
        status, message = 0, ""
        try:
            program.main()
        except SystemExit as end:
            status, message = (end.code, "") if isinstance(end.code, int) else (1, end.code)
        captured = capsys.readouterr()
        return status, captured.out, (message or captured.err).splitlines()

    return run


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tiny_llama_folder, articles):
    """A packed checkpoint, made by the installed program."""
    folder = tmp_path_factory.mktemp("packed") / "sparse"
    run = installed("sparsify", "--model", tiny_llama_folder, "--output", folder, "--calibration", articles, *QUICK)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, packed):
    folder = tmp_path_factory.mktemp("exported") / "sparse"
    shutil.copytree(packed, folder)
    run = installed("export", "--model", folder, "--json")
    assert run.returncode == 0 and json.loads(run.stdout) == {"onnx": f"{folder}/model.onnx"}
    return folder


@pytest.fixture
def damaged(packed, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(packed, tmp_path / "damaged"))


def installed(*arguments):
    command = [Path(sys.executable).with_name("optimum-cli"), "nm", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def refused(outcome, *words):
    """Exit status 1, nothing on standard output, and one line that says all of `words`."""
    status, output, lines = outcome
    assert status == 1 and output == "" and len(lines) == 1, outcome
    assert ": error: " in lines[0]
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


# --- help and usage


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.COMMAND.name)
def test_help_lists_every_option_with_its_default(cli, command):
    status, output, _ = cli(command.COMMAND.name, "--help")
    assert status == 0
    options = [part for part in output.split("\n  -") if part.startswith("-")]
    assert any(part.startswith("-json") for part in options)
    required = {name for name in ("model", "output") if f"--{name} " in output.partition("options:")[0]}
    for part in options:
        name = part.lstrip("-").split()[0]
        flattened = " ".join(part.split())
        assert "default" in flattened or name in required, flattened


def test_help_of_sparsify_has_every_field_of_the_configuration(cli):
    _, output, _ = cli("sparsify", "--help")
    for option in ("--pattern", "--outliers", "--solver", "--exclude", "--override", "--share-embedding", "--seed"):
        assert f"\n  {option}" in output
    assert "keep N of every M consecutive inputs" in output


def test_without_a_command_help_is_printed_and_the_status_is_that_of_wrong_usage():
    run = installed()
    assert run.returncode == 2 and "sparsify" in run.stderr and run.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["sparsify"],
        ["sparsify", "--model", "a", "--output", "b", "--no-such-option"],
        ["sparsify", "--model", "a", "--output", "b", "--weight-dtype", "int7"],
        ["sparsify", "--model", "a", "--output", "b", "--override", "lm_head"],
        ["sparsify", "--model", "a", "--output", "b", "--override", "lm_head=colour:red"],
        ["evaluate", "--model", "a", "--window", "0"],
        ["export", "--model", "a", "--accuracy-level", "3"],
        ["benchmark", "--model", "a", "--rounds", "many"],
        ["inspect"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_wrong_usage(cli, arguments):
    status, output, lines = cli(*arguments)
    assert status == 2 and output == ""
    assert "error: " in lines[-1]


# --- what works


def test_sparsify_prints_a_table_and_where_the_model_is(cli, tiny_llama_folder, articles, tmp_path):
    arguments = ["--model", tiny_llama_folder, "--output", tmp_path / "out", "--calibration", articles, *QUICK]
    status, output, _ = cli("sparsify", *arguments)
    assert status == 0
    assert output.startswith("layer type") and "mlp.down_proj" in output
    assert output.splitlines()[-1].startswith(f"Written to {tmp_path}/out in ")


def test_sparsify_mixes_sources_by_their_shares(cli, tiny_llama_folder, articles, tmp_path, monkeypatch):
    mixtures = []

    def read(calibration, *rest):
        mixtures.append(calibration)
        return read_windows(calibration, *rest)

    monkeypatch.setattr(optimizer, "read_windows", read)
    arguments = ["--model", tiny_llama_folder, *QUICK]
    odd = tmp_path / "name=1"
    odd.write_text(Path(articles).read_text())
    for number, sources in enumerate((["self"], [articles], ["self=0.5", f"{articles}=0.5"], ["self", odd])):
        status, _, _ = cli("sparsify", *arguments, "--output", tmp_path / str(number), "--calibration", *sources)
        assert status == 0
    assert mixtures == ["self", str(articles), {"self": 0.5, str(articles): 0.5}, {"self": 1, str(odd): 1}]
    tensors = {number: (tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(4)}
    assert len(set(tensors.values())) == 3  # two mixtures are the same


def test_sparsify_json_and_its_options(cli, tiny_llama_folder, articles, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"pattern": "2:4", "weight_dtype": "bfloat16"}))
    arguments = [
        "--model",
        tiny_llama_folder,
        "--output",
        tmp_path / "out",
        "--calibration",
        articles,
        *QUICK,
        "--json",
    ]
    arguments += ["--config", tmp_path / "config.json", "--weight-dtype", "int8", "--group-size", "row"]
    arguments += ["--override", "*.down_proj=pattern:16:16,weight_dtype:int4", "--exclude", "lm_head", "*.k_proj"]
    status, output, _ = cli("sparsify", *arguments)
    assert status == 0
    data = json.loads(output)
    assert data["output"] == f"{tmp_path}/out" and len(data["layers"]) == 2 * 6
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stored["pattern"], stored["weight_dtype"]) == ("2:4", "int8")
    assert stored["overrides"] == {"*.down_proj": {"pattern": "16:16", "weight_dtype": "int4"}}


def test_inspect(cli, packed, tmp_path):
    status, output, _ = cli("inspect", "--model", packed)
    assert status == 0 and "model.layers.0.self_attn.q_proj" in output and "bits per weight: " in output
    status, output, _ = cli("inspect", "--model", packed, "--json", "--plot", tmp_path / "weights.png")
    assert status == 0
    assert json.loads(output)["totals"]["packed_layers"] == 14
    assert (tmp_path / "weights.png").read_bytes()[1:4] == b"PNG"


def test_verify(cli, exported, packed):
    status, output, _ = cli("verify", "--model", exported)
    assert status == 0 and "is sound: 14 packed linears" in output and output.endswith("model.onnx.\n")
    status, output, _ = cli("verify", "--model", packed, "--json")
    data = json.loads(output)
    assert status == 0 and data["ok"] and not data["problems"] and not data["onnx"]


def test_evaluate_in_torch_and_in_onnx_runtime(cli, exported, tiny_llama_folder, articles):
    options = ["--text", articles, "--window", "64", "--tokens", "257", "--json"]
    status, output, _ = cli("evaluate", "--model", exported, "--reference", tiny_llama_folder, *options)
    assert status == 0
    data = json.loads(output)
    assert data["model"]["tokens"] == data["reference"]["tokens"] == 256
    assert data["reference"]["perplexity"] != data["model"]["perplexity"]
    status, output, _ = cli("evaluate", "--model", exported, "--runtime", "onnxruntime", *options)
    assert status == 0
    assert json.loads(output)["model"]["perplexity"] == pytest.approx(data["model"]["perplexity"], rel=1e-4)


def test_benchmark(cli, exported):
    options = ["--rounds", "1", "--prompt-tokens", "4", "--new-tokens", "2", "--threads", "1"]
    status, output, _ = cli("benchmark", "--model", exported, *options, "--json")
    assert status == 0
    data = json.loads(output)
    assert [model["name"] for model in data["models"]] == ["sparse"] and data["settings"]["threads"] == 1


def test_benchmark_profile(cli, exported):
    options = ["--rounds", "1", "--prompt-tokens", "4", "--new-tokens", "2", "--threads", "1"]
    status, output, _ = cli("benchmark", "--model", exported, *options, "--profile")
    assert status == 0 and "MatMulNM *" in output
    status, output, _ = cli("benchmark", "--model", exported, *options, "--profile", "--json")
    (model,) = json.loads(output)["models"]
    assert status == 0 and any(operator["ours"] for operator in model["decode"]["operators"])


def test_export_to_another_folder(cli, packed, tmp_path):
    status, output, _ = cli("export", "--model", packed, "--output", tmp_path / "out")
    assert status == 0 and output == f"Written to {tmp_path}/out/model.onnx.\n"
    assert (tmp_path / "out" / "model.safetensors").exists()
    refused(cli("export", "--model", packed, "--output", tmp_path / "out"), f"output folder {tmp_path}/out exists")
    status, _, _ = cli("export", "--model", packed, "--output", tmp_path / "out", "--overwrite")
    assert status == 0


# --- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pattern", "8:17"], ["8:17"]),
        (["--pattern", "eight of sixteen"], ["'eight of sixteen'", "8:16"]),
        (["--pattern", "9:8"], ["9:8"]),
        (["--outliers", "300:256"], ["300:256"]),
        (["--group-size", "100"], ["group_size is 100", "multiple of 16"]),
        (["--equalization", "2"], ["equalization is 2", "between 0 and 1"]),
        (["--calibration-samples", "0"], ["calibration_samples is 0"]),
        (["--calibration-length", "513"], ["calibration_length is 513", "at most 512 tokens"]),
        (["--target-bits", "1"], ["target_bits is 1", "bits per weight"]),
        (["--exclude", "*.wrong_proj"], ["'*.wrong_proj' matches no linear layer"]),
        (["--override", "*.wrong_proj=pattern:4:8"], ["'*.wrong_proj' matches no linear layer"]),
        (["--override", "*=pattern:9:8"], ["9:8"]),
        (["--exclude", "*"], ["leaves no linear layer"]),
        (["--share-embedding"], ["share"]),
        (["--calibration", "missing.txt"], ["'missing.txt' is neither a file nor one of wikitext2, c4"]),
        (["--calibration", "self=some", "c4=0.5"], ["'self=some' has share 'some'"]),
        (["--calibration", "self=1", "c4=-1"], ["'c4' has share -1.0; it must be a number above 0"]),
        (["--swaps", "-1"], ["swaps is -1"]),
        (["--config", "missing.json"], ["missing.json cannot be read"]),
        (["--device", "abacus"], ["device 'abacus'"]),
        (["--model", "nowhere"], ["nowhere cannot be loaded as a causal language model"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_sparsify_refuses(cli, tiny_llama_folder, articles, tmp_path, options, words):
    arguments = ["--model", tiny_llama_folder, "--output", tmp_path / "out", "--calibration", articles, *QUICK]
    refused(cli("sparsify", *arguments, *options), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"), [("", ["is empty"]), ("   \n", ["is empty"]), ("Too short.", ["tokens; one window", "32"])]
)
def test_sparsify_refuses_calibration_text(cli, tiny_llama_folder, tmp_path, content, words):
    (tmp_path / "short.txt").write_text(content)
    arguments = ["--model", tiny_llama_folder, "--output", tmp_path / "out", "--calibration", tmp_path / "short.txt"]
    refused(cli("sparsify", *arguments, *QUICK), "calibration text", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


@pytest.mark.parametrize("content", ["{", "[1]", '{"colour": "red"}', '{"pattern": 8}', '{"format_version": 2}'])
def test_sparsify_refuses_a_configuration_file(cli, tiny_llama_folder, articles, tmp_path, content):
    (tmp_path / "nm.json").write_text(content)
    arguments = ["--model", tiny_llama_folder, "--output", tmp_path / "out", "--calibration", articles]
    refused(cli("sparsify", *arguments, "--config", tmp_path / "nm.json"))
    assert not (tmp_path / "out").exists()


def test_sparsify_refuses_an_output_folder(cli, tiny_llama_folder, articles, tmp_path):
    arguments = ["--model", tiny_llama_folder, "--calibration", articles, *QUICK]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    refused(cli("sparsify", *arguments, "--output", tmp_path / "thesis"), "thesis exists", "--overwrite")
    refused(cli("sparsify", *arguments, "--output", tmp_path / "thesis", "--overwrite"), "is not a model folder")
    refused(cli("sparsify", *arguments, "--output", tmp_path / "thesis" / "thesis.tex" / "out"), "cannot be written")
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "thesis.tex"]


def test_sparsify_refuses_weights_that_are_not_finite(cli, tiny_llama_folder, articles, tmp_path):
    folder = Path(shutil.copytree(tiny_llama_folder, tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    arguments = ["--model", folder, "--output", tmp_path / "out", "--calibration", articles, *QUICK]
    refused(cli("sparsify", *arguments), "model.layers.1.mlp.up_proj.weight has elements that are not finite")
    assert not (tmp_path / "out").exists()


def test_sparsify_refuses_a_model_of_another_kind(cli, articles, tmp_path):
    transformers.T5Config(d_model=16, num_layers=1).save_pretrained(tmp_path / "t5")
    arguments = ["--model", tmp_path / "t5", "--output", tmp_path / "out", "--calibration", articles]
    refused(cli("sparsify", *arguments), "t5 cannot be loaded as a causal language model")


def test_sparsify_refuses_a_packed_model(cli, packed, articles, tmp_path):
    arguments = ["--model", packed, "--output", tmp_path / "out", "--calibration", articles, *QUICK]
    refused(cli("sparsify", *arguments), "is already quantized; a dense model is needed")


def newer_version(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    return ["format_version is 2", "reads up to 1"]


def no_config(folder):
    (folder / "config.json").unlink()
    return ["config.json"]


def dense_config(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return ["not a packed checkpoint"]


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return ["model.safetensors"]


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return ["truncated"]


def missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.positions"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return ["model.layers.0.mlp.up_proj.positions", "missing"]


def wrong_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.values"
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return [name, "the configuration asks for"]


DAMAGES = [newer_version, no_config, dense_config, no_weights, truncated, missing_tensor, wrong_shape]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("command", ["inspect", "export", "evaluate"])
def test_commands_refuse_a_damaged_checkpoint(cli, damaged, articles, command, damage):
    words = damage(damaged)
    files = sorted(damaged.parent.rglob("*"))
    options = ["--text", articles, "--window", "32", "--tokens", "65"] if command == "evaluate" else []
    if command == "evaluate" and damage is dense_config:
        words = ["tensor 'model.layers.0.mlp.down_proj.weight' is missing"]  # it evaluates dense models too
    refused(cli(command, "--model", damaged, *options), *words)
    assert sorted(damaged.parent.rglob("*")) == files


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_verify_says_what_is_wrong(cli, damaged, damage):
    words = damage(damaged)
    status, output, _ = cli("verify", "--model", damaged)
    assert status == 1
    assert all(any(word in line for line in output.splitlines()) for word in words), output
    status, output, _ = cli("verify", "--model", damaged, "--json")
    assert status == 1 and not json.loads(output)["ok"]


def test_verify_finds_a_single_wrong_byte(cli, damaged):
    path = damaged / "model.safetensors"
    content = bytearray(path.read_bytes())
    (header,) = struct.unpack_from("<Q", content)
    content[8 + header + 1000] ^= 1
    path.write_bytes(content)
    status, output, _ = cli("verify", "--model", damaged)
    assert status == 1 and "checksum" in output


@pytest.mark.parametrize("command", ["inspect", "export", "evaluate", "benchmark"])
def test_commands_refuse_a_folder_that_is_not_there(cli, tmp_path, articles, command):
    options = ["--text", articles] if command == "evaluate" else []
    refused(cli(command, "--model", tmp_path / "nowhere", *options), "nowhere")
    assert not list(tmp_path.iterdir())


def test_evaluate_refuses(cli, packed, articles, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    refused(cli("evaluate", "--model", packed, "--text", tmp_path / "empty.txt"), "evaluation text is empty")
    refused(cli("evaluate", "--model", packed, "--text", "missing.txt"), "'missing.txt' is neither a file")
    refused(cli("evaluate", "--model", packed, "--text", articles, "--window", "1024"), "at most 512 tokens")
    options = ["--text", articles, "--window", "8", "--stride", "9"]
    refused(cli("evaluate", "--model", packed, *options), "the stride must be between 1 and the window")
    options = ["--text", articles, "--runtime", "onnxruntime"]
    refused(
        cli("evaluate", "--model", packed, *options), "model.onnx does not exist; `optimum-cli nm export` writes it"
    )


def test_benchmark_refuses_a_checkpoint_that_is_not_exported(cli, packed):
    refused(cli("benchmark", "--model", packed), f"{packed} has no model.onnx", "optimum-cli nm export")


def test_inspect_refuses_a_plot_it_cannot_write(cli, packed, tmp_path):
    refused(cli("inspect", "--model", packed, "--plot", tmp_path / "no" / "plot.png"), "plot.png", "cannot be written")


def test_the_installed_program_writes_one_line_to_standard_error(packed, tmp_path):
    run = installed("inspect", "--model", tmp_path / "nowhere", "--json")
    assert run.returncode == 1 and run.stdout == ""
    assert len(run.stderr.splitlines()) == 1 and run.stderr.startswith("optimum-cli nm inspect: error: ")
