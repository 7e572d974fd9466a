"""A report's matrix, its resumption, what a failing row does, and that its figures are those of `evaluate`."""

import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import psutil
import pytest
import torch

from optimum_nm import __main__ as program
from optimum_nm.config import NMConfig
from optimum_nm.errors import NMError
from optimum_nm.evaluate.inspect import inspect_checkpoint
from optimum_nm.evaluate.perplexity import evaluate_torch
from optimum_nm.evaluate.whole_file import whole_file, write_text
from optimum_nm.report import Report, default_matrix, read_matrix, run_report, runner
from optimum_nm.report.document import file_name, gap_shares, report_data, report_text, write_report
from optimum_nm.report.matrix import Matrix, Row
from optimum_nm.report.measure import run_task
from optimum_nm.report.pareto import Point, pareto_front, points
from optimum_nm.report.runner import DENSE
from optimum_nm.report.setting import Setting
from optimum_nm.report.unstructured import stored_dense, unstructured_solver
from optimum_nm.sparsify.layer import solve_layer
from optimum_nm.sparsify.statistics import InputStatistics

BASE = {"calibration_samples": 2, "calibration_length": 32}
ROWS = {
    "8:16": {},
    "int4": {"pattern": "16:16", "weight_dtype": "int4", "group_size": 32},
    "anywhere": {"outliers": "8:256", "unstructured": "outliers"},
}
BROKEN = {"broken": {"exclude": ["*.no_such_proj"]}}
PROTOCOL = {"window": 32, "tokens": 97}


def matrix_of(rows):
    return Matrix({"Rows": [Row.read(name, fields, BASE) for name, fields in rows.items()]})


@pytest.fixture
def measured(monkeypatch):
    """Measures in this process; names of the rows as they come. With `stop_at`, that row is interrupted."""

    class Measured(list):
        stop_at = None

        def run(self, task, log):
            task = json.loads(json.dumps(task))
            self.append(task["name"])
            if task["name"] == self.stop_at:
                log.write("half a progress bar")
                raise KeyboardInterrupt
            try:
                run_task(task)
            except NMError as error:
                log.write(f"Sparsifying\n{error}\n")
                return 1
            return 0

    names = Measured()
    monkeypatch.setattr(runner, "run_measurement", names.run)
    return names


@pytest.fixture
def run(tiny_llama_folder, text, tmp_path):
    def run(rows=ROWS, **options):
        texts = {"calibration": [text], "text": [text[:900]]} | PROTOCOL
        return run_report(str(tiny_llama_folder), matrix_of(rows), tmp_path / "report", **texts | options)

    return run


def test_rows_have_the_perplexity_and_size_that_evaluate_and_inspect_give(run, measured, tmp_path, text):
    report = run(keep=True)
    assert measured == [DENSE.name, *ROWS]
    for name in ("8:16", "int4"):
        checkpoint = tmp_path / "report" / "checkpoints" / report.setting.key(Row.read(name, ROWS[name], BASE))
        alone = evaluate_torch(str(checkpoint), [text[:900]], 32, limit=97)
        assert report.perplexity(name) == alone.perplexity
        assert report.results[name]["perplexity"]["tokens"] == 96
        totals = inspect_checkpoint(checkpoint).totals()
        assert report.results[name]["bits_per_weight"] == totals["bits_per_weight"]
        assert report.results[name]["model_bytes"] == totals["file_bytes"]
        assert report.ratio(name) == alone.perplexity / report.perplexity(DENSE.name)
        line = next(line for line in report_text(report, []).splitlines() if line.startswith(f"| {name} "))
        assert f"| {totals['bits_per_weight']:.3f} |" in line and f"| {alone.perplexity:.3f} |" in line
    assert "bits_per_weight" not in report.results["anywhere"] and report.results["anywhere"]["summary"]["layers"]
    assert len(list((tmp_path / "report" / "checkpoints").iterdir())) == 2


def test_mixture_is_part_of_what_a_result_depends_on(run, measured, text):
    rows = {"8:16": {}}
    first = run(rows, calibration={"self": 1, (text,): 1})
    assert [Path(source).suffix for source in first.setting.calibration] == ["", ".jsonl"]
    assert set(first.setting.calibration.values()) == {1}
    run(rows, calibration={"self": 1, (text,): 1})
    assert measured == [DENSE.name, "8:16"]
    run(rows, calibration="self")
    run(rows, calibration={"self": 0.25, (text,): 0.75})
    assert measured == [DENSE.name, "8:16"] * 3


