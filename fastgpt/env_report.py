"""`fastgpt info`: versions, devices, and for each op which backends there are and, where not, why."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from fastgpt import build_tools, extension
from fastgpt.backends import BACKENDS, OPS, available_backends, kernels_off
from fastgpt.console import run_command

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "tensorboard")


def package_version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The text that `fastgpt info` prints."""
    lines = [
        f"fastgpt {package_version('fastgpt-kernels')} on Python {platform.python_version()}, {platform.system()}"
    ]
    lines += [f"  {package:<14}{package_version(package)}" for package in PACKAGES]

    lines += [
        "",
        "devices",
        f"  cpu           {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
    ]
    for i in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)
        lines.append(f"  cuda:{i}        {name}, sm_{capability[0]}{capability[1]}")

    built = extension.build_info()
    lines += ["", "compiled kernels"]
    if built:
        oldest = ".".join(map(str, extension.OLDEST_TORCH))
        lines.append(
            f"  built for     torch {oldest} and later, with torch {built['torch']} and {built['compiler']}"
        )
        lines.append(f"  cpu variants  {built['variants']} (in use: {extension.variant() or 'none'})")
    lines.append(f"  cuda          {', '.join(extension.cuda_architectures()) or 'none'}")
    if extension.cuda_architectures():
        toolkit = ".".join(map(str, extension.cuda_toolkit() or ("unknown",)))
        lines.append(f"  cuda toolkit  {toolkit}")
        lines.append(f"  cublasLt      {extension.cublaslt_problem() or 'GELU in the epilogues of products'}")
    if extension.problem():
        lines.append(f"  {extension.problem()}")
        for name in build_tools.missing():
            install = build_tools.INSTALL.get(name, f"pip install {name}")
            lines.append(f"  missing       {name} ({install})")

    lines += ["", f"{'ops':<24}" + "".join(f"{backend:<12}" for backend in BACKENDS)]
    reasons: dict[str, str] = {}
    for op in OPS:
        found = available_backends(op)
        lines.append(f"  {op:<22}" + "".join(f"{'yes' if found[b] else '-':<12}" for b in BACKENDS))
        reasons |= {b: a.reason for b, a in found.items() if not a and not a.reason.endswith("yet")}
    lines += [f"  no {backend}: {reason}" for backend, reason in reasons.items()]
    return "\n".join(lines)


def check() -> list[str]:
    """For each device whose kernels are all off the reason, with what mends it."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return list(filter(None, map(kernels_off, devices)))


def main(*, checked: bool = False) -> int:
    """Print the report.

    Args:
        checked: whether to return 1 where a device has no kernels, and say why.
    """
    print(report())
    problems = check() if checked else []
    for problem in problems:
        print(f"fastgpt: error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
