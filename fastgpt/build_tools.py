"""What a build of the C++ kernels needs beside PyTorch, and the command that builds them.

setup.py runs this file by its path: importing `fastgpt` needs PyTorch.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the checkout, or site-packages
COMPILER = "a C++20 compiler"
HEADERS = "the headers of Python"
# How to get what pip does not install.
INSTALL = {
    COMPILER: "apt install g++, dnf install gcc-c++ or xcode-select --install; or name one in CXX",
    HEADERS: "apt install python3-dev or dnf install python3-devel",
}
# An include and an expression that an older compiler does not have.
CPP20 = "#include <bit>\n#include <span>\nstatic_assert(std::bit_cast<unsigned>(1) == 1);\n"


def _succeeds(command: list[str], text: str) -> bool:
    return not subprocess.run(command, input=text, capture_output=True, text=True, check=False).returncode


def compiler(*, tried: bool = True) -> list[str] | None:
    """The command of a C++20 compiler: that of the environment variable CXX, or the first on the path.

    Args:
        tried: whether the compiler must compile a line of C++20, which takes some tenths of a second.
    """
    named = os.environ.get("CXX")
    for command in [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]:
        if not command or shutil.which(command[0]) is None:
            continue
        run = [*command, "-std=c++20", "-fsyntax-only", "-xc++", "-"]
        if not tried or _succeeds(run, CPP20):
            return command
    return None


def ninja() -> list[str] | None:
    """The command of ninja: that of pip's package, or the one on the path."""
    if importlib.util.find_spec("ninja.__main__" if importlib.util.find_spec("ninja") else "ninja"):
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    return [found] if found else None


def missing_packages() -> list[str]:
    """The Python packages that a build lacks, as pip calls them."""
    found = [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    found += [] if ninja() else ["ninja"]
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    return found + ([] if int(version.partition(".")[0]) >= 77 else ["'setuptools>=77'"])


def missing(*, tried: bool = True) -> list[str]:
    """What a build lacks, Python packages first. `tried`: as of `compiler`."""
    found = missing_packages()
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        found.append(HEADERS)
    return found + ([] if compiler(tried=tried) else [COMPILER])


def _source() -> str:
    """What pip installed the package from: a URL, or the name of the distribution."""
    for found in importlib.metadata.distributions(path=[str(ROOT)]):
        if "fastgpt" in (found.read_text("top_level.txt") or "").split():
            origin = json.loads(found.read_text("direct_url.json") or "{}")
            url, vcs = origin.get("url"), origin.get("vcs_info", {}).get("vcs")
            return shlex.quote(f"{vcs}+{url}" if vcs else url) if url else found.metadata["Name"]
    return "fastgpt"


@functools.cache
def rebuild_hint() -> str:
    """Return the command that builds the kernels for the Python that runs, with what is missing for it."""
    absent = missing(tried=False)
    packages = [name for name in absent if name not in INSTALL]
    tools = [f"{name} ({INSTALL[name]})" for name in absent if name in INSTALL]
    options = "--no-build-isolation"
    if (ROOT / "setup.py").exists():
        command = f"pip install {options} -e {shlex.quote(str(ROOT))}"
    else:  # pip keeps wheels that it built, and so one without kernels
        command = f"pip install {options} --no-cache-dir --no-deps --force-reinstall {_source()}"
    if packages:
        command = f"pip install {' '.join(packages)} && {command}"
    return f"{command}, after installing {' and '.join(tools)}" if tools else command