def test_interrupted_run_goes_on_and_measures_nothing_twice(run, measured, tmp_path):
    measured.stop_at = "int4"
    with pytest.raises(KeyboardInterrupt):
        run()
    folder = tmp_path / "report"
    assert measured == [DENSE.name, "8:16", "int4"]
    assert len(list((folder / "results").iterdir())) == 2
    assert not (folder / "work").exists() and not (folder / "checkpoints").exists()
    before = {file: file.read_bytes() for file in (folder / "results").iterdir()}
    measured.clear()
    measured.stop_at = None
    report = run()
    assert measured == ["int4", "anywhere"] and set(report.results) == {DENSE.name, *ROWS}
    assert all(file.read_bytes() == content for file, content in before.items())
    measured.clear()
    assert run().results == report.results and measured == []


def test_row_that_fails_is_recorded_and_the_others_go_on(run, measured, tmp_path):
    report = run({**BROKEN, "8:16": {}})
    assert "8:16" in report.results and set(report.failures) == {"broken"}
    assert report.failures["broken"].startswith("exclude pattern '*.no_such_proj' matches no linear layer")
    assert report.failures["broken"] in report_text(report, [])
    measured.clear()
    assert run({**BROKEN, "8:16": {}}).failures == report.failures
    assert measured == ["broken"]


def test_failure_is_forgotten_once_the_row_succeeds(run, measured, monkeypatch):
    run({"int4": ROWS["int4"]})
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_measurement", lambda task, log: -9)
        assert run({"8:16": {}}).failures == {"8:16": "it was ended by SIGKILL, as for want of memory."}
    assert run({"8:16": {}}).failures == {}


def test_dense_model_that_cannot_be_evaluated_ends_the_report(measured, tmp_path, text):
    with pytest.raises(NMError, match=r"the dense model cannot be evaluated: .*cannot be loaded"):
        run_report(str(tmp_path / "no"), matrix_of(ROWS), tmp_path / "report", calibration=[text], text=[text])
    assert measured == [DENSE.name]


def test_rows_that_differ_in_name_only_are_measured_once(run, measured):
    report = run({"a": {}, "b": {"pattern": "8:16"}, "as it is": None})
    assert measured == [DENSE.name, "a"]
    assert report.results["a"] == report.results["b"] and report.ratio("as it is") == 1


def test_process_of_its_own(run, measured, monkeypatch, tmp_path):
    run({"as it is": None})
    monkeypatch.undo()
    report = run({"8:16": {}})
    assert measured == [DENSE.name]
    assert report.results["8:16"]["peak_bytes"] > 2**26
    assert not report.failures and not (tmp_path / "report" / "work").exists()


