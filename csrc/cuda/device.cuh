// Wrappers of PTX and CUDA intrinsics (emulated in tests/simt).
//
// Kernels access memory, other threads and the tensor cores only through these functions. tests/simt/device.cuh defines
// the same functions for the host. The same kernel sources then run on a CPU, and every access is checked. The include
// path decides which file <device.cuh> is. Nothing here belongs to a single op.
//
// Shared memory is addressed in bytes from the start of the block's shared memory, as the PTX instructions require.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdint>
#include <string>

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

#define FASTGPT_DISPATCH_KEY CUDA  // the key under which STABLE_TORCH_LIBRARY_IMPL registers the ops

namespace fastgpt {

constexpr int WARP = 32;

// ---- numbers ----

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(fp16 x) { return __half2float(x); }

// Rounds to nearest even.
template <typename T>
__device__ inline T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, fp16>) return __float2half_rn(x);
}

// Packs two 16-bit numbers into a register, the first into its low half.
template <typename T>
__device__ inline uint32_t pack(float first, float second) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(both);
  } else {
    const __half2 both = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(both);
  }
}

__device__ inline uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }

// A product that the compiler does not contract with an addition.
__device__ inline float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }

// One instruction each, accurate to 2 ulp. Subnormal results are flushed to 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float rsqrt_fast(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The parameter M of formulas.h.
struct Fast {
  __device__ static float exp2(float x) { return exp2_fast(x); }
  __device__ static float rsqrt(float x) { return rsqrt_fast(x); }
};

// ---- global memory ----

template <typename T>
using Global = T*;

template <typename T>
Global<T> global_memory(T* begin, int64_t elements) {
  return begin;
}

// The address that a pointer holds, in bytes.
template <typename T>
__device__ inline uintptr_t address(const T* p) {
  return reinterpret_cast<uintptr_t>(p);
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

template <typename T>
__device__ inline T load(const T* p) {
  return *p;
}
template <typename T, typename V>
__device__ inline void store(T* p, V value) {
  *p = value;
}

// Moves N neighbours at once. p is aligned to their size. 16 bytes are stored by an intrinsic, because the compiler
// otherwise emits four stores in some loops.
template <int N, typename T>
__device__ inline Vector<T, N> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T, N>*>(p);
}
template <typename T, int N>
__device__ inline void store_vector(T* p, const Vector<T, N>& value) {
  if constexpr (sizeof(value) == 16)
    __stwb(reinterpret_cast<uint4*>(p), __builtin_bit_cast(uint4, value));
  else
    *reinterpret_cast<Vector<T, N>*>(p) = value;
}

// p plus count · size bytes.
template <typename T>
__device__ inline T* advance(T* p, uint32_t count, uint32_t size) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + uint64_t{count} * size);
}

// Threads add in any order.
__device__ inline void atomic_add(float* p, float value) { atomicAdd(p, value); }
// Adds to two neighbours. The first is aligned to 8 bytes.
__device__ inline void atomic_add_pair(float* p, float first, float second) {
#if __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float2*>(p), make_float2(first, second));
#else
  atomicAdd(p, first);
  atomicAdd(p + 1, second);
#endif
}

// ---- shared memory ----

using SharedAddress = uint32_t;

// An optimization barrier: returns its argument, but hides the value from the compiler. Addresses computed from the
// result are then computed at the place of use and not hoisted out of a loop into registers.
__device__ inline uint32_t opaque(uint32_t a) {
  asm volatile("" : "+r"(a));
  return a;
}
template <typename T>
__device__ inline T* opaque(T* p) {
  asm volatile("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
  return p;
}

extern __shared__ __align__(1024) unsigned char fastgpt_shared_memory[];

__device__ inline SharedAddress shared_memory() {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(fastgpt_shared_memory));
}
template <typename T>
__device__ inline T load_shared(SharedAddress a) {
  return *static_cast<const T*>(__cvta_shared_to_generic(a));
}
template <typename T>
__device__ inline void store_shared(SharedAddress a, const T& value) {
  *static_cast<T*>(__cvta_shared_to_generic(a)) = value;
}

