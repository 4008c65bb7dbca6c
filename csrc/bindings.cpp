// The pybind11 module fastgpt._C: how the extension was built, and which of its CPU libraries this CPU can run. It does
// not link PyTorch, so it can be imported, and the problem reported, if the kernels do not load.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = FASTGPT_VERSION;
  info["torch"] = FASTGPT_TORCH;  // whose headers were used
  info["variants"] = FASTGPT_VARIANTS;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  std::istringstream architectures(FASTGPT_CUDA_ARCHITECTURES);
  info["cuda_architectures"] =
      std::vector<std::string>{std::istream_iterator<std::string>(architectures), std::istream_iterator<std::string>()};
  return info;
}

#if defined(__x86_64__)
// Whether the CPU multiplies bfloat16 on the tiles of AMX, and Linux lets this process use them: it saves 8 KiB more
// for each thread that does, and wants to be asked.
bool has_tiles() {
#if defined(__linux__)
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;  // in edx of leaf 7
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BF16) && (d & TILE) &&
         syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

// The instruction-set variants that this CPU can run. CPU_VARIANTS in setup.py defines them.
std::vector<std::string> cpu_variants() {
  std::vector<std::string> usable{"plain"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) usable.push_back("avx2");
  if (avx512) usable.push_back("avx512");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16) usable.push_back("avx512_bf16");
  if (bf16 && has_tiles()) usable.push_back("amx");
#endif
  return usable;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of fastgpt's compiled kernels.";
  m.def(
      "build_info",
      &build_info,
      "How the extension was built: version, torch, variants, compiler, CUDA architectures.");
  m.def("cpu_variants", &cpu_variants, "The instruction-set variants that this CPU can run.");
}