def test_measurement_ends_with_the_report(tmp_path, tiny_llama_folder, text):
    rows = {"endless": {**BASE, "finetune": {"epochs": 10**9, "holdout": 0.0}}}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "text.txt").write_text(text)
    options = {
        "model": tiny_llama_folder,
        "output": tmp_path / "report",
        "matrix": tmp_path / "rows.json",
        "window": 32,
    }
    options |= {"calibration": tmp_path / "text.txt", "text": tmp_path / "text.txt"}
    command = [sys.executable, "-m", "optimum_nm", "report"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    report = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any("Sparsifying" in log.read_text() for log in (tmp_path / "report").glob("*/*/log")):
        assert report.poll() is None
        time.sleep(0.1)
    measuring = report.children()
    assert measuring
    report.kill()
    report.wait()
    assert psutil.wait_procs(measuring, timeout=120)[1] == []


def test_key_depends_on_the_row_the_texts_the_model_and_how_it_is_read(tmp_path, tiny_llama_folder):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    row = Row.read("8:16", {}, BASE)
    setting = Setting(str(tmp_path / "model"), "texts/a.jsonl", "texts/b.jsonl")
    same = Setting(str(tmp_path / "model"), "elsewhere/a.jsonl", "elsewhere/b.jsonl")
    others = [
        Setting(str(tiny_llama_folder), "a.jsonl", "b.jsonl"),
        Setting(setting.model, "c.jsonl", "b.jsonl"),
        Setting(setting.model, "a.jsonl", "c.jsonl"),
        Setting(setting.model, "a.jsonl", "b.jsonl", window=512),
        Setting(setting.model, "a.jsonl", "b.jsonl", dtype="float32"),
        Setting(setting.model, "a.jsonl", "b.jsonl", load_options={"gguf_file": "q4.gguf"}),
    ]
    rows = [
        Row.read("8:16", {"solver": "admm"}, BASE),
        Row.read("8:16", {"seed": 1}, BASE),
        Row.read("8:16", {"unstructured": "weights"}, BASE),
        DENSE,
    ]
    assert same.key(row) == setting.key(row) == setting.key(Row.read("another name", {"pattern": "8:16"}, BASE))
    keys = [setting.key(row), *(other.key(row) for other in others), *(setting.key(other) for other in rows)]
    (tmp_path / "model" / "config.json").write_text("{ }")
    assert len({*keys, setting.key(row)}) == len(keys) + 1


def test_pictures_and_data(run, measured, tmp_path):
    report = run({"8:16": {}, "int4": ROWS["int4"], "anywhere": ROWS["anywhere"]})
    write_report(report, tmp_path / "report")
    for picture in ("pareto.png", "errors/8x16.png", "errors/int4.png", "errors/anywhere.png"):
        assert matplotlib.image.imread(tmp_path / "report" / picture).std() > 0
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert data == json.loads(json.dumps(report_data(report, pareto_front(points(report)))))
    assert data["results"]["dense"]["ratio"] == 1 and data["tables"] == {"Rows": ["8:16", "int4", "anywhere"]}
    assert (tmp_path / "report" / "report.md").read_text().startswith("# tiny-llama")


def test_front_is_what_nothing_beats():
    front = [Point("a", 2.0, 50.0, False), Point("b", 3.0, 30.0, False), Point("c", 8.0, 20.0, True)]
    beaten = [Point("d", 2.0, 60.0, False), Point("e", 4.125, 30.0, True), Point("f", 9.0, 20.0, True)]
    assert pareto_front([*beaten, *front]) == front


def test_share_of_the_gap_between_two_of_four_and_unstructured():
    matrix = default_matrix({})
    losses = {"2:4 admm": 80.0, "8:16 admm": 50.0, "50 % unstructured admm": 40.0, "2:4 mask": 90.0, "8:16 mask": 60.0}
    found = {"window": 32, "stride": 32, "tokens": 96}
    results = {
        name: {"perplexity": {"perplexity": value, **found}} for name, value in {"dense": 20.0, **losses}.items()
    }
    report = Report(matrix, Setting("model", "a.jsonl", "b.jsonl"), results, {})
    assert gap_shares(report) == {"admm": 0.75}
    assert "8:16 wins back: admm 75%." in report_text(report, [])


# --- the matrix


def test_default_matrix_has_what_the_paper_compares():
    matrix = default_matrix(BASE)
    names = [row.name for row in matrix.rows]
    for name in ("2:4", "16:32 + 16:256", "8:16 + 4:256 unstructured", "9:16", "8:16 fine-tuned", "dense int4 g32"):
        assert name in names
    assert len(names) == len(set(names)) == len({file_name(name) for name in names})
    configs = {row.name: row.config for row in matrix.rows}
    assert configs["8:16 + 16:256"] == NMConfig(outliers="16:256", **BASE)
    assert configs["8:16 without correction"].variance_correction is None
    assert configs["8:16 fine-tuned"].finetune["epochs"] == 10
    rows = {}
    for table in matrix.tables.values():
        for row in table:
            assert rows.setdefault(row.name, row) == row


def test_base_is_what_a_row_does_not_set():
    rows = {row.name: row.config for row in default_matrix({"solver": "sparsegpt", "outliers": "4:256"}).rows}
    assert rows["8:16"].solver == "sparsegpt" and rows["8:16"].outliers is None
    assert rows["8:16 mask"].solver == "mask" and rows["preset best"].solver == "admm"


def test_only():
    matrix = default_matrix({})
    assert [row.name for row in matrix.select(["9:16", "2:4 +*"])] == [
        "2:4 + 4:256",
        "2:4 + 8:256",
        "2:4 + 16:256",
        "9:16",
    ]
    assert [row.name for row in matrix.select(["Scores"])] == ["8:16", "8:16 wanda", "8:16 magnitude"]
    with pytest.raises(NMError, match="'7:16' matches no configuration; one is called 'dense float16'"):
        matrix.select(["8:16", "7:16"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("matrix.json", '{"8:16": {"outliers": "4:256"}, "dense": null}'),
        ("matrix.yaml", "8:16: {outliers: 4:256}\ndense:\n"),
    ],
)
def test_matrix_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    rows = read_matrix(tmp_path / name, BASE).rows
    assert rows == [Row("8:16", NMConfig(outliers="4:256", **BASE)), Row("dense", None)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("matrix.json", None, "cannot be read"),
        ("matrix.json", "{", "is not valid"),
        ("matrix.yaml", "a: [", "is not valid"),
        ("matrix.yaml", "- 8:16", "holds no configurations"),
        ("matrix.json", "{}", "holds no configurations"),
        ("matrix.json", '{"a": 3}', "configuration 'a' is 3; fields of NMConfig"),
        ("matrix.json", '{"a": {"pattern": "9:8"}}', "configuration 'a': pattern '9:8' keeps 9 of 8"),
        ("matrix.json", '{"a": {"colour": "red"}}', "configuration 'a': .* unknown field 'colour'"),
        (
            "matrix.json",
            '{"a": {"unstructured": "rows"}}',
            "unstructured is 'rows'; it must be one of weights, outliers",
        ),
        ("matrix.json", '{"a": {"unstructured": "outliers"}}', "outliers is None; give their number"),
        ("matrix.json", '{"a": {"unstructured": "weights", "weight_dtype": "int8"}}', "baseline needs floats"),
    ],
)
def test_matrix_file_that_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(NMError, match=message):
        read_matrix(tmp_path / name, {})


