"""Where one model's time goes: `python -m optimum_nm.evaluate.measure_operators SPECIFICATION`, a process of its own.

ONNX Runtime's profiler writes when each node ran; this adds the times up by operator type. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import NMError
from ..runtime.session import session_options
from .measure import WARM_UP_TOKENS, prompt_tokens_of
from .onnx_decoder import OnnxDecoder

BETWEEN = "between operators"
_KERNEL = "_kernel_time"


@dataclass
class Times:
    """Microseconds and calls by operator type, of one run of a session or the sum of several."""

    microseconds: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def of_each(self, runs: int) -> dict[str, dict[str, float]]:
        """Per run: calls and milliseconds of each operator type, and of what passes between them."""
        return {
            operator: {"calls": self.calls[operator] // runs, "milliseconds": time / runs / 1000}
            for operator, time in self.microseconds.items()
        }


def measure_operators(
    path: Path, threads: int | None, vocabulary: int, prompt_tokens: int, new_tokens: int, directory: Path
) -> dict[str, dict[str, dict[str, float]]]:
    """Read a prompt and decode greedily under the profiler.

    Args:
        directory: where the profiler may write its file; whoever made the folder removes it.

    Returns:
        Under "prefill" for the prompt and under "decode" for each of the new tokens: `calls` and `milliseconds` by
        operator type, and BETWEEN for the rest of the run, in which no operator computes.

    Raises:
        NMError: the model cannot be loaded, or takes more events than the profiler keeps.
    """
    options = session_options(threads)
    options.enable_profiling = True
    options.profile_file_prefix = str(directory / "profile")
    decoder = OnnxDecoder(path, options)
    prompt = prompt_tokens_of(vocabulary, prompt_tokens)
    decoder.generate(prompt, WARM_UP_TOKENS)
    decoder.generate(prompt, 1 + new_tokens)  # the first of them comes out of the prompt's run
    runs = times_of_runs(json.loads(Path(decoder.session.end_profiling()).read_text()))
    if len(runs) != WARM_UP_TOKENS + 1 + new_tokens:
        raise NMError(f"{new_tokens} new tokens are more than ONNX Runtime's profiler can hold; ask for fewer.")
    prefill, *decode = runs[WARM_UP_TOKENS:]
    return {"prefill": prefill.of_each(1), "decode": _sum(decode).of_each(len(decode))}


def times_of_runs(events: list[dict[str, Any]]) -> list[Times]:
    """What each run of the session spent, from the profiler's events in any order.

    A node's time is its own: that of the nodes in the subgraph of an If or a Loop is theirs. Times are whole
    microseconds, so of very short nodes some is counted as BETWEEN.
    """
    runs: list[Times] = []
    open_nodes: list[tuple[int, str]] = []  # end and operator of nodes that have begun and may not have ended
    for event in sorted(events, key=lambda event: (event.get("ts", 0), -event.get("dur", 0))):
        if event.get("name") == "model_run":
            runs.append(Times(Counter({BETWEEN: event["dur"]})))
            open_nodes = []
        elif event.get("cat") == "Node" and event["name"].endswith(_KERNEL) and runs:
            begin, duration, operator = event["ts"], event["dur"], event["args"]["op_name"]
            while open_nodes and open_nodes[-1][0] <= begin:
                open_nodes.pop()
            around = open_nodes[-1][1] if open_nodes else BETWEEN
            runs[-1].microseconds[around] -= duration
            runs[-1].microseconds[operator] += duration
            runs[-1].calls[operator] += 1
            open_nodes.append((begin + duration, operator))
    return runs


def _sum(runs: list[Times]) -> Times:
    return Times(sum((run.microseconds for run in runs), Counter()), sum((run.calls for run in runs), Counter()))


if __name__ == "__main__":
    specification = json.loads(sys.argv[1])
    path, directory = Path(specification.pop("path")), Path(specification.pop("directory"))
    try:
        print(json.dumps(measure_operators(path, directory=directory, **specification)))
    except NMError as error:
        sys.exit(" ".join(str(error).split()))
