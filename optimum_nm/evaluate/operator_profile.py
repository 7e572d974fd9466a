"""Which operators the time of packed and dense models goes to, measured on this machine."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..onnx.operator import OPERATOR, SWIGLU
from .benchmark import described, machine, measure_in_rounds, model_folders, settings_of
from .measure_operators import BETWEEN
from .tables import format_table

PHASES = ("decode", "prefill")


@dataclass(frozen=True)
class OperatorTime:
    """One operator type in one run: medians over the rounds.

    Attributes:
        ours: it is one of this package.
        share: of the whole run.
    """

    operator: str
    ours: bool
    calls: int
    milliseconds: float
    share: float


@dataclass(frozen=True)
class ModelProfile:
    """One model; `phases` has under "decode" what one token took and under "prefill" the prompt, the longest first."""

    name: str
    folder: str
    phases: dict[str, list[OperatorTime]]

    def milliseconds(self, phase: str) -> float:
        return sum(time.milliseconds for time in self.phases[phase])

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "folder": self.folder} | {
            phase: {"milliseconds": self.milliseconds(phase), "operators": [asdict(time) for time in times]}
            for phase, times in self.phases.items()
        }

    def __str__(self) -> str:
        header = [self.name]
        for phase in PHASES:
            header += [f"{phase} ms", "share", "calls"]
        by_phase = {phase: {time.operator: time for time in self.phases[phase]} for phase in PHASES}
        operators = list(dict.fromkeys(operator for phase in PHASES for operator in by_phase[phase]))
        rows = []
        for operator in operators:
            times = [by_phase[phase].get(operator) for phase in PHASES]
            mark = " *" if any(time and time.ours for time in times) else ""
            rows.append([operator + mark, *(cell for time in times for cell in _cells(time))])
        totals = [cell for phase in PHASES for cell in (f"{self.milliseconds(phase):.3f}", "100.0 %", "")]
        return format_table(header, [*rows, ["all", *totals]])


@dataclass(frozen=True)
class Profile:
    """The models on one machine; `str()` is a table for each."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    models: list[ModelProfile]

    def to_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "settings": self.settings,
            "models": [model.to_dict() for model in self.models],
        }

    def __str__(self) -> str:
        notes = [
            f"{described(self.settings)}; medians over the rounds, under the profiler; decode is one token, "
            "prefill the whole prompt; * ours",
            described(self.machine),
        ]
        return "\n\n".join([*map(str, self.models), "\n".join(notes)])


def profile(
    packed: list[Path],
    dense: dict[str, Path],
    *,
    threads: int | None = None,
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    rounds: int = 5,
) -> Profile:
    """Add up the time of each operator type while exported models read a prompt and decode, one after another.

    Args:
        packed: folders of packed checkpoints with their model.onnx.
        dense: folders by the name to show, each with a model.onnx of the same vocabulary, listed first.
        threads: of ONNX Runtime; None for its own choice.

    Raises:
        NMError: a folder has no model.onnx, or a measurement fails.
    """
    folders = model_folders(packed, dense)
    settings = settings_of(threads, prompt_tokens, new_tokens)
    with tempfile.TemporaryDirectory(prefix="optimum-nm-profile-") as directory:
        extra = {"directory": directory}
        results = measure_in_rounds("measure_operators", folders, packed[0], settings | extra, rounds)
    models = [
        ModelProfile(
            name, str(folders[name]), {phase: _medians([result[phase] for result in results[name]]) for phase in PHASES}
        )
        for name in folders
    ]
    return Profile(machine(), settings | {"rounds": rounds}, models)


def _medians(rounds: list[dict[str, dict[str, float]]]) -> list[OperatorTime]:
    milliseconds = {
        operator: statistics.median(result[operator]["milliseconds"] for result in rounds) for operator in rounds[0]
    }
    total = sum(milliseconds.values())
    return [
        OperatorTime(operator, operator in (OPERATOR, SWIGLU), int(rounds[0][operator]["calls"]), time, time / total)
        for operator, time in sorted(milliseconds.items(), key=lambda item: -item[1])
    ]


def _cells(time: OperatorTime | None) -> list[str]:
    if time is None:
        return ["", "", ""]
    calls = "" if time.operator == BETWEEN else str(time.calls)
    return [f"{time.milliseconds:.3f}", f"{time.share:.1%}".replace("%", " %"), calls]
