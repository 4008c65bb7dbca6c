"""Every example runs by the command in its docstring, on fastgpt's kernels, and learns."""

import ast
import operator
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt import extension
from fastgpt.backends import OPS

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
NEEDS = {  # beside what fastgpt itself depends on
    "bert_masked_lm.py": ("transformers",),
    "ddp.py": ("transformers",),
    "electra_replaced_tokens.py": ("transformers",),
    "finetune_gpt2.py": ("transformers", "accelerate"),
    "finetune_llama_packed.py": ("transformers", "accelerate"),
    "lightning_module.py": ("transformers", "lightning"),
    "t5_numbers.py": ("transformers",),
}

# What an example says of itself at the end, beside its loss: numbers in the output, and what must hold of them.
CLAIMS = {
    "bert_masked_lm.py": (
        r"([\d.]+)% of the masked bytes guessed; always guessing the commonest: ([\d.]+)%",
        operator.gt,
    ),
    "electra_replaced_tokens.py": (
        r"accuracy ([\d.]+)%; always answering 'original': ([\d.]+)%",
        operator.gt,
    ),
    "finetune_gpt2.py": (r"logits differ by at most (\S+)", lambda difference: difference < 1e-4),
    "finetune_llama_packed.py": (r"losses differ by at most (\S+)", lambda difference: difference < 1e-5),
    "t5_numbers.py": (r"(\d+)% of the numbers are written without a mistake", lambda share: share > 50),
}

# Imported by Python as it starts: writes down which backend served each op, while the example runs as it stands.
WITNESS = """
import atexit, os, pathlib
from fastgpt import backends

backends._thread.recording = decisions = []

@atexit.register
def write():
    served = {f"{d.op} {d.backend}" for d in decisions}
    pathlib.Path(os.environ["SERVED"], str(os.getpid())).write_text("\\n".join(served))
"""


def docstring(name):
    return ast.get_docstring(ast.parse((ROOT / "examples" / name).read_text())) or ""


def command(name):
    """The command in an example's docstring, indented on a line of its own, with this Python's programs."""
    found = re.findall(rf"^    ((?:python|torchrun) .*\bexamples/{name}\b.*)$", docstring(name), re.MULTILINE)
    assert len(found) == 1, f"the docstring of examples/{name} must hold the one command that runs it"
    program, *arguments = shlex.split(found[0])
    module = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[program]
    return [sys.executable, *module, *arguments]


def losses(printed):
    """The losses in an example's output, in order, by what stands before the word: {"": […], "generator": […]}."""
    found = {}
    for name, value in re.findall(r"(?:\b(\w+) )?\bloss (\d+\.\d+|nan|inf)", printed):
        found.setdefault(name, []).append(float(value))
    return found


def test_there_are_examples():
    assert len(EXAMPLES) >= 6
    assert {*NEEDS, *CLAIMS} <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_readme_lists_the_example(name):
    assert f"(examples/{name})" in (ROOT / "README.md").read_text()


@pytest.mark.skipif(not extension.loaded(), reason="the C++ kernels are not built")
@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs_and_learns(name, tmp_path):
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    folder, witness, served = (tmp_path / part for part in ("run", "witness", "served"))
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    witness.mkdir()
    served.mkdir()
    (witness / "sitecustomize.py").write_text(WITNESS)
    env = os.environ | {
        "PYTHONPATH": str(witness), "SERVED": str(served), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0",
    }  # fmt: skip
    run = subprocess.run(
        command(name), cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    print(run.stdout)

    found = losses(run.stdout)
    assert found
    for which, values in found.items():
        assert len(values) >= 2
        assert values[-1] < 0.75 * values[0], f"{which} loss: {values}"
    if name in CLAIMS:
        pattern, holds = CLAIMS[name]
        assert holds(*map(float, re.search(pattern, run.stdout).groups()))

    # What the example says before it trains that it runs on, it did run on.
    named = set(run.stdout.partition("loss ")[0].split()) & set(OPS)
    assert named, "the example names no op of fastgpt"
    ran = {line for file in served.iterdir() for line in file.read_text().splitlines()}
    assert {f"{op} cpp" for op in named} <= ran

    assert [path.name for path in folder.iterdir()] == ["examples"], "the example left files behind"
