"""The house keeps its shape: imports run one way, and an op's files are found by its name."""

import ast
import sys
from pathlib import Path

import pytest

from fastgpt.backends import OPS
from tests.support import every_op

ROOT = Path(__file__).parents[2]
MAX_LINES = 450  # about 400

# Layers, from the ground up. A module may import its own layer and those named beside it, nothing else of fastgpt.
BASE = {"reference", "kernels", "extension", "backends", "_C"}
ALLOWED = {
    "reference": set(),
    "kernels": set(),
    "extension": {"_C"},
    "backends": {"extension"},
    "testing": set(),
    "ops": {"reference", "backends"},
    "functional": {"ops", "backends"},
    "accelerate": {"integrations"},
    "integrations": {"ops", "functional"},
    "patch": {"functional"},
    "flash_attention": {"ops", "backends"},
    "kv_cache": set(),
    "positions": set(),
    "sampling": {"ops", "kv_cache", "model"},
    "model": {
        "ops",
        "backends",
        "config",
        "json_io",
        "kv_cache",
        "options",
        "positions",
        "sampling",
        "tokenizer",
        "pretrained",
    },
}
TRAINING = {
    "ops",
    "backends",
    "extension",
    "functional",
    "model",
    "sampling",
    "accelerate",
}  # and one another
FOR_KERNELS = {"torch", "triton", "fastgpt", *sys.stdlib_module_names}
LAZY = {"kernels", "integrations"}  # imported when they are asked for: what they need may be imported at once
# Who may import them. `backends` asks Triton, when it is to be used, whether its driver compiles.
OUTSIDE = {"triton": {"kernels", "backends"}, "transformers": {"integrations"}}


def layer(module):
    """ "fastgpt.ops.gelu" is of the layer "ops"; fastgpt itself is of the layer ""."""
    return [*module.split("."), ""][1]


def imports(source, module, is_package):
    """(imported module, whether at the module's top level) of every import, those inside functions included."""
    tree = ast.parse(source)
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        top = id(node) not in inner
        if isinstance(node, ast.Import):
            yield from ((name.name, top) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [base])])
            yield from ((f"{base}.{name.name}", top) for name in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant):
                yield first.value, top


def allowed(importer, imported):
    """Whether a module of one layer of fastgpt may import one of another."""
    if importer == imported or importer == "":
        return True
    if importer in ALLOWED:
        return imported in ALLOWED[importer]
    return imported in TRAINING or (imported not in BASE and imported not in ALLOWED)


def violations(source, module, is_package=False):
    """Every import of a module that breaks a rule, as a sentence."""
    importer = layer(module)
    for imported, top in imports(source, module, is_package):
        package = imported.split(".")[0]
        if package in OUTSIDE and importer not in OUTSIDE[package]:
            yield f"{module} imports {imported}"
        elif package in OUTSIDE and top and importer not in LAZY:
            yield f"{module} imports {imported} at its top level"
        elif (
            package == "kernels"
            or (package == "fastgpt" and not allowed(importer, layer(imported)))
            or (importer == "kernels" and package not in FOR_KERNELS)
        ):
            yield f"{module} imports {imported}"


