"""The repository for the Hugging Face Hub: loaded by `kernels`, it computes what the package computes."""

import ast
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as T

import fastgpt
from fastgpt import extension, flash_attn_interface
from fastgpt.backends import OPS
from tests.support import every_op

pytestmark = [pytest.mark.xdist_group("hub"), pytest.mark.slow]  # whose fixtures are made once

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("export", ROOT / "kernels" / "hub" / "export.py")
hub = importlib.util.module_from_spec(_spec)  # kernels/ is not a package
_spec.loader.exec_module(hub)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "repository"
    hub.write(out, "someone/fastgpt")
    return out


def load(repository):
    """As a user loads it."""
    kernels = pytest.importorskip("kernels")
    return kernels.get_local_kernel(repository)


@pytest.fixture(scope="module")
def kernel(repository):
    return load(repository)


def results(function, inputs):
    out = function(*inputs)
    outs = [out] if isinstance(out, torch.Tensor) else list(out)
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    return [*outs, *torch.autograd.grad([o.sum() for o in outs], wanted)]


def ours(monkeypatch, name, ops):
    """The case's function, on other ops than the package's."""
    monkeypatch.setattr(every_op, "ops", ops)
    return every_op.case(name, torch.float32, 5, 9)[0]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", every_op.NAMES)
def test_every_op_has_the_bits_of_the_package(kernel, monkeypatch, backend, name):
    """Triton's kernels in the interpreter; those of the copy, not of the package."""
    if not fastgpt.available_backends("gelu")[backend]:
        pytest.skip("there is no Triton")
    torch.manual_seed(5)
    _, _, inputs = every_op.case(name, torch.float32, 5, 9)
    torch.manual_seed(5)
    with fastgpt.use_backend(backend):
        expected = results(ours(monkeypatch, name, fastgpt.ops), inputs)
    torch.manual_seed(5)
    with kernel.use_backend(backend), fastgpt.use_backend("cuda"):  # which the package could not run here
        found = results(ours(monkeypatch, name, kernel), inputs)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_it_has_every_op(kernel):
    assert set(OPS) <= set(kernel.__all__)
    modules = {"flash_attn_interface", "layers"}
    assert all(callable(getattr(kernel, name)) for name in set(kernel.__all__) - modules)


def test_flash_attn_interface_gives_the_packages_bits(kernel):
    q, k = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 8)
    name = "flash_attn_func"
    ours, theirs = getattr(flash_attn_interface, name), getattr(kernel.flash_attn_interface, name)
    with fastgpt.use_backend("reference"):
        assert torch.equal(
            theirs(q, k, k, causal=True, window_size=(3, 0)), ours(q, k, k, causal=True, window_size=(3, 0))
        )
    public = set(flash_attn_interface.__all__)
    assert public == set(kernel.flash_attn_interface.__all__)


LAYERS = {  # the class of transformers that asks for each
    "RMSNorm": "models.llama.modeling_llama.LlamaRMSNorm",
    "RMSNormZeroCentered": "models.gemma.modeling_gemma.GemmaRMSNorm",
    "GeLU": "activations.GELUActivation",
    "GeluTanh": "activations.GELUTanh",
    "NewGELU": "activations.NewGELUActivation",
}


@pytest.mark.parametrize("layer", LAYERS)
def test_kernelize_gives_layers_of_transformers_the_kernel(repository, layer):
    kernels = pytest.importorskip("kernels")
    pytest.importorskip("transformers")
    module, _, name = LAYERS[layer].rpartition(".")
    theirs = getattr(importlib.import_module(f"transformers.{module}"), name)
    asking = kernels.use_kernel_forward_from_hub(layer)(type(name, (theirs,), {}))
    torch.manual_seed(0)
    model = torch.nn.Sequential(asking(*[6] * ("Norm" in layer))).train()
    x = torch.randn(3, 6, requires_grad=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)

    def results():
        y = model(x)
        return y, *torch.autograd.grad(y.sin().sum(), [x, *model.parameters()])

    expected = results()
    found = kernels.LocalLayerRepository(repository, layer_name=layer)
    with kernels.use_kernel_mapping({layer: {"cpu": found}}, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)
    assert "layers" in model[0].forward.__func__.__module__
    torch.testing.assert_close(results(), expected)


def test_a_cpu_gets_the_reference_and_the_reason(kernel):
    explained = kernel.explain(kernel.gelu, torch.randn(3))
    assert explained.backend == "reference"
    assert "nothing compiled" in explained.reasons["cpp"]
    assert "serves CUDA GPUs" in explained.reasons["cuda"]
    with kernel.use_backend("cpp"), pytest.raises(kernel.BackendUnavailable, match="nothing compiled"):
        kernel.gelu(torch.randn(3))


