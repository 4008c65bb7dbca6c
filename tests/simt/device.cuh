// The host versions of the functions in csrc/cuda/device.cuh. They act on simt::Machine.
//
// The matrix instructions are implemented from the figures of the PTX ISA (sections "mma" and "ldmatrix"), not from
// what the kernels expect. Their sums are truncated as tensor cores truncate them.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "machine.h"

#define FASTGPT_DISPATCH_KEY CPU
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)  // emulator.py moves it into the body, where it is checked

namespace fastgpt {

using simt::Access;
using simt::Machine;
constexpr int WARP = simt::WARP;

// ---- numbers ----

using bf16 = c10::BFloat16;
using fp16 = c10::Half;

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return x; }
inline float to_float(fp16 x) { return x; }

template <typename T>
inline T from_float(float x) {
  return static_cast<T>(x);
}

template <typename T>
inline uint32_t pack(float first, float second) {
  const T both[2] = {static_cast<T>(first), static_cast<T>(second)};
  uint32_t bits;
  std::memcpy(&bits, both, 4);
  return bits;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? 0.0f * x : x; }
inline float multiply_rounded(float a, float b) { return a * b; }
// With SIMT_INEXACT the result is up to 2 ulp away from the exact one, as that of the GPU's MUFU unit. The error is a
// pure function of the argument. 0, infinity and powers of two stay exact.
inline float mufu(float exact, float x) {
#ifdef SIMT_INEXACT
  const uint32_t mixed = (bits_of(x) ^ bits_of(x) >> 15) * 2654435761u, mantissa = bits_of(exact) & 0x7FFFFFu;
  if (std::isnormal(exact) && mantissa >= 2 && mantissa < 0x7FFFFEu)
    exact = float_of(bits_of(exact) + (mixed >> 16) % 5 - 2);
#endif
  return flushed(exact);
}
inline float exp2_fast(float x) { return mufu(std::exp2(flushed(x)), x); }
inline float rsqrt_fast(float x) { return mufu(1.0f / std::sqrt(flushed(x)), x); }

struct Fast {
  static float exp2(float x) { return exp2_fast(x); }
  static float rsqrt(float x) { return rsqrt_fast(x); }
};

// ---- global memory ----

// A pointer with the bounds of its tensor.
template <typename T>
class Global {
 public:
  Global() = default;
  Global(T* begin, int64_t elements) : begin_(begin), end_(begin + elements), at_(reinterpret_cast<intptr_t>(begin)) {}
  operator Global<const T>() const {
    Global<const T> other(begin_, end_ - begin_);
    return other + (at_ - reinterpret_cast<intptr_t>(begin_)) / static_cast<int64_t>(sizeof(T));
  }
  explicit operator bool() const { return begin_ != nullptr; }
  // Integer arithmetic: computing an address outside the tensor is allowed, accessing it is a fault.
  Global operator+(int64_t n) const {
    Global moved = *this;
    moved.at_ += n * static_cast<int64_t>(sizeof(T));
    return moved;
  }
  Global operator-(int64_t n) const { return *this + -n; }
  Global& operator+=(int64_t n) { return *this = *this + n; }
  uintptr_t address() const { return static_cast<uintptr_t>(at_); }
  T* touch(int count, Access access) const {
    Machine::get().global(reinterpret_cast<const void*>(at_), count * sizeof(T), begin_, end_, access);
    return reinterpret_cast<T*>(at_);
  }

 private:
  T *begin_ = nullptr, *end_ = nullptr;
  intptr_t at_ = 0;
};

template <typename T>
Global<T> global_memory(T* begin, int64_t elements) {
  return {begin, elements};
}

