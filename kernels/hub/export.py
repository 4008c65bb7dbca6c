"""`python kernels/hub/export.py OUT`: the Triton kernels as a repository for the Hugging Face Hub.

    OUT/build.toml  flake.nix  README.md  torch-ext/fastgpt/…      a project for kernel-builder
    OUT/build/torch-cpu/…  torch-cuda/…                            what `kernels.get_local_kernel(OUT)` loads

The ops, their references and the Triton kernels go in as they are, but for two things that the Hub demands, so that
several versions can be loaded into one process: a module imports its neighbours relatively, and the operators are
registered under a name of their own, a hash of the files. What is different from the package lies in `kernels/hub/`.

Layout and metadata: https://huggingface.co/docs/kernels/v0.17.0/kernel-requirements (build.toml of edition 5).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "kernels" / "hub"
NAME = "fastgpt"

# What becomes the kernel: its place in there, and here.
_FOLDERS = {
    "ops": ROOT / "fastgpt" / "ops",
    "reference": ROOT / "fastgpt" / "reference",
    "kernels": ROOT / "kernels" / "triton",
}
_FILES = {
    "__init__.py": TEMPLATES / "public.py",
    "extension.py": TEMPLATES / "extension.py",
    "backends.py": ROOT / "fastgpt" / "backends.py",
}

# kernel-builder writes a module of the same name and content.
_OPS = '''"""Where this version's operators are registered."""

import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    """The operator's name with its namespace."""
    return f"{id}::{{op_name}}"
'''

# Older versions of `kernels` look for the kernel here.
_INNER = '''"""The same kernel, for versions of `kernels` that look for it in a directory of its name."""

import importlib.util
import sys
from pathlib import Path

_file = Path(__file__).parent.parent / "__init__.py"
_spec = importlib.util.spec_from_file_location("{id}", _file)
_kernel = sys.modules.setdefault("{id}", importlib.util.module_from_spec(_spec))
if not hasattr(_kernel, "__all__"):
    _spec.loader.exec_module(_kernel)
__all__ = _kernel.__all__
globals().update({{name: getattr(_kernel, name) for name in __all__}})
'''


def write(out: Path, repo_id: str = "your-name/fastgpt") -> None:
    """Writes the repository into `out`, which is made, or empty.

    Args:
        repo_id: "owner/name" on the Hub, for build.toml and the README.

    Raises:
        FileExistsError: there is something in `out`.
        ValueError: repo_id is none, or a source imports in a way that cannot be rewritten.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"a repository on the Hub is named owner/name, not {repo_id!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty; name a directory that is, or that does not exist")
    files = sources()
    for name in ("build.toml", "flake.nix", "README.md"):
        _write(out / name, (TEMPLATES / name).read_text("utf-8").replace("@REPO_ID@", repo_id))
    _write_all(out / "torch-ext" / NAME, files)
    general = tomllib.loads((out / "build.toml").read_text("utf-8"))["general"]
    for backend in general["backends"]:
        variant = build(files, backend)
        metadata = {
            "name": NAME,
            "id": kernel_id(files, backend),
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {
                "algorithm": "sha256",
                "files": {path: _digest(text) for path, text in variant.items()},
            },
        }
        folder = out / "build" / f"torch-{backend}"
        _write_all(folder, variant)
        _write(folder / "metadata.json", json.dumps(metadata, indent=2) + "\n")


def sources() -> dict[str, str]:
    """The kernel's Python files by their path in it, imports rewritten."""
    found = dict(_FILES)
    for folder, home in _FOLDERS.items():
        found |= {
            f"{folder}/{path.relative_to(home).as_posix()}": path for path in sorted(home.rglob("*.py"))
        }
    return {place: rewritten(path.read_text("utf-8"), place) for place, path in found.items()}


def rewritten(source: str, place: str) -> str:
    """A module of the package as one of the kernel: relative imports, operators in the kernel's own namespace.

    Args:
        place: the module's path in the kernel, such as "ops/gelu.py".

    Raises:
        ValueError: an absolute import of fastgpt, or its namespace, is left.
    """
    up = "." * (place.count("/") + 1)
    text = re.sub(r"^( *)from fastgpt(?:\.([\w.]+))? import ", rf"\1from {up}\2 import ", source, flags=re.M)
    launcher = 'import_module(f"fastgpt.kernels.{module}")'
    text = text.replace(launcher, f'import_module(f"{up}kernels.{{module}}", __package__)')
    named = text.replace('Library("fastgpt", ', "Library(namespace.name, ")
    named = named.replace('f"fastgpt::{op}"', 'f"{namespace.name}::{op}"')
    named = named.replace("torch.ops.fastgpt", "namespace")
    if named != text:
        tensor = "from torch import Tensor\n"
        named = named.replace(tensor, f"{tensor}\nfrom {up}_ops import ops as namespace\n", 1)
    code = re.sub(r'""".*?"""', "", named, flags=re.S)
    left = re.search(
        r"(?:import|from) fastgpt|fastgpt\.kernels|torch\.ops\.fastgpt|fastgpt::|\"fastgpt\",", code
    )
    if left or (named != text and "as namespace" not in named):
        what = left.group() if left else "its namespace"
        raise ValueError(
            f"{place} uses {what} in a way that cannot be rewritten for the Hub; see kernels/hub/export.py"
        )
    return named


def build(files: dict[str, str], backend: str) -> dict[str, str]:
    """The files of one build variant, metadata.json aside."""
    identity = kernel_id(files, backend)
    return {**files, "_ops.py": _OPS.format(id=identity), f"{NAME}/__init__.py": _INNER.format(id=identity)}


def kernel_id(files: dict[str, str], backend: str) -> str:
    """The module's name once it is loaded, and its operators' namespace: other files, another name."""
    content = json.dumps(files, sort_keys=True).encode()
    return f"_{NAME}_{backend}_{hashlib.sha256(content).hexdigest()[:7]}"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _write_all(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        _write(folder / path, text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def main(arguments: list[str] | None = None) -> None:
    """The command; exits with a sentence where the repository cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python kernels/hub/export.py", description="write a repository for the Hub"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory; it is made, or empty")
    parser.add_argument(
        "--repo-id", default="your-name/fastgpt", metavar="OWNER/NAME", help="its name on the Hub"
    )
    options = parser.parse_args(arguments)
    try:
        write(options.out, options.repo_id)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.out}: load it by kernels.get_local_kernel, publish it as docs/hub.md says")


if __name__ == "__main__":
    main()
