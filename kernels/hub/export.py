"""`python kernels/hub/export.py OUT`: the Triton kernels as a repository for the Hugging Face Hub.

    OUT/build.toml  flake.nix  README.md  torch-ext/fastgpt/…      a project for kernel-builder
    OUT/build/torch-cpu/…  torch-cuda/…                            what `kernels.get_local_kernel(OUT)` loads

The ops, their references, the Triton kernels and backends.py are copied unchanged: they import each other relatively,
as the Hub requires. The operators get a namespace of their own, a hash of the files, so that several versions can be
loaded into one process: the module `_ops` is generated. The other files that differ from the package are in
`kernels/hub/`.

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
    "layers.py": TEMPLATES / "layers.py",
    "flash_attn_interface.py": ROOT / "fastgpt" / "flash_attn_interface.py",
    "extension.py": TEMPLATES / "extension.py",
    "backends.py": ROOT / "fastgpt" / "backends.py",
}

# kernel-builder writes a module of the same name and content.
_OPS = '''"""The namespace of this version's operators."""

import torch

NAMESPACE = "{id}"
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
    """Write the repository into `out`, which is made, or empty.

    Args:
        repo_id: "owner/name" on the Hub, for build.toml and the README.

    Raises:
        FileExistsError: `out` is not empty.
        ValueError: repo_id is not owner/name, or a source needs the package fastgpt.
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
    """Read the kernel's Python files, by their path in it.

    Raises:
        ValueError: a file imports fastgpt absolutely, or registers operators outside of `_ops.NAMESPACE`.
    """
    found = dict(_FILES)
    for folder, home in _FOLDERS.items():
        found |= {
            f"{folder}/{path.relative_to(home).as_posix()}": path for path in sorted(home.rglob("*.py"))
        }
    return {place: checked(path.read_text("utf-8"), place) for place, path in found.items()}


def checked(source: str, place: str) -> str:
    """Return a module's source. Raises ValueError if it would need the package fastgpt."""
    code = re.sub(r'""".*?"""', "", source, flags=re.S)
    found = re.search(
        r"(?:import|from) fastgpt\b|fastgpt\.kernels|torch\.ops\.fastgpt|fastgpt::|\"fastgpt\",", code
    )
    if found:
        raise ValueError(
            f"{place} uses {found.group()}, which needs the package. Import relatively, and register operators in "
            "_ops.NAMESPACE"
        )
    return source


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
