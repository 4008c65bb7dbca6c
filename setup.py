"""Build fastgpt: the package and, where PyTorch is installed, its compiled kernels.

Metadata is in pyproject.toml. Here: where the packages lie, and the extensions —
`fastgpt._C` (build info), one library of CPU kernels per instruction set (`fastgpt.extension`
loads the one that fits), and where there is nvcc one of CUDA kernels. Nothing is ever compiled for "native".

The libraries use PyTorch's stable ABI, of 2.11: one build serves every later PyTorch. They are compiled by ninja.
"""

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# The commands of setuptools that compile, those that pip calls included.
BUILDS = {"build", "build_ext", "bdist_wheel", "develop", "editable_wheel", "install"}
TOOLS = runpy.run_path("fastgpt/build_tools.py")  # importing fastgpt needs PyTorch
VERSION = re.search(r'__version__ = "(.+)"', Path("fastgpt/__init__.py").read_text())[1]
X86 = platform.machine() in ("x86_64", "AMD64")

# Compiler flags by instruction set; csrc/bindings.cpp says what a CPU must have for each.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
CPU_VARIANTS = {"plain": []}
if X86:
    BF16 = [*AVX512, "-mavx512bf16"]
    CPU_VARIANTS |= {
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": BF16,
        "amx": [*BF16, "-mamx-tile", "-mamx-bf16"],
    }