// Copies 16 bytes from global to shared memory asynchronously; zeros if not `valid`. wait_copies waits for the copy.
template <typename T>
__device__ inline void copy_async(SharedAddress to, const T* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
template <typename T>
__device__ inline void copy_async(SharedAddress to, const T* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// Closes a group of copies of this thread.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this thread but the last N. Other threads see the copies after a barrier.
template <int N>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- tensor cores ----

// Loads four 8×8 matrices of 16-bit numbers. Lane l passes the address of row l % 8 (16 bytes) of matrix l / 8.
// Register i then holds the elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of matrix i, or of its transpose.
__device__ inline void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// c (16×8) += a (16×16) b (16×8) of 16-bit numbers. The figures of the PTX ISA define which lane holds which element.
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c (16×8) += a (16×8) b (8×8) in tf32: the tensor core reads the upper 19 bits of each element of a and b.
__device__ inline void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- threads ----

__device__ inline int thread() { return threadIdx.x; }
__device__ inline int lane() { return threadIdx.x % WARP; }
__device__ inline int warp() { return threadIdx.x / WARP; }
__device__ inline int threads() { return blockDim.x; }
__device__ inline int block_x() { return blockIdx.x; }
__device__ inline int block_y() { return blockIdx.y; }
__device__ inline int blocks_x() { return gridDim.x; }

__device__ inline void sync_block() { __syncthreads(); }
__device__ inline void sync_warp() { __syncwarp(); }
// Synchronizes `count` threads of the block (a multiple of 32) at a barrier from 1 to 15.
__device__ inline void sync_named(int barrier, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}
// x, which has the same value in all lanes. The shuffle tells the compiler so, and x moves to a uniform register.
__device__ inline int warp_uniform(int x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }
// The value of lane() ^ mask.
template <typename T>
__device__ inline T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
__device__ inline bool any_lane(bool x) { return __any_sync(0xFFFFFFFFu, x); }

// Thread block clusters (sm_90 and later; one block before): the rank of this block, a barrier, distributed shared
// memory.
__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}
__device__ inline void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}
template <typename T>
__device__ inline T load_shared_of(int rank, SharedAddress a) {
#if __CUDA_ARCH__ >= 900
  T* mine = static_cast<T*>(__cvta_shared_to_generic(a));
  return *cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#else
  return load_shared<T>(a);
#endif
}

// ---- host side ----

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastgpt: ", what, " failed: ", cudaGetErrorString(error));
}

// A member that points to a function of the cuBLASLt that PyTorch has loaded, or null.
#define FASTGPT_CUBLASLT(name)     \
  decltype(&cublasLt##name) name = \
      reinterpret_cast<decltype(&cublasLt##name)>(cublaslt(CUBLAS_VER_MAJOR, "cublasLt" #name))

inline void* cublaslt(int version, const char* name) {
  const std::string file = "libcublasLt.so." + std::to_string(version);
  void* library = dlopen(file.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return library ? dlsym(library, name) : nullptr;
}

// Makes a device current for its own lifetime. Has the current PyTorch stream of the device.
class Device {
 public:
  explicit Device(int index) : index_(index), guard_(index) {
    STD_TORCH_CHECK(
        aoti_torch_get_current_cuda_stream(index, &stream_) == 0,
        "fastgpt: PyTorch has no current stream on CUDA device ",
        index);
  }
  int index() const { return index_; }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index_), "cudaDeviceGetAttribute");
    return value;
  }
  // The largest dynamic shared memory of a block, in bytes.
  int shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  // Whether the device has thread block clusters.
  bool has_clusters() const { return attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

struct Launch {
  int64_t x = 1, y = 1, z = 1;  // blocks
  int threads = 0;
  int shared = 0;   // bytes per block
  int cluster = 1;  // blocks along x
};

// Launches a kernel in the stream of the device:  launch<kernel>(device, "kernel name", shape, arguments...).
template <auto KERNEL, typename... Arguments>
void launch(const Device& device, const char* name, const Launch& shape, Arguments... arguments) {
  STD_TORCH_CHECK(
      shape.x < (int64_t{1} << 31) && shape.y < 65536 && shape.z < 65536,
      "fastgpt: ",
      name,
      " needs a grid of ",
      shape.x,
      " × ",
      shape.y,
      " × ",
      shape.z,
      " blocks, more than CUDA allows; split the batch");
  // More than 48 KiB of shared memory needs an opt-in per kernel and device. The opt-in is for the maximum, so that
  // concurrent launches with different sizes do not lower each other's limit.
  constexpr int DEVICES = 64;
  static std::atomic<bool> granted[DEVICES];
  if (shape.shared > 48 * 1024 && (device.index() >= DEVICES || !granted[device.index()])) {
    check(
        cudaFuncSetAttribute(
            reinterpret_cast<const void*>(KERNEL), cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes()),
        name);
    if (device.index() < DEVICES) granted[device.index()] = true;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.x, shape.y, shape.z);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared;
  config.stream = device.stream();
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, KERNEL, arguments...), name);
}

}  // namespace fastgpt
