"""The house keeps its shape: imports run one way, and an op's files are found by its name."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import fastgpt
from fastgpt import ops, reference
from fastgpt.backends import OPS, SHARED_FILES
from tests.support import every_op

ROOT = Path(__file__).parents[2]
MAX_LINES = 450  # about 400

# A module imports modules of a lower rank, or of its own, without cycles. docs/design.md shows the same table.
RANKS = (
    {
        "reference",
        "kernels",
        "extension",
        "device",
        "malloc",
        "atomic_io",
        "json_io",
        "console",
        "download",
        "options",
    }
    | {"build_tools", "distributed", "testing", "_C", "_ops", "_interrupt"},
    {"backends", "env_report", "gpt_config", "tokenizer", "tokenizer_json"},
    {"ops", "data"},
    {"functional", "flash_attention", "flash_attn_interface", "model"},
    {"integrations", "checkpoints"},
    {"generation", ""},  # "" is fastgpt/__init__.py
    {"evaluation"},
    {"training"},
    {"cli", "cli_parser", "train", "config", "generate"},  # the last three: deprecated names of modules
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
SELF_CONTAINED = {"reference", "kernels"}  # import nothing else of fastgpt, not even of their rank
# The only imports of a higher rank, each inside a function of the model: its methods for convenience, and names that
# fastgpt.model exports too.
UPWARD = {
    ("fastgpt.model", "fastgpt.generation.decode"),
    ("fastgpt.model", "fastgpt.generation.kv_cache"),
    ("fastgpt.model", "fastgpt.generation.sampling"),
    ("fastgpt.model", "fastgpt.checkpoints.huggingface"),
}
FOR_KERNELS = {"torch", "triton", "fastgpt", *sys.stdlib_module_names}
# Third-party packages that few may import. `backends` asks Triton whether its driver compiles.
RESTRICTED = {"triton": {"kernels", "backends"}, "transformers": {"integrations"}}
LAZY = {"kernels", "integrations"}  # imported on demand: they may import those packages at their top level


def layer(module):
    """ "fastgpt.ops.gelu" is of the layer "ops"; fastgpt itself is of the layer ""."""
    return [*module.split("."), ""][1]


def modules(*folders):
    """Yield (path, module name) of every Python file of some packages."""
    for folder in folders or ("fastgpt", "kernels/triton", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.is_relative_to(ROOT / "fastgpt" / "kernels"):  # a link, in some checkouts
                continue
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            package = "fastgpt.kernels" if folder == "kernels/triton" else folder
            yield path, ".".join([package, *(part for part in parts if part != "__init__")])


MODULES = {module for _, module in modules()}


def imports(source, module, is_package):
    """Yield (imported module, whether at the module's top level) of every import, those inside functions included."""
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
            for name in node.names:
                full = f"{base}.{name.name}"
                is_name = full not in MODULES and base in MODULES and base != "fastgpt"
                yield (base if is_name else full), top
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant):
                yield first.value, top


def allowed(importer, imported, top):
    """Whether a module of fastgpt may import another, at its top level or inside a function."""
    ours, theirs = layer(importer), layer(imported)
    if imported == "fastgpt" or theirs not in RANK:  # a name of fastgpt/__init__.py
        theirs = ""
    if ours == theirs:
        return True
    if (importer, imported) in UPWARD and not top:
        return True
    return RANK[theirs] <= RANK[ours] and (ours not in SELF_CONTAINED or theirs == "_ops")


def violations(source, module, is_package=False):
    """Yield every import of a module that breaks a rule, as a message."""
    importer = layer(module)
    for imported, top in imports(source, module, is_package):
        package = imported.split(".")[0]
        restricted = package in RESTRICTED and module.startswith("fastgpt")
        if restricted and importer not in RESTRICTED[package]:
            yield f"{module} imports {imported}"
        elif restricted and top and importer not in LAZY:
            yield f"{module} imports {imported} at its top level"
        elif (
            package == "kernels"
            or (package == "fastgpt" and module.startswith("fastgpt") and not allowed(module, imported, top))
            or (package in ("bench", "tests") and module.startswith("fastgpt"))
            or (importer == "kernels" and package not in FOR_KERNELS)
        ):
            yield f"{module} imports {imported}"


