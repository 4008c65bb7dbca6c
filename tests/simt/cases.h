// Kernels that Python calls by a name, each from some floats to some floats.
#pragma once

#include <cstring>
#include <device.cuh>
#include <stdexcept>
#include <string>

namespace fastgpt {

using In = Global<const float>;
using Out = Global<float>;

struct Case {
  const char* name;
  Launch shape;
  void (*run)(const Case&, In, Out);
};

template <auto KERNEL>
void run(const Case& c, In in, Out out) {
  launch<KERNEL>(Device(0), c.name, c.shape, in, out);
}

inline void finish() {
#ifdef __CUDACC__
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
#endif
}

// What was wrong with the case of that name; nothing if all is well.
template <size_t N>
const char* run_case(
    const Case (&cases)[N], const char* name, const float* in, int64_t in_size, float* out, int64_t out_size) {
  static std::string said;
  said = "there is no such case";
  for (const Case& c : cases)
    if (std::strcmp(c.name, name) == 0) try {
        c.run(c, global_memory(in, in_size), global_memory(out, out_size));
        finish();
        said.clear();
      } catch (const std::exception& error) {
        said = error.what();
      }
  return said.c_str();
}

}  // namespace fastgpt

#define FASTGPT_EXPORTED extern "C" __attribute__((visibility("default")))
