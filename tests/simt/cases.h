// Runs kernels by name from Python. Each kernel reads and writes floats.
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

// Runs the case of this name. Returns the error message, or an empty string.
template <size_t N>
const char* run_case(
    const Case (&cases)[N], const char* name, const float* in, int64_t in_size, float* out, int64_t out_size) {
  static std::string message;
  message = "there is no such case";
  for (const Case& c : cases)
    if (std::strcmp(c.name, name) == 0) try {
        c.run(c, global_memory(in, in_size), global_memory(out, out_size));
        finish();
        message.clear();
      } catch (const std::exception& error) {
        message = error.what();
      }
  return message.c_str();
}

}  // namespace fastgpt

#define FASTGPT_EXPORTED extern "C" __attribute__((visibility("default")))
