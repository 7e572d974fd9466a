"""Running a matrix: every row once, in a process of its own; what is measured is on the disk before the next begins."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm

from ..calibration.mixing import Calibration
from ..calibration.sources import CalibrationSource, read_documents
from ..errors import NMError
from .matrix import Matrix, Row
from .setting import Setting, store_calibration, store_documents

DENSE = Row("dense", None)  # what every report measures, and every ratio refers to


@dataclass(frozen=True)
class Report:
    """What is known of a matrix: also rows that an earlier run measured.

    Attributes:
        results: by the name of a row, what `measure.measure` returns; DENSE is among them.
        failures: by the name of a row, the sentence that says why there is no result.
    """

    matrix: Matrix
    setting: Setting
    results: dict[str, dict[str, Any]]
    failures: dict[str, str]

    def perplexity(self, name: str) -> float:
        return self.results[name]["perplexity"]["perplexity"]

    def ratio(self, name: str) -> float | None:
        """Perplexity over that of the dense model."""
        return self.perplexity(name) / self.perplexity(DENSE.name) if DENSE.name in self.results else None


class ReportFolder:
    """Where a report keeps what it has measured.

    `results/KEY.json` of each row, or `results/KEY.log` of one that failed; `texts/` what was read; with `keep`,
    `checkpoints/KEY/` the packed models; `work/` while a row is measured.

    Raises:
        NMError: the folder cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.results, self.texts = self.path / "results", self.path / "texts"
        try:
            for folder in (self.results, self.texts):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NMError(f"report folder {path} cannot be written ({error.strerror}).") from None

    def result(self, key: str) -> dict[str, Any] | None:
        file = self.results / f"{key}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def failure(self, key: str) -> str | None:
        """The last line of the log of a row that failed."""
        file = self.results / f"{key}.log"
        if not file.exists():
            return None
        lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "it ended without a word."


def run_report(
    model: str,
    matrix: Matrix,
    output: str | Path,
    *,
    calibration: Calibration = "wikitext2",
    text: CalibrationSource = "wikitext2",
    only: list[str] | None = None,
    keep: bool = False,
    **setting: Any,
) -> Report:
    """Measure the rows of a matrix that have no result in `output` yet, and the dense model.

    A row that fails is recorded with its sentence, and is tried again by the next run.

    Args:
        model: dense causal language model, a folder or a name on the Hugging Face Hub.
        output: folder of the report.
        calibration: as of `NMOptimizer.optimize`; what is text is read once.
        text: held-out text; the test split of a named dataset.
        only: shell wildcards of rows or tables; None for all.
        keep: leave the packed models in `output`/checkpoints.
        setting: further fields of Setting.

    Raises:
        NMError: `only` matches nothing, a text or the folder cannot be used, or the dense model cannot be evaluated.
    """
    selected = [DENSE, *matrix.select(only)]
    folder = ReportFolder(output)
    shared = Setting(
        model,
        calibration=store_calibration(calibration, folder.texts),
        text=store_documents(read_documents(text, "evaluation"), folder.texts),
        **setting,
    )
    rows: dict[str, Row] = {}
    for row in selected:
        rows.setdefault(shared.key(row), row)  # rows that differ by name only are measured once
    missing = [row for key, row in rows.items() if folder.result(key) is None]
    with tqdm(total=len(rows), initial=len(rows) - len(missing), desc="Report", unit="configuration") as bar:
        for row in missing:
            bar.set_postfix_str(row.name)
            measure_apart(row, shared, folder, keep)
            reason = folder.failure(shared.key(row))
            if row.config is None and reason is not None:
                raise NMError(f"the dense model cannot be evaluated: {reason}")
            bar.update()
    return read_report(matrix, shared, folder)


def read_report(matrix: Matrix, setting: Setting, folder: ReportFolder) -> Report:
    """The results and failures of all rows of a matrix that the folder has."""
    results: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for row in (DENSE, *matrix.rows):
        key = setting.key(row)
        result, failure = folder.result(key), folder.failure(key)
        if result is not None:
            results[row.name] = result
        elif failure is not None:
            failures[row.name] = failure
    return Report(matrix, setting, results, failures)


def measure_apart(row: Row, setting: Setting, folder: ReportFolder, keep: bool) -> None:
    """Run `measure` in a process of its own, which leaves a result in the folder, or a log that ends with why not."""
    key = setting.key(row)
    work = folder.path / "work" / key
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    work.mkdir(parents=True)
    checkpoint, log = work / "checkpoint", work / "log"
    task = {
        "name": row.name,
        "row": row.to_dict(),
        "setting": setting.to_dict(),
        "identity": setting.identity(row),
        "checkpoint": str(checkpoint),
        "result": str(folder.results / f"{key}.json"),
    }
    try:
        with log.open("w", encoding="utf-8") as stream:
            status = run_measurement(task, stream)
            if status < 0:
                stream.write(f"\nit was ended by {signal.Signals(-status).name}, as for want of memory.\n")
        if status:
            log.replace(folder.results / f"{key}.log")
            return
        (folder.results / f"{key}.log").unlink(missing_ok=True)
        if keep and checkpoint.exists():
            kept = folder.path / "checkpoints" / key
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            checkpoint.rename(kept)
    finally:
        shutil.rmtree(work)
        if not any(work.parent.iterdir()):
            work.parent.rmdir()


def run_measurement(task: dict[str, Any], log: TextIO) -> int:
    """The exit status of `measure` in another process; negative, the signal that ended it.

    It ends with this process, whatever ends that: its standard input then closes.
    """
    command = [sys.executable, "-m", f"{__package__}.measure"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, bufsize=0) as process:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # its status says why it reads nothing
            process.stdin.write(json.dumps(task).encode() + b"\n")
        return process.wait()