# --- baselines


def layer_problem(solver, outliers=None):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 256, generator=generator) * torch.rand(48, 256, generator=generator)
    inputs = torch.randn(1024, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    statistics = InputStatistics(1024, inputs.square().sum(0), inputs.abs().amax(0), inputs.T @ inputs, [inputs])
    return weight, statistics, NMConfig(solver=solver, outliers=outliers)


@pytest.mark.parametrize("solver", ["mask", "sparsegpt", "admm", "alps"])
@pytest.mark.parametrize(("kind", "outliers"), [("weights", None), ("outliers", "16:256")])
def test_baseline_keeps_as_many_weights_wherever_they_are(solver, kind, outliers):
    weight, statistics, config = layer_problem(solver, outliers)
    structured = solve_layer(weight, statistics, config.layer(""), config, False)
    stored = stored_dense(config)
    solution = unstructured_solver(config, kind)(weight, statistics, stored.layer(""), stored, False)
    assert solution.outlier_mask is None
    assert solution.kept.sum() == structured.kept.sum()
    assert not solution.weight[~solution.kept].any()
    groups = solution.kept.view(48, -1, 16).sum(-1)
    assert groups.min() >= (8 if kind == "outliers" else 0) and len(solution.kept.sum(1).unique()) > 1
    allowed = 1.0 if kind == "weights" else 1.05  # a score's choice of outliers is not the best one in either form
    assert statistics.energy(weight - solution.weight) < allowed * statistics.energy(weight - structured.weight)


def test_baseline_leaves_overrides_alone():
    weight, statistics, config = layer_problem("admm")
    override = NMConfig(solver="admm", weight_dtype="int8", pattern="2:4").layer("")
    solution = unstructured_solver(config, "weights")(weight, statistics, override, stored_dense(config), False)
    assert torch.equal(solution.weight, solve_layer(weight, statistics, override, config, False).weight)


# --- the command


@pytest.fixture
def cli(monkeypatch, capsys, tiny_llama_folder, tmp_path, text):
    (tmp_path / "articles.txt").write_text(text)
    (tmp_path / "rows.json").write_text(json.dumps({**BROKEN, "8:16": {}}))

    def run(*options):
        texts = ["--calibration", tmp_path / "articles.txt", "--text", tmp_path / "articles.txt", "--window", 32]
        quick = [
            "--calibration-samples",
            2,
            "--calibration-length",
            32,
            "--tokens",
            97,
            "--matrix",
            tmp_path / "rows.json",
        ]
        arguments = ["report", "--model", tiny_llama_folder, "--output", tmp_path / "out", *texts, *quick, *options]
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, arguments)])
        try:
            program.main()
        except SystemExit as end:
            return end.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run


def test_command(cli, measured, tmp_path):
    status, output = cli("--only", "8:16")
    assert status == 0 and "| 8:16 |" in output and output.endswith("report.md, report.json, pareto.png and errors/.\n")
    assert "## Not measured\n\nbroken" in output
    status, output = cli("--json")
    assert status == 1 and set(json.loads(output)["failures"]) == {"broken"}
    assert measured == [DENSE.name, "8:16", "broken"]
    assert json.loads(output) == json.loads((tmp_path / "out" / "report.json").read_text())


def test_command_refuses(cli, measured, tmp_path):
    for options, message in [
        (("--only", "7:16"), "'7:16' matches no configuration"),
        (("--text", "missing.txt"), "'missing.txt' is neither a file"),
        (("--matrix", tmp_path / "no.json"), "cannot be read"),
        (("--device", "abacus"), "device 'abacus'"),
        (("--output", tmp_path / "rows.json"), "cannot be written"),
    ]:
        status, output = cli(*options)
        assert output == "" and message in status
    assert measured == []


def test_command_lists(cli):
    assert cli("--list") == (0, "broken\n8:16\n")


def test_file_is_there_whole_or_not_at_all(tmp_path):
    (tmp_path / "old").write_text("old")
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / name) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_text() == "old"
    with pytest.raises(NMError, match=r"folder/file cannot be written \(No such file or directory\)"):
        write_text(tmp_path / "folder" / "file", "text")