def test_it_compiles(kernel):
    x = torch.randn(3, 5, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: kernel.gelu(x).sum(), fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(found, torch.autograd.grad(T.gelu(x).sum(), x)[0])


def test_two_versions_live_in_one_process(kernel, tmp_path, monkeypatch):
    templates = tmp_path / "templates"
    templates.mkdir()
    for path in filter(Path.is_file, hub.TEMPLATES.iterdir()):
        (templates / path.name).write_text(
            path.read_text().replace("nothing compiled", "nothing compiled at all")
        )
    monkeypatch.setattr(hub, "TEMPLATES", templates)
    monkeypatch.setitem(hub._FILES, "extension.py", templates / "extension.py")
    hub.write(tmp_path / "other")
    other = load(tmp_path / "other")
    assert other.__name__ != kernel.__name__
    x = torch.randn(3)
    assert torch.equal(other.gelu(x), kernel.gelu(x))
    reasons = [k.explain(k.gelu, x).reasons["cpp"] for k in (other, kernel)]
    assert "at all" in reasons[0] and "at all" not in reasons[1]
    assert all(hasattr(getattr(torch.ops, k.__name__), "gelu_fwd_triton") for k in (other, kernel))


def test_it_needs_no_package_and_no_network(repository):
    pytest.importorskip("kernels")
    script = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'fastgpt':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "import torch\n"
        "from pathlib import Path\n"
        "from kernels import get_local_kernel\n"
        f"kernel = get_local_kernel(Path({str(repository)!r}))\n"
        "x = torch.randn(3, requires_grad=True)\n"
        "kernel.gelu(x).sum().backward()\n"
        "assert x.grad.isfinite().all()\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'fastgpt']\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr


def test_what_kernel_builder_reads_and_what_it_would_have_built_agree(repository):
    rust = pytest.importorskip("kernels._rust")
    backends = {backend: getattr(rust.Backend, name) for backend, name in (("cpu", "CPU"), ("cuda", "CUDA"))}
    assert rust.Build.open(repository).general.backends == list(backends.values())
    assert {path.name for path in (repository / "build").iterdir()} == {f"torch-{name}" for name in backends}
    assert 'repo-id = "someone/fastgpt"' in (repository / "build.toml").read_text()
    assert "@" not in (repository / "README.md").read_text()
    source = {
        path.relative_to(repository / "torch-ext/fastgpt"): path.read_bytes()
        for path in python(repository / "torch-ext")
    }
    for backend, kind in backends.items():
        folder = repository / "build" / f"torch-{backend}"
        metadata = rust.Metadata.read_from_file(folder / "metadata.json")
        assert metadata.name.python_name == "fastgpt" and metadata.backend.backend_type == kind
        assert metadata.id.isidentifier() and f"torch.ops.{metadata.id}" in (folder / "_ops.py").read_text()
        metadata.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, folder))
        assert {place: (folder / place).read_bytes() for place in source} == source


def test_versions_of_kernels_that_look_into_a_folder_find_the_same(repository):
    folder = repository / "build" / "torch-cpu"
    script = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "import fastgpt, torch\n"
        f"assert fastgpt.__file__.startswith({str(folder)!r})\n"
        "assert fastgpt.explain(fastgpt.gelu, torch.randn(3)).backend == 'reference'\n"
        "assert all(hasattr(fastgpt, name) for name in fastgpt.__all__)\n"
    )
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr


def python(folder):
    return sorted(path for path in folder.rglob("*.py"))


def test_modules_import_only_stdlib_torch_triton_and_each_other(repository):
    known = {"torch", "triton", *sys.stdlib_module_names}
    for path in python(repository):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= known, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in known, path


def test_modules_are_those_of_the_package(repository):
    homes = {"ops": "fastgpt/ops", "reference": "fastgpt/reference", "kernels": "kernels/triton"}
    compared = 0
    for path in python(repository / "torch-ext" / "fastgpt"):
        folder, _, name = path.relative_to(repository / "torch-ext" / "fastgpt").as_posix().rpartition("/")
        if folder or name == "backends.py":
            home = ROOT / homes.get(folder, "fastgpt") / name
            assert path.read_bytes() == home.read_bytes(), path
            compared += 1
    assert compared == sum(len(python(ROOT / home)) for home in homes.values()) + 1


def test_what_stands_for_the_compiled_ops_has_what_backends_asks(repository):
    stub = types.ModuleType("stub")
    exec((repository / "torch-ext" / "fastgpt" / "extension.py").read_text(), stub.__dict__)
    asked = {
        node.attr
        for node in ast.walk(ast.parse((ROOT / "fastgpt" / "backends.py").read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "extension"
    }
    assert asked
    for name in asked:
        assert isinstance(getattr(stub, name)(), type(getattr(extension, name)()))


@pytest.mark.parametrize(
    "source",
    [
        "import fastgpt.ops",
        "import fastgpt",
        "x = torch.ops.load('fastgpt::gelu')",
        'importlib.import_module("fastgpt.kernels.gelu")',
        'torch.library.Library("fastgpt", "FRAGMENT")',
    ],
)
def test_source_that_needs_the_package_is_refused(source):
    with pytest.raises(ValueError, match=r"ops/new\.py uses .*, which needs the package"):
        hub.checked(source, "ops/new.py")


def test_what_cannot_be_written_is_said_in_a_sentence(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="owner/name"):
        hub.write(tmp_path / "out", "fastgpt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for path in ("full", "full/file"):
        with pytest.raises(FileExistsError, match="is not empty"):
            hub.write(tmp_path / path)
    with pytest.raises(SystemExit, match=r"error: .*is not empty"):
        hub.main([str(tmp_path / "full")])


def test_the_command_says_what_it_wrote(tmp_path, capsys):
    hub.main([str(tmp_path / "out"), "--repo-id", "someone/else"])
    assert "get_local_kernel" in capsys.readouterr().out
    assert "someone/else" in (tmp_path / "out" / "build.toml").read_text()