template <typename T>
inline uintptr_t address(Global<T> p) {
  return p.address();
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <typename T>
inline std::remove_const_t<T> load(Global<T> p) {
  return *p.touch(1, Access::READ);
}
template <typename T, typename V>
inline void store(Global<T> p, V value) {
  *p.touch(1, Access::WRITE) = value;
}
template <int N, typename T>
inline Vector<std::remove_const_t<T>, N> load_vector(Global<T> p) {
  Vector<std::remove_const_t<T>, N> value;
  std::memcpy(&value, p.touch(N, Access::READ), sizeof(value));
  return value;
}
template <typename T, int N>
inline void store_vector(Global<T> p, const Vector<T, N>& value) {
  std::memcpy(p.touch(N, Access::WRITE), &value, sizeof(value));
}
template <typename T>
inline Global<T> advance(Global<T> p, uint32_t count, uint32_t size) {
  return p + static_cast<int64_t>(uint64_t{count} * size / sizeof(T));
}
inline void atomic_add(Global<float> p, float value) { *p.touch(1, Access::ADD) += value; }
inline void atomic_add_pair(Global<float> p, float first, float second) {
  float* const at = p.touch(2, Access::ADD);
  at[0] += first;
  at[1] += second;
}

// ---- shared memory ----

using SharedAddress = uint32_t;

inline SharedAddress shared_memory() { return Machine::SHARED_BEGIN; }
template <typename T>
inline T opaque(T a) {
  return a;
}

template <typename T>
inline T load_shared_of(int rank, SharedAddress a) {
  T value;
  std::memcpy(&value, Machine::get().shared(rank, a, sizeof(T), Access::READ), sizeof(T));
  return value;
}
template <typename T>
inline T load_shared(SharedAddress a) {
  return load_shared_of<T>(Machine::get().self().rank, a);
}
template <typename T>
inline void store_shared(SharedAddress a, const T& value) {
  std::memcpy(Machine::get().shared(Machine::get().self().rank, a, sizeof(T), Access::WRITE), &value, sizeof(T));
}

template <typename T>
inline void copy_async(SharedAddress to, Global<T> from, bool valid = true) {
  constexpr int COUNT = 16 / sizeof(T);
  Machine::get().copy(to, valid ? from.touch(COUNT, Access::READ) : nullptr);
}
inline void commit_copies() { Machine::get().commit(); }
template <int N>
inline void wait_copies() {
  Machine::get().wait_for_copies(N);
}

// ---- tensor cores ----

inline void load_matrices_as(uint32_t (&r)[4], SharedAddress row, bool transposed, const char* name) {
  // Each lane reads its own row. The warp then distributes the elements.
  struct Slot {
    uint16_t row[8];
    uint32_t r[4];
  } mine{};
  std::memcpy(mine.row, Machine::get().shared(Machine::get().self().rank, row, 16, Access::READ), 16);
  mine = Machine::get().warp_operation(name, mine, [&](Slot** lanes) {
    for (int l = 0; l < WARP; ++l)
      for (int i = 0; i < 4; ++i) {
        const auto element = [&](int y, int x) -> uint32_t { return lanes[8 * i + y]->row[x]; };
        const int y = l / 4, x = 2 * (l % 4);
        lanes[l]->r[i] = transposed ? element(x, y) | element(x + 1, y) << 16 : element(y, x) | element(y, x + 1) << 16;
      }
  });
  std::copy(mine.r, mine.r + 4, r);
}
inline void load_matrices(uint32_t (&r)[4], SharedAddress row) { load_matrices_as(r, row, false, "ldmatrix"); }
inline void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
  load_matrices_as(r, row, true, "ldmatrix.trans");
}

struct Fragments {
  float c[4];
  uint32_t a[4], b[2];
};

// Adds products to c as a tensor core does (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor
// cores", PeerJ CS 7:e330, 2021; Ootomo, Yokota, IJHPCA 36(4), 2022). The terms of one addition are aligned to the
// largest exponent and truncated, and so is their sum. As on an A100, one addition takes c and the products of 16 bytes
// of a row. 25 bits of a term are kept, the smallest number that these papers found.
template <int K, int TERMS>
inline float tensor_core_sum(double c, const double (&products)[K]) {
  constexpr int BITS = 25;
  const auto exponent = [](double x) { return static_cast<int>(std::bit_cast<uint64_t>(x) >> 52 & 0x7FF) - 1023; };
  for (int first = 0; first < K; first += TERMS) {
    double largest = std::fabs(c);
    bool finite = std::isfinite(c);
    for (int k = first; k < first + TERMS; ++k) {
      largest = std::max(largest, std::fabs(products[k]));
      finite = finite && std::isfinite(products[k]);
    }
    if (!finite) {
      for (int k = first; k < first + TERMS; ++k) c += products[k];
    } else if (largest > 0) {
      const double unit = std::ldexp(1.0, exponent(largest) - (BITS - 1));
      const auto aligned = [&](double x) { return static_cast<int64_t>(x / unit); };
      int64_t sum = aligned(c);
      for (int k = first; k < first + TERMS; ++k) sum += aligned(products[k]);
      const int surplus = std::bit_width(static_cast<uint64_t>(std::abs(sum))) - 24;
      if (surplus > 0) sum = sum / (int64_t{1} << surplus) * (int64_t{1} << surplus);
      c = static_cast<double>(sum) * unit;
    }
  }
  return static_cast<float>(c);
}

