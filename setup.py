"""Builds fastgpt: the package, and with PyTorch at hand its compiled kernels.

Metadata is in pyproject.toml. Here: where the packages lie, and the extensions —
`fastgpt._C` (build info) and one library of CPU kernels per instruction set, of which
`fastgpt.extension` loads the one that fits. Nothing is ever compiled for "native".
"""

import os
import platform
from pathlib import Path
from typing import ClassVar

from setuptools import setup

CPU_SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
X86 = platform.machine() in ("x86_64", "AMD64")

# Compiler flags by instruction set; csrc/bindings.cpp says what a CPU must have for each.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
CPU_VARIANTS = {"plain": []}
if X86:
    CPU_VARIANTS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}

# No -ffast-math: NaN and infinity keep their meaning. -fno-math-errno and -fno-trapping-math only
# drop side effects that nobody reads and let the compiler vectorise.
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-g0",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]

# `build_ext --sanitize`, as `make asan` calls it. Optimised so far that multiplications and additions are
# fused as in the kernels that ship: some tests are as strict as that. Under the -fwrapv that Python was compiled with,
# no signed overflow would be one. GCC 12 takes the undefined vectors of its own intrinsics for mistakes of ours.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE_COMPILING = [
    *("-O1", "-fexpensive-optimizations", "-fno-wrapv", "-g", "-fno-omit-frame-pointer"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    *SANITIZE,
]


def compiled() -> dict:
    """The ext_modules and cmdclass arguments of `setup`; empty without PyTorch (a pure-Python install)."""
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"fastgpt: building without compiled kernels ({error}); `fastgpt info` says how to add them")
        return {}

    class BuildVariants(BuildExtension):
        """Compiles the same sources for several instruction sets, each in a build folder of its own."""

        user_options: ClassVar = [
            *BuildExtension.user_options,
            ("sanitize", None, "let the kernels check their reads, writes and arithmetic (gcc)"),
            ("variants=", None, "the instruction sets to build for (all of them)"),
        ]
        boolean_options: ClassVar = [*BuildExtension.boolean_options, "sanitize"]

        def initialize_options(self) -> None:
            super().initialize_options()
            self.sanitize, self.variants = False, " ".join(CPU_VARIANTS)

        def build_extension(self, extension) -> None:
            variant = extension.name.partition("._cpu_")[2]
            if variant and variant not in self.variants.split():
                return
            if variant and self.sanitize:
                extension.extra_compile_args += SANITIZE_COMPILING
                extension.extra_link_args += SANITIZE
            outer, self.build_temp = self.build_temp, os.path.join(self.build_temp, extension.name)
            try:
                super().build_extension(extension)
            finally:
                self.build_temp = outer

    variants = " ".join(CPU_VARIANTS)
    extensions = [
        CppExtension(
            "fastgpt._C",
            ["csrc/bindings.cpp"],
            include_dirs=[pybind11.get_include()],
            define_macros=[
                ("FASTGPT_TORCH", f'"{torch.__version__}"'),
                ("FASTGPT_VARIANTS", f'"{variants}"'),
            ],
            extra_compile_args=CXX_FLAGS,
        )
    ]
    for name, flags in CPU_VARIANTS.items():
        extensions.append(
            CppExtension(
                f"fastgpt._cpu_{name}",
                CPU_SOURCES,
                include_dirs=[os.path.abspath("csrc/cpu")],
                extra_compile_args=[*CXX_FLAGS, *flags],
            )
        )
    cmdclass = {"build_ext": BuildVariants.with_options(no_python_abi_suffix=True, use_ninja=True)}
    return {"ext_modules": extensions, "cmdclass": cmdclass}


setup(
    packages=["fastgpt", "fastgpt.ops", "fastgpt.reference", "fastgpt.kernels"],
    # kernels/ itself is no package: a top-level package of that name would shadow Hugging Face's.
    package_dir={"fastgpt": "fastgpt", "fastgpt.kernels": "kernels/triton"},
    **compiled(),
)