def modules():
    """(path, module name) of every Python file of the package."""
    for folder, package in ((ROOT / "fastgpt", "fastgpt"), (ROOT / "kernels" / "triton", "fastgpt.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield path, ".".join([package, *(part for part in parts if part != "__init__")])


def test_imports_run_one_way():
    found = [
        sentence
        for path, module in modules()
        for sentence in violations(path.read_text(), module, path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)
    assert len(list(modules())) > 30


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastgpt.reference.gelu", "from fastgpt import ops"),
        ("fastgpt.reference.gelu", "import fastgpt.backends"),
        ("fastgpt.reference.gelu", "from ..ops import gelu"),
        ("fastgpt.kernels.gelu", "from fastgpt.reference import gelu"),
        ("fastgpt.kernels.gelu", "import numpy"),
        ("fastgpt.ops.gelu", "from fastgpt.functional import gelu"),
        ("fastgpt.ops.gelu", "def f():\n    from fastgpt.kernels import gelu"),
        ("fastgpt.ops.gelu", "import importlib\nimportlib.import_module('fastgpt.kernels.gelu')"),
        ("fastgpt.ops.gelu", "import triton"),
        ("fastgpt.ops.gelu", "def f():\n    import triton.language as tl"),
        ("fastgpt.ops.gelu", "from kernels.triton import gelu"),
        ("fastgpt.backends", "from fastgpt import ops"),
        ("fastgpt.functional", "from fastgpt import model"),
        ("fastgpt.functional", "from fastgpt.reference import gelu"),
        ("fastgpt.model", "from fastgpt.kernels.gelu import gelu_fwd"),
        ("fastgpt.model", "from fastgpt import functional as F"),
        ("fastgpt.model", "from fastgpt.train import train"),
        ("fastgpt.model", "def f():\n    import transformers"),
        ("fastgpt.train", "from fastgpt import reference"),
        ("fastgpt.cli", "from fastgpt._C import build_info"),
        ("fastgpt.accelerate", "import transformers"),
        ("fastgpt.accelerate", "def f():\n    import transformers"),
        ("fastgpt.integrations.gpt2", "from fastgpt.model import GPT"),
        ("fastgpt.model", "from fastgpt.integrations import gpt2"),
    ],
)
def test_planted_violation_is_caught(module, source):
    assert list(violations(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastgpt.ops.gelu", "from fastgpt import reference\nfrom fastgpt.ops._library import define"),
        ("fastgpt.kernels.gelu", "import triton\nfrom fastgpt.kernels.common import tile"),
        ("fastgpt.train", "from fastgpt.model import GPT\nfrom fastgpt.data import load"),
        ("fastgpt.integrations.gpt2", "import transformers\nfrom fastgpt import functional, ops"),
    ],
)
def test_arrows_of_the_design_are_allowed(module, source):
    assert not list(violations(source, module))


def stem(op):
    """bias_gelu lives with gelu."""
    return "gelu" if op == "bias_gelu" else op


def formula_stem(op):
    """The formulas of all GELUs stand in one file; in Triton, a product with one in its epilogue has its own."""
    return "gelu" if op in ("bias_gelu", "linear_gelu", "geglu") else op


@pytest.mark.parametrize("op", OPS)
def test_op_is_found_by_its_name(op):
    home = formula_stem(op)
    files = [f"fastgpt/ops/{stem(op)}.py", f"tests/ops/test_{stem(op)}.py", f"bench/bench_{stem(op)}.py"]
    files += [f"fastgpt/reference/{'attention' if op == 'attention_varlen' else home}.py"]
    if op != "mlp":  # which is made of the kernels of linear and linear_gelu
        files += [f"kernels/triton/{op if op == 'linear_gelu' else home}.py", f"csrc/cpu/{home}.cpp"]
    missing = [file for file in files if not (ROOT / file).exists()]
    assert not missing


def sources():
    for folder in ("fastgpt", "kernels", "csrc", "tests", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                yield path


def test_files_are_short():
    long = {
        str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > MAX_LINES
    }
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_no_file_is_named_for_nothing():
    assert not [p for p in sources() if p.stem in ("utils", "util", "helpers", "misc", "monkey_patch")]


def test_names_of_tests_are_short():
    tests = (n for p in sources() if p.suffix == ".py" for n in ast.walk(ast.parse(p.read_text())))
    names = [n.name for n in tests if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    assert len(names) > 500 and not [name for name in names if len(name) > 70]


def test_every_op_has_a_case_for_the_tests_that_take_them_all():
    assert {name.partition(",")[0] for name in every_op.NAMES} == set(OPS)
