"""examples/demo.py from beginning to end, on a tiny model in the place of SmolLM2."""

import json
import sys
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import demo

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def test_demo(tiny_llama_folder, text, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    LlamaForCausalLM.from_pretrained(tiny_llama_folder).save_pretrained(model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_llama_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    monkeypatch.setattr(demo, "smollm2", lambda: (model, None))
    monkeypatch.setattr(demo, "wikipedia_articles", lambda: ([text[:20000]], [text[20000:]]))
    monkeypatch.setattr(demo, "WINDOW", 64)
    format_options = ["--pattern", "8:16", "--outliers", "16:256"]
    quick = ["--samples", "2", "--windows", "2", "--rounds", "1", "--threads", "1", "--dense", "float32", "int4"]
    demo.main(["--output", str(tmp_path / "demo"), *format_options, *quick])

    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["config"]["pattern"] == "8:16" and report["config"]["outliers"] == "16:256"
    assert "sparse-int4-8x16-16x256" in [path.name for path in (tmp_path / "demo").iterdir()]
    assert len(report["speed"]["models"]) == len(report["perplexity"]) == 3
    assert [result["tokens"] for result in report["perplexity"]] == [2 * 64] * 3
    page = (tmp_path / "demo" / "report.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 and len({len(line) for line in table}) == 1
    assert "\n".join(table) in capsys.readouterr().out
    assert not [path for path in (tmp_path / "demo").iterdir() if path.name.startswith(".")]