def cycles(edges):
    """Return the strongly connected components of more than one module (Tarjan 1972)."""
    order, low, stack, found = {}, {}, [], []

    def visit(module):
        order[module] = low[module] = len(order)
        stack.append(module)
        for imported in edges.get(module, ()):
            if imported not in order:
                visit(imported)
            if imported in stack:
                low[module] = min(low[module], low[imported])
        if low[module] == order[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in edges:
        if module not in order:
            visit(module)
    return found


def test_imports_run_one_way():
    found = [
        message
        for path, module in modules()
        for message in violations(path.read_text(), module, path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)
    assert len(MODULES) > 100


def test_no_modules_import_each_other():
    """Over all imports, those inside functions and for type checkers included; all but the model's upward ones."""
    edges = {}
    for path, module in modules():
        wanted = {name for name, _ in imports(path.read_text(), module, path.name == "__init__.py")}
        edges[module] = {name for name in wanted & MODULES if name != module and (module, name) not in UPWARD}
    assert sum(map(len, edges.values())) > 300
    assert not cycles(edges)


def test_cycles_are_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert not cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_every_module_has_a_rank():
    assert {layer(module) for _, module in modules("fastgpt", "kernels/triton")} <= set(RANK)
    assert len(RANK) == sum(map(len, RANKS))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastgpt.reference.gelu", "from fastgpt import ops"),
        ("fastgpt.reference.gelu", "import fastgpt.backends"),
        ("fastgpt.reference.gelu", "from fastgpt import extension"),
        ("fastgpt.reference.gelu", "from ..ops import gelu"),
        ("fastgpt.kernels.gelu", "from fastgpt.reference import gelu"),
        ("fastgpt.kernels.gelu", "import numpy"),
        ("fastgpt.ops.gelu", "from fastgpt.functional import gelu"),
        ("fastgpt.ops.gelu", "import triton"),
        ("fastgpt.ops.gelu", "def f():\n    import triton.language as tl"),
        ("fastgpt.ops.gelu", "from kernels.triton import gelu"),
        ("fastgpt.ops.gelu", "import importlib\nimportlib.import_module('fastgpt.functional')"),
        ("fastgpt.backends", "from fastgpt import ops"),
        ("fastgpt.functional", "from fastgpt import accelerate"),
        ("fastgpt.model", "from fastgpt.generation.decode import generate"),
        ("fastgpt.model", "def f():\n    from fastgpt.checkpoints.load import open_model"),
        ("fastgpt.model", "from fastgpt.training.trainer import train"),
        ("fastgpt.model", "def f():\n    import transformers"),
        ("fastgpt.model", "from fastgpt.integrations import gpt2"),
        ("fastgpt.evaluation.perplexity", "from fastgpt.training.config import TrainConfig"),
        ("fastgpt.checkpoints.native", "from fastgpt.generation.text import generate"),
        ("fastgpt.training.trainer", "from bench.harness import machine"),
        ("fastgpt.training.trainer", "import transformers"),
    ],
)
def test_planted_violation_is_caught(module, source):
    assert list(violations(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastgpt.ops.gelu", "from fastgpt import reference\nfrom fastgpt.ops._library import define"),
        ("fastgpt.kernels.gelu", "import triton\nfrom fastgpt.kernels.common import tile"),
        ("fastgpt.training.trainer", "from fastgpt.model import GPT\nfrom fastgpt.data import load_corpus"),
        ("fastgpt.integrations.gpt2", "import transformers\nfrom fastgpt import functional, ops"),
        ("fastgpt.model", "def f():\n    from fastgpt.generation.decode import generate"),
        ("bench.gpu", "import transformers\nfrom fastgpt.model import GPT"),
    ],
)
def test_arrows_of_the_design_are_allowed(module, source):
    assert not list(violations(source, module))


def stem(op):
    """The name of an op's files."""
    return SHARED_FILES.get(op, op)


def formula_stem(op):
    """The formulas of all GELUs stand in one file; in Triton, a product with one in its epilogue has its own."""
    return "gelu" if op in ("bias_gelu", "linear_gelu", "geglu") else stem(op)


@pytest.mark.parametrize("op", OPS)
def test_op_is_found_by_its_name(op):
    home = formula_stem(op)
    files = [f"fastgpt/ops/{stem(op)}.py", f"tests/ops/test_{stem(op)}.py", f"bench/ops/bench_{stem(op)}.py"]
    files += [f"fastgpt/reference/{'attention' if op == 'attention_varlen' else home}.py"]
    if op not in ("mlp", "linear"):  # which run on other ops' kernels and PyTorch's products on a GPU
        files += [f"kernels/triton/{op if op == 'linear_gelu' else home}.py"]
    if op != "mlp":
        files += [f"csrc/cpu/{home}.cpp"]
    missing = [file for file in files if not (ROOT / file).exists()]
    assert not missing

    cuda = f"csrc/cuda/{home}.cu"
    files += [cuda] * (ROOT / cuda).exists()
    page = (ROOT / "docs" / "ops" / f"{stem(op)}.md").read_text()
    assert not [file for file in files if f"(../../{file})" not in page]
    assert f"::: fastgpt.ops.{stem(op)}.{op}\n" in page
    assert f"]({stem(op)}.md) |" in (ROOT / "docs" / "ops" / "index.md").read_text()


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


def test_every_op_is_exported():
    assert set(ops.__all__) == set(OPS) == set(reference.__all__) - {"dropout_keep"}


# The import paths that users rely on.
PUBLIC = {
    "fastgpt": "accelerate restore use_backend explain available_backends patch_functional functional ops "
    "Availability BackendUnavailable Explanation",
    "fastgpt.functional": "gelu cross_entropy scaled_dot_product_attention layer_norm rms_norm linear",
    "fastgpt.model": "GPT GPTConfig KVCache sampling_distribution",
    "fastgpt.testing": "check_error_rule run_with_gradients",
    "fastgpt.flash_attention": "",
    "fastgpt.flash_attn_interface": "flash_attn_func flash_attn_qkvpacked_func flash_attn_varlen_func "
    "flash_attn_with_kvcache",
    "fastgpt.tokenizer": "Tokenizer ByteTokenizer BPETokenizer load_tokenizer make_tokenizer",
    "fastgpt.backends": "OPS BACKENDS select use_backend explain available_backends",
    "fastgpt.data": "load_corpus open_dataset encode_documents Batch Packed Repeats",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_import_path_works(module):
    found = importlib.import_module(module)
    assert not [name for name in PUBLIC[module].split() if not hasattr(found, name)]
    assert callable(fastgpt.accelerate)


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("fastgpt.train", "train", "fastgpt.training.trainer"),
        ("fastgpt.config", "TrainConfig", "fastgpt.training.config"),
        ("fastgpt.generate", "generate", "fastgpt.generation.text"),
    ],
)
def test_old_path_warns_and_works(old, name, new, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(FutureWarning, match=f"{old} moved to {new}"):
        module = importlib.import_module(old)
    assert getattr(module, name) is getattr(importlib.import_module(new), name)
