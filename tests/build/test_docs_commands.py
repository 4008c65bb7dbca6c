"""The commands of docs/training.md run one after another as they stand, in an empty directory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN = "torchrun"


@pytest.mark.slow
def test_the_commands_of_the_training_page_run(tmp_path):
    page = (ROOT / "docs" / "training.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("fastgpt", "fastgpt"), (TORCHRUN, "torch.distributed.run")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    work = tmp_path / "work"
    work.mkdir()
    for block in blocks:
        run = subprocess.run(
            ["sh", "-ec", block], cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, f"{block}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
    assert (work / "out" / "mine" / "step-00000150").is_dir()
    assert (work / "out" / "gpt2" / "model.safetensors").is_file()
