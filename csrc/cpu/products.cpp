#include "products.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastgpt {
namespace {

// Intel's manual, volume 1, chapter 18: the CPU has AMX-BF16, and the system saves the tiles of a thread.
bool detect_amx() {
#if defined(__x86_64__)
  constexpr unsigned OSXSAVE = 1u << 27, AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, TILE_STATE = 3u << 17;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & TILE_STATE) == TILE_STATE;
#else
  return false;
#endif
}

std::atomic<bool> amx{detect_amx()};

bool use_amx(std::optional<bool> on) { return amx.exchange(on.value_or(detect_amx())); }

STABLE_TORCH_LIBRARY_FRAGMENT(fastgpt, m) { m.def("use_amx_cpp(bool? on) -> bool"); }
STABLE_TORCH_LIBRARY_IMPL(fastgpt, CompositeExplicitAutograd, m) { m.impl("use_amx_cpp", TORCH_BOX(&use_amx)); }

}  // namespace

bool has_amx() { return amx.load(std::memory_order_relaxed); }

Tensor mm(const Tensor& a, const Tensor& b) { return std::get<0>(call_op<Tensor>("aten::mm", a, b)); }

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return std::get<0>(call_op<Tensor>("aten::linear", x, weight, bias));
}

}  // namespace fastgpt
