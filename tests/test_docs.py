"""Every command and snippet in README.md and docs/ runs, in page order, on a tiny model named as in the pages."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
# `make test` runs this very test, `make demo` takes minutes on a real model, the rest install: see test_install.py
INSTALLING = ("make ", "pip ", "git ", "cd ")


def snippets(page):
    """(language, text) of the fenced python and bash blocks of a page."""
    return re.findall(r"^```(python|bash)\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_page(page, tmp_path, tiny_llama_folder, text):
    shutil.copytree(tiny_llama_folder, tmp_path / "SmolLM2-135M-Instruct")
    (tmp_path / "articles.txt").write_text(text)
    (tmp_path / "held-out.txt").write_text(text[:20000])
    search_path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": search_path, "HF_HUB_OFFLINE": "1"}
    for language, code in snippets(page):
        if language == "bash":
            lines = code.replace("\\\n", " ").splitlines()
            code = "\n".join(line for line in lines if not line.startswith(INSTALLING))
            command = ["bash", "-euc", code]
        else:
            command = [sys.executable, "-c", code]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, f"{page.name}:\n{code}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