# No -ffast-math: NaN and infinity keep their meaning. -fno-math-errno and -fno-trapping-math only
# drop side effects that nobody reads and let the compiler vectorise.
CXX_FLAGS = [
    *("-O3", "-std=c++20", "-g0", "-DNDEBUG", "-fPIC", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math"),
]
# PyTorch's stable ABI, of 2.11: no symbol that this version lacks.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# `build_ext --sanitize`, as `make asan` calls it. Optimised so far that multiplications and additions are
# fused as in the kernels that ship: some tests are as strict as that. Under the -fwrapv that Python was compiled with,
# no signed overflow would be one. GCC 12 takes the undefined vectors of its own intrinsics for mistakes of ours.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE_COMPILING = [
    *("-O1", "-fexpensive-optimizations", "-fno-wrapv", "-g", "-fno-omit-frame-pointer"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    *SANITIZE,
]

# The CUDA kernels are compiled for these unless TORCH_CUDA_ARCH_LIST or --cuda-architectures says otherwise. The last
# is PTX, for whatever comes later: of 9.0, since the launchers expect of every GPU from there on that it has clusters.
CUDA_ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120", "compute_90")
# The names that PyTorch takes in TORCH_CUDA_ARCH_LIST beside numbers.
NAMED_ARCHITECTURES = {
    **{"Kepler+Tesla": "3.7", "Kepler": "3.5+PTX", "Maxwell+Tegra": "5.3", "Maxwell": "5.0 5.2+PTX"},
    **{"Pascal": "6.0 6.1+PTX", "Volta+Tegra": "7.2", "Volta": "7.0+PTX", "Turing": "7.5+PTX"},
    **{"Ampere+Tegra": "8.7", "Ampere": "8.0 8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX"},
    **{"Blackwell+Tegra": "11.0", "Blackwell": "10.0 10.3 12.0 12.1+PTX"},
}
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr"),
    # The last is STABLE_ABI: bench/codegen evaluates this list alone.
    *("--expt-extended-lambda", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
]


def find_nvcc() -> str | None:
    """CUDA_HOME's, else that on the path, else the usual place's."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = [str(Path(home) / "bin" / "nvcc")] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next(filter(None, map(shutil.which, found)), None)


def cuda_architectures(asked: str, nvcc: str) -> list[str]:
    """From a list as in TORCH_CUDA_ARCH_LIST ("8.0;9.0a", "Hopper") to nvcc's names; says what is left out."""
    known = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout.split()
    names: list[str] = []
    for word in re.split(r"[;,\s]+", asked.strip(" ;,")):
        if word in ("", "All", "Common"):
            names += CUDA_ARCHITECTURES
            continue
        named = NAMED_ARCHITECTURES.get(word) or NAMED_ARCHITECTURES.get(word.removesuffix("+PTX"), word)
        for number in named.split():
            found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", number)
            if not found:
                print(
                    f"fastgpt: no CUDA kernels for {word!r}, which is no architecture; write 8.0, 9.0a or 9.0+PTX"
                )
                continue
            major, minor, kind, ptx = found.groups()
            names += [f"sm_{major}{minor}{kind}"] + [f"compute_{major}{minor}{kind}"] * (ptx is not None)
    usable = []
    for name in dict.fromkeys(names):
        number = int(re.sub(r"\D", "", name))
        if f"compute_{number}" not in known:
            print(f"fastgpt: no CUDA kernels for {name}, which this nvcc does not know")
        elif number < 80 or (name.startswith("compute") and number < 90):
            print(f"fastgpt: no CUDA kernels for {name}: they need 8.0, as PTX 9.0")
        else:
            usable.append(name)
    return usable


def toolkit_version(nvcc: str) -> str:
    """Return the version of nvcc, such as "13.0"."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def run_ninja(folder: Path, lines: list[str], *, quiet: bool = False) -> None:
    """Build all targets of these lines of ninja in a folder; one line a step, unless quiet."""
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    print(end="", flush=True)
    subprocess.run([*TOOLS["ninja"](), "-C", folder, *jobs, *["--quiet"] * quiet], check=True)


def escaped(path: Path) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path.resolve()))


def note(folder: Path, name: str, text: str) -> Path:
    """Write a source that holds a text: `fastgpt.extension` reads it of the library without loading it."""
    source = folder / f"{name}.cpp"
    line = f'extern "C" __attribute__((used)) const char fastgpt_{name}[] = "{text}";\n'
    if not source.exists() or source.read_text() != line:
        source.write_text(line)
    return source


def cpu_compiler(torch_folder: Path) -> list[str]:
    """The command that compiles a CPU kernel, without the flags of an instruction set."""
    include = [f"-I{Path('csrc/cpu').resolve()}", f"-I{torch_folder / 'include'}"]
    return [*TOOLS["compiler"](), *CXX_FLAGS, STABLE_ABI, *include]


def build_cpu(
    libraries: dict[str, Path],
    folder: Path,
    torch_folder: Path,
    *,
    sanitize: bool = False,
    quiet: bool = False,
) -> None:
    """All of csrc/cpu as one library for each variant, by ninja."""
    folder.mkdir(parents=True, exist_ok=True)
    compiling = shlex.join([*cpu_compiler(torch_folder), *(SANITIZE_COMPILING if sanitize else [])])
    linking = [*TOOLS["compiler"](), "-shared", *(SANITIZE if sanitize else [])]
    if sys.platform == "darwin":
        needed = ["-undefined", "dynamic_lookup"]
    else:
        needed = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    lines = [
        *("rule compile", f"  command = {compiling} $flags -MD -MF $out.d -c $in -o $out"),
        *("  depfile = $out.d", "  deps = gcc", "  description = $what"),
        *("rule link", f"  command = {shlex.join(linking)} -o $out $in {shlex.join(needed)}"),
        "  description = $what",
    ]
    for variant, library in libraries.items():
        library.parent.mkdir(parents=True, exist_ok=True)
        objects = []
        label = note(folder, f"kernels_{variant}", f"fastgpt kernels: {variant}; version: {VERSION};")
        for source in [*sorted(Path("csrc/cpu").glob("*.cpp")), label]:
            objects.append(f"{variant}/{source.stem}.o")
            lines += [
                f"build {objects[-1]}: compile {escaped(source)}",
                f"  flags = {' '.join(CPU_VARIANTS[variant])}",
                f"  what = {variant}: {source.name}",
            ]
        lines += [f"build {escaped(library)}: link {' '.join(objects)}", f"  what = {library.name}"]
    run_ninja(folder, lines, quiet=quiet)


def build_cuda(library: Path, folder: Path, nvcc: str, architectures: list[str], torch_folder: Path) -> None:
    """All of csrc/cuda as one library without Python, by ninja. That it runs shows only where there is a GPU."""
    folder = folder.resolve()  # ninja works in it
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    text = f"fastgpt architectures: {' '.join(architectures)}; toolkit: {toolkit_version(nvcc)};"
    label = note(folder, "architectures", text)
    libraries = [torch_folder / "lib"]
    if not (torch_folder / "lib" / "libtorch_cuda.so").exists():  # its name will do
        stub = folder / "stub" / "libtorch_cuda.so"
        stub.parent.mkdir(exist_ok=True)
        subprocess.run(
            ["g++", "-shared", "-Wl,-soname,libtorch_cuda.so", "-xc++", os.devnull, "-o", stub], check=True
        )
        libraries.append(stub.parent)
    # cublasLt.h, which PyTorch's wheels bring along in a package of their own: the toolkit's headers go first.
    more = [path.parent for path in torch_folder.parent.glob("nvidia/*/include/cublasLt.h")]
    codes = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in architectures]
    flags = [
        *NVCC_FLAGS,
        *codes,
        "--threads=4",
        f"-I{Path('csrc/cuda').resolve()}",
        f"-I{torch_folder / 'include'}",
        *(f"-Xcompiler=-idirafter,{path}" for path in more),
    ]
    needed = [*(f"-L{path}" for path in libraries), "-ltorch_cpu", "-ltorch_cuda", "-lc10"]
    sources = [*sorted(Path("csrc/cuda").resolve().glob("*.cu")), label]
    objects = {source: f"{source.stem}.o" for source in sources}
    lines = [
        *("rule compile", "  depfile = $out.d", "  deps = gcc"),
        f"  command = {nvcc} {' '.join(flags)} -MD -MF $out.d -c $in -o $out",
        *(
            "rule link",
            f"  command = {nvcc} -shared -nodlink -Xlinker=--no-as-needed -o $out $in {' '.join(needed)}",
        ),
        *(f"build {target}: compile {escaped(source)}" for source, target in objects.items()),
        f"build {escaped(library)}: link {' '.join(objects.values())}",
    ]
    run_ninja(folder, lines)


def best_variant(capabilities: dict[str, object]) -> str:
    """The most demanding variant for a CPU of these capabilities, by PyTorch's names for them."""
    wanted = {"plain": (), "avx2": ("avx2", "fma3", "f16c", "bmi2")}
    wanted["avx512"] = (*wanted["avx2"], "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")
    wanted["avx512_bf16"] = (*wanted["avx512"], "avx512_bf16")
    wanted["amx"] = (*wanted["avx512_bf16"], "amx_bf16", "amx_tile")
    return [name for name in CPU_VARIANTS if all(map(capabilities.get, wanted[name]))][-1]


class BuildKernels(build_ext):
    """Compiles the same sources for several instruction sets, and the CUDA kernels where there is nvcc."""

    # An editable installation initializes the options again, from those of the command of this name.
    command_name = "build_ext"
    user_options: ClassVar = [
        *build_ext.user_options,
        ("sanitize", None, "let the kernels check their reads, writes and arithmetic (gcc)"),
        ("variants=", None, "the instruction sets to build for (all of them); best: that of this CPU alone"),
        (
            "cuda",
            None,
            "build the CUDA kernels though this PyTorch is not for CUDA (to be carried to one that is)",
        ),
        ("no-cuda", None, "leave the CUDA kernels out, as in a wheel for everybody"),
        ("cuda-architectures=", None, 'what to compile them for, as in TORCH_CUDA_ARCH_LIST: "8.0;9.0a"'),
    ]
    boolean_options: ClassVar = [*build_ext.boolean_options, "sanitize", "cuda", "no-cuda"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize, self.variants = False, " ".join(CPU_VARIANTS)
        self.cuda, self.no_cuda, self.cuda_architectures = (
            False,
            False,
            os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
        )

    def finalize_options(self) -> None:
        import torch

        super().finalize_options()
        self.torch_folder = Path(torch.__file__).parent
        self.nvcc = find_nvcc() if self.cuda or (torch.version.cuda and not self.no_cuda) else None
        if self.cuda and not self.nvcc:
            raise SystemExit("fastgpt: --cuda needs nvcc, on the PATH or in CUDA_HOME")
        self.compiled_for = cuda_architectures(self.cuda_architectures, self.nvcc) if self.nvcc else []
        if self.cuda and not self.compiled_for:
            raise SystemExit(
                f"fastgpt: none of the architectures {self.cuda_architectures!r} can be compiled for"
            )
        if self.variants == "best":
            # Linux may refuse a process the tiles that the CPU has.
            tiles = getattr(torch.cpu, "_init_amx", bool)()
            self.variants = best_variant({**torch.cpu.get_capabilities(), "amx_tile": tiles})
        unwanted = {f"fastgpt._cpu_{name}" for name in CPU_VARIANTS if name not in self.variants.split()}
        unwanted |= set() if self.compiled_for else {"fastgpt._cuda"}
        self.extensions = [e for e in self.extensions if e.name not in unwanted]

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # the kernels are for every Python

    def build_extensions(self) -> None:
        libraries = {
            variant: Path(self.get_ext_fullpath(extension.name))
            for extension in self.extensions
            if (variant := extension.name.partition("._cpu_")[2])
        }
        if libraries:
            quiet = not self.distribution.verbose
            folder = Path(self.build_temp) / "cpu"
            build_cpu(libraries, folder, self.torch_folder, sanitize=self.sanitize, quiet=quiet)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "fastgpt._cuda":
            self.build_cuda_extension(ext)
        elif ext.name == "fastgpt._C":
            import pybind11
            import torch

            ext.include_dirs = [pybind11.get_include()]
            texts = {"TORCH": torch.__version__, "CUDA_ARCHITECTURES": " ".join(self.compiled_for)}
            texts |= {"VARIANTS": " ".join(CPU_VARIANTS), "VERSION": VERSION}
            ext.define_macros = [(f"FASTGPT_{name}", f'"{text}"') for name, text in texts.items()]
            super().build_extension(ext)

    def build_cuda_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        folder = Path(self.build_temp) / ext.name
        arguments = (library, folder, self.nvcc, self.compiled_for, self.torch_folder)
        if self.cuda:
            return build_cuda(*arguments)
        try:
            build_cuda(*arguments)
        except (subprocess.CalledProcessError, OSError) as error:
            # An older library, for other sources, must not be loaded beside the new ones.
            library.unlink(missing_ok=True)
            ext.optional = True
            print(
                f"fastgpt: warning: the CUDA kernels could not be built ({error}; the compiler's messages are "
                "above); the CPU's are. --cuda makes this an error"
            )


def compiled() -> dict:
    """The ext_modules and cmdclass arguments of `setup`; empty for an installation without compiled kernels."""
    off = "building without compiled kernels"
    try:
        import torch
    except ImportError as error:
        print(f"fastgpt: {off} ({error}); `fastgpt info` says how to add them")
        return {}
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        print(f"fastgpt: {off}: they need torch 2.11 or later, and this is {torch.__version__}")
        return {}
    if tools := [name for name in TOOLS["missing"]() if name in TOOLS["INSTALL"]]:
        print(f"fastgpt: {off}: missing " + "; ".join(f"{name} ({TOOLS['INSTALL'][name]})" for name in tools))
        return {}
    packages = " ".join(TOOLS["missing_packages"]())
    if packages and BUILDS.intersection(sys.argv):
        raise SystemExit(f"fastgpt: the C++ kernels need {packages} to be built: pip install {packages}")
    module = Extension("fastgpt._C", ["csrc/bindings.cpp"], extra_compile_args=CXX_FLAGS, language="c++")
    libraries = [Extension(f"fastgpt.{name}", []) for name in (*(f"_cpu_{v}" for v in CPU_VARIANTS), "_cuda")]
    return {"ext_modules": [module, *libraries], "cmdclass": {"build_ext": BuildKernels}}


setup(
    packages=[
        *find_packages(include=["fastgpt", "fastgpt.*"], exclude=["fastgpt.kernels"]),
        "fastgpt.kernels",
    ],
    package_data={"fastgpt.evaluation.tasks": ["templates/*.toml"]},
    # kernels/ itself is no package: a top-level package of that name would shadow Hugging Face's.
    package_dir={"fastgpt": "fastgpt", "fastgpt.kernels": "kernels/triton"},
    **compiled(),
)