// c += a b for matrices of 16×K and K×8. value(bits, h) is element h of a register.
template <int K, int PER_REGISTER, typename Value>
inline void multiply_add_as(
    float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* name, Value value) {
  const Fragments mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Fragments result = Machine::get().warp_operation(name, mine, [&](Fragments** lanes) {
    float left[16][K], right[K][8];
    for (int l = 0; l < WARP; ++l) {
      const int group = l >> 2, in_group = l % 4;
      for (int i = 0; i < 4; ++i)  // registers of a: rows group and group + 8, then the right half
        for (int h = 0; h < PER_REGISTER; ++h)
          left[group + 8 * (i % 2)][PER_REGISTER * in_group + h + K / 2 * (i / 2)] = value(lanes[l]->a[i], h);
      for (int i = 0; i < 2; ++i)  // registers of b: the upper and the lower half
        for (int h = 0; h < PER_REGISTER; ++h)
          right[PER_REGISTER * in_group + h + K / 2 * i][group] = value(lanes[l]->b[i], h);
    }
    for (int l = 0; l < WARP; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = (l >> 2) + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
        double products[K];
        for (int k = 0; k < K; ++k) products[k] = static_cast<double>(left[row][k]) * right[k][column];
        lanes[l]->c[i] = tensor_core_sum<K, 4 * PER_REGISTER>(lanes[l]->c[i], products);
      }
  });
  std::copy(result.c, result.c + 4, c);
}

template <typename T>
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_add_as<16, 2>(c, a, b0, b1, "mma.m16n8k16", [](uint32_t bits, int half) {
    const uint16_t part = static_cast<uint16_t>(bits >> 16 * half);
    T x;
    std::memcpy(&x, &part, 2);
    return static_cast<float>(x);
  });
}
inline void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_add_as<8, 1>(c, a, b0, b1, "mma.m16n8k8", [](uint32_t bits, int) { return float_of(bits & 0xFFFFE000u); });
}

// ---- threads ----

inline int thread() { return Machine::get().self().index; }
inline int lane() { return Machine::get().self().lane(); }
inline int warp() { return Machine::get().self().index / WARP; }
inline int threads() { return Machine::get().shape().threads; }
inline int block_x() { return static_cast<int>(Machine::get().block().x); }
inline int block_y() { return static_cast<int>(Machine::get().block().y); }
inline int blocks_x() { return static_cast<int>(Machine::get().shape().x); }

inline void sync_block() { Machine::get().sync_block(); }
inline void sync_warp() { Machine::get().sync_warp(); }
inline void sync_named(int barrier, int count) { Machine::get().sync_named(barrier, count); }
inline void sync_cluster() { Machine::get().sync_cluster(); }
inline int cluster_rank() { return Machine::get().self().rank; }

template <typename T>
inline T shuffle_xor(T value, int mask) {
  struct Slot {
    T value;
    int mask;
  };
  const Slot result = Machine::get().warp_operation("a shuffle", Slot{value, mask}, [&](Slot** lanes) {
    T all[WARP];
    for (int l = 0; l < WARP; ++l) all[l] = lanes[l]->value;
    for (int l = 0; l < WARP; ++l) {
      const int from = l ^ lanes[l]->mask;
      if (from < 0 || from >= WARP) simt::fault("a shuffle from lane ", from);
      lanes[l]->value = all[from];
    }
  });
  return result.value;
}
inline int warp_uniform(int x) {
  return Machine::get().warp_operation("a shuffle from lane 0", x, [&](int** lanes) {
    for (int l = 1; l < WARP; ++l) *lanes[l] = *lanes[0];
  });
}
inline bool any_lane(bool x) {
  return Machine::get().warp_operation("a vote", x, [&](bool** lanes) {
    bool any = false;
    for (int l = 0; l < WARP; ++l) any |= *lanes[l];
    for (int l = 0; l < WARP; ++l) *lanes[l] = any;
  });
}

// ---- host side ----

// The functions of cublasLt.h in this folder.
#define FASTGPT_CUBLASLT(name) decltype(&cublasLt##name) name = &cublasLt##name

class Device {
 public:
  explicit Device(int) {}
  int index() const { return 0; }
  void* stream() const { return nullptr; }
  int shared_bytes() const { return Machine::get().device.shared_bytes; }
  bool has_clusters() const { return Machine::get().device.has_clusters; }
  int multiprocessors() const { return 4; }
};

struct Launch {
  int64_t x = 1, y = 1, z = 1;
  int threads = 0, shared = 0, cluster = 1;
};

template <auto KERNEL, typename... Arguments>
void launch(const Device&, const char* name, const Launch& shape, Arguments... arguments) {
  Machine::get().launch(
      name, {shape.x, shape.y, shape.z, shape.threads, shape.shared, shape.cluster}, [=] { KERNEL(arguments...); });
}

}  // namespace fastgpt
