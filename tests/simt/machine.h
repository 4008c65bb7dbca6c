// The emulated machine: threads, warps, blocks and clusters on one thread of the host, with checks of every access.
//
// Each CUDA thread is a fiber. Warps run in a random order, which a seed determines. A fiber runs until it waits: for
// the lanes of its warp at a warp-wide operation, or at a barrier. Clusters run one after another, the blocks of a
// cluster concurrently. A fault ends the launch with a message:
//   - a launch that CUDA would refuse
//   - an access outside a tensor or outside the block's shared memory, or not aligned to its size
//   - a read of shared memory that was never written
//   - an access where an asynchronous copy is in flight, and copies that are never waited for
//   - a race: two accesses of one location, at least one of them a write, that no barrier orders. For global memory: a
//     location that one thread writes and another accesses in the same launch, unless both add atomically
//   - an access of the shared memory of another block that may have ended
//   - a deadlock, with the list of who waits for what, and lanes of a warp that reach different warp-wide operations
//
// The emulator is stricter than the hardware: all lanes of a warp must reach every barrier, so no lane may have ended.
// It does not model time.
#pragma once

#include <functional>
#include <map>
#include <mutex>
#include <random>

#include "fibers.h"

namespace simt {

// ---- state of a cluster ----

// An asynchronous copy of 16 bytes.
struct Copy {
  uint32_t to;
  const void* from;  // null: zeros
};

struct Thread : ThreadId {
  void* stack = nullptr;
  void* stack_pointer = nullptr;
  const char* waits_for = nullptr;  // null while it can run
  int barrier = 0, count = 0;       // of the named barrier that it waits for
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last group is open
};

// A warp-wide operation: each lane stores a value, and the last lane to arrive processes all of them.
struct Warp {
  static constexpr size_t SLOT = 64;
  alignas(16) unsigned char slots[WARP][SLOT];
  const char* operation = nullptr;
  int arrived = 0, running = 0;
  std::vector<Thread*> lanes;
};

struct Barrier {
  int count = 0;           // threads of the current use
  std::vector<int> warps;  // that have arrived
};

struct Block {
  int64_t x, y, z;
  SharedMemory shared;
};

// ---- the machine ----

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  uint64_t seed = 0;  // of the order in which warps run
  uint64_t launches = 0;

  struct Shape {
    int64_t x, y, z;
    int threads, shared, cluster;
  };
  // The address of the dynamic shared memory. Since sm_90 the first KiB is reserved for the system.
  static constexpr uint32_t SHARED_BEGIN = 1024;

  // The emulated GPU: bytes of shared memory per block, and whether it has clusters.
  struct {
    int shared_bytes = 227 << 10;
    bool has_clusters = true;
  } device;

  void launch(const char* name, const Shape& shape, std::function<void()> kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    shape_ = shape;
    kernel_ = std::move(kernel);
    ++launches;
    random_.seed(seed);
    global_.reset();
    problem_.clear();
    uint64_t first = 1;
    try {
      check(shape);
      for (int64_t z = 0; z < shape.z; ++z)
        for (int64_t y = 0; y < shape.y; ++y)
          for (int64_t x = 0; x < shape.x; x += shape.cluster, first += threads_.size()) run_cluster(x, y, z, first);
    } catch (const Fault& error) {
      problem_ = error.what();
    }
    self_ = nullptr;
    if (!problem_.empty()) throw std::runtime_error(std::string("simt: ") + name + ": " + problem_);
  }

  // -- operations of the running thread --

  const Thread& self() const { return *self_; }
  const Block& block() const { return blocks_[self_->rank]; }
  const Shape& shape() const { return shape_; }

  // Checks __launch_bounds__: CUDA refuses to launch the kernel with more threads.
  void check_launch_bounds(int threads, int = 0) const {
    if (shape_.threads > threads)
      fault("a block of ", shape_.threads, " threads, and its __launch_bounds__ are ", threads);
  }

  // Accesses `size` bytes of the shared memory of the block with this rank.
  unsigned char* shared(int rank, uint32_t address, uint32_t size, Access access) {
    if (rank < 0 || rank >= shape_.cluster) fault("block ", rank, " of a cluster of ", shape_.cluster);
    return blocks_[rank].shared.touch(*self_, within_shared(address), size, access);
  }
  // Accesses `size` bytes of global memory at p, in a tensor [begin, end).
  void global(const void* p, size_t size, const void* begin, const void* end, Access access) {
    global_.touch(*self_, p, size, begin, end, access);
  }

  void copy(uint32_t to, const void* from) {
    to = within_shared(to);
    blocks_[self_->rank].shared.copy_begins(*self_, to);
    if (self_->groups.empty()) self_->groups.emplace_back();
    self_->groups.back().push_back({to, from});
  }
  void commit() {
    if (self_->groups.empty()) self_->groups.emplace_back();
    self_->groups.emplace_back();
  }
  // Completes the copies of all closed groups but the last `remaining`, as late as the hardware could.
  void wait_for_copies(int remaining) {
    const int closed = static_cast<int>(self_->groups.size()) - 1;
    for (int g = 0; g < closed - remaining; ++g) {
      for (const Copy& c : self_->groups.front()) blocks_[self_->rank].shared.copy_lands(*self_, c.to, c.from);
      self_->groups.erase(self_->groups.begin());
    }
  }

  // A warp-wide operation: calls `work` with the values of all lanes and returns the value of this lane.
  template <typename T, typename F>
  T warp_operation(const char* what, const T& mine, F&& work) {
    static_assert(sizeof(T) <= Warp::SLOT);
    Warp& w = warps_[self_->warp];
    Thread* const me = self_;
    if (!last_of_warp(what, &mine, sizeof(T))) {
      wait(what);
    } else {
      T* all[WARP];
      for (int l = 0; l < WARP; ++l) all[l] = reinterpret_cast<T*>(w.slots[l]);
      work(all);
      wake(me->warp);
    }
    T result;
    std::memcpy(&result, w.slots[me->lane()], sizeof(T));
    return result;
  }

  void sync_warp() {
    warp_operation("__syncwarp", 0, [&](int**) { order_.end_period(self_->warp); });
  }
  void sync_block() { barrier(self_->rank, 0, shape_.threads, "__syncthreads"); }
  void sync_named(int number, int count) {
    if (number < 1 || number > 15 || count < WARP || count % WARP || count > shape_.threads)
      fault(
          "named barrier ", number, " of ", count, " threads is not valid in a block of ", shape_.threads, " threads");
    barrier(self_->rank, number, count, "named barrier");
  }
  void sync_cluster() { barrier(-1, 0, shape_.threads * shape_.cluster, "the cluster's barrier"); }

 private:
  // -- running --

  void check(const Shape& s) const {
    if (s.x < 1 || s.y < 1 || s.z < 1 || s.x >= int64_t{1} << 31 || s.y >= 65536 || s.z >= 65536)
      fault("a grid of ", s.x, " × ", s.y, " × ", s.z, " blocks");
    if (s.threads < WARP || s.threads > 1024 || s.threads % WARP) fault("a block of ", s.threads, " threads");
    if (s.cluster < 1 || s.cluster > 8 || s.x % s.cluster)
      fault("clusters of ", s.cluster, " blocks in a grid of ", s.x);
    if (s.cluster > 1 && !device.has_clusters) fault("clusters of ", s.cluster, " blocks on a GPU without clusters");
    if (s.shared < 0 || s.shared > device.shared_bytes) fault("a block of ", s.shared, " bytes of shared memory");
  }

  static uint32_t within_shared(uint32_t address) {
    if (address < SHARED_BEGIN)
      fault("an access at address ", address, ", before the block's shared memory, which begins at ", SHARED_BEGIN);
    return address - SHARED_BEGIN;
  }

  // Runs the cluster that starts at block (x, y, z). `first`: the number of its first thread.
  void run_cluster(int64_t x, int64_t y, int64_t z, uint64_t first) {
    const int count = shape_.threads * shape_.cluster, all_warps = count / WARP;
    order_.reset(all_warps);
    blocks_.resize(shape_.cluster);
    threads_.assign(count, {});
    warps_.assign(all_warps, {});
    barriers_.clear();
    for (int rank = 0; rank < shape_.cluster; ++rank) {
      Block& b = blocks_[rank];
      b.x = x + rank, b.y = y, b.z = z;
      b.shared.reset(rank, shape_.shared, shape_.threads, order_);
    }
    for (int i = 0; i < count; ++i) {
      Thread& t = threads_[i];
      t.rank = i / shape_.threads;
      t.index = i % shape_.threads;
      t.warp = i / WARP;
      t.number = first + i;
      prepare(t);
      warps_[t.warp].lanes.push_back(&t);
      ++warps_[t.warp].running;
    }
    live_ = count;
    std::vector<int> ready;
    while (live_ && problem_.empty()) {
      ready.clear();
      for (int w = 0; w < all_warps; ++w)
        if (warps_[w].running) ready.push_back(w);
      if (ready.empty()) {
        problem_ = deadlock();
        break;
      }
      Warp& w = warps_[ready[random_() % ready.size()]];
      for (Thread* t : w.lanes)
        if (!t->done && !t->waits_for && problem_.empty()) {
          self_ = t;
          simt_switch(&scheduler_, t->stack_pointer);
        }
    }
    for (Thread& t : threads_) stacks_.give_back(t.stack);
    if (!problem_.empty()) throw Fault(problem_);
  }

  // Prepares a stack as if its fiber had called simt_switch at the start of `body`.
  void prepare(Thread& t) {
    t.stack = stacks_.take();
    void** top = reinterpret_cast<void**>(static_cast<char*>(t.stack) + Stacks::BYTES) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(&Machine::body);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    t.stack_pointer = top;
  }

  // The main function of a fiber. Exceptions must not leave its stack.
  static void body() {
    Machine& m = get();
    try {
      m.kernel_();
      for (const auto& group : m.self_->groups)
        if (!group.empty()) fault("the thread ends while copies are in flight; wait for them");
      m.blocks_[m.self_->rank].shared.thread_ends();
    } catch (const std::exception& error) {
      const Block& b = m.block();
      std::ostringstream message;
      message << "block (" << b.x << ", " << b.y << ", " << b.z << ") thread " << m.self_->index << ": "
              << error.what();
      m.problem_ = message.str();
    }
    m.self_->done = true;
    --m.live_;
    --m.warps_[m.self_->warp].running;
    void* never;
    simt_switch(&never, m.scheduler_);
  }

  void wait(const char* what) {
    Thread* const me = self_;
    me->waits_for = what;
    --warps_[me->warp].running;
    simt_switch(&me->stack_pointer, scheduler_);
  }
  // Wakes all waiting lanes of a warp.
  void wake(int warp) {
    for (Thread* t : warps_[warp].lanes)
      if (t->waits_for) {
        t->waits_for = nullptr;
        ++warps_[warp].running;
      }
  }

  // Stores the value of this lane. Returns whether it is the last lane of its warp to arrive.
  bool last_of_warp(const char* what, const void* mine, size_t size) {
    Warp& w = warps_[self_->warp];
    if (w.arrived && std::strcmp(w.operation, what) != 0)
      fault("lanes of one warp are at ", w.operation, " and at ", what, " at the same time");
    w.operation = what;
    std::memcpy(w.slots[self_->lane()], mine, size);
    if (++w.arrived < WARP) return false;
    w.arrived = 0;
    return true;
  }

  // A barrier of a block (number 0: all its threads), or of the cluster (rank -1). A warp arrives as a whole.
  void barrier(int rank, int number, int count, const char* what) {
    const int mine[2] = {number, count};
    self_->barrier = number, self_->count = count;
    if (last_of_warp(what, mine, sizeof(mine))) {
      const Warp& w = warps_[self_->warp];
      for (int l = 0; l < WARP; ++l)
        if (std::memcmp(w.slots[l], mine, sizeof(mine)) != 0) fault("lanes of one warp are at different barriers");
      Barrier& b = barriers_[{rank, number}];
      if (b.warps.empty()) b.count = count;
      if (b.count != count) fault("named barrier ", number, " of ", count, " threads, where others wait for ", b.count);
      b.warps.push_back(self_->warp);
      if (static_cast<int>(b.warps.size()) * WARP == count) {
        order_.synchronize(b.warps);
        for (int arrived : b.warps) wake(arrived);
        b.warps.clear();
        return;
      }
    }
    wait(what);
  }

  std::string deadlock() const {
    const auto state = [](const Thread& t) {
      std::ostringstream message;
      message << (t.done ? "have ended" : "wait for ") << (t.done ? "" : t.waits_for);
      if (!t.done && std::strcmp(t.waits_for, "named barrier") == 0)
        message << " " << t.barrier << " of " << t.count << " threads";
      return message.str();
    };
    std::ostringstream message;
    message << "deadlock: all threads wait or have ended";
    for (size_t first = 0, next; first < threads_.size(); first = next) {
      const Thread& t = threads_[first];
      for (next = first + 1; next < threads_.size(); ++next)
        if (threads_[next].rank != t.rank || state(threads_[next]) != state(t)) break;
      const Block& b = blocks_[t.rank];
      message << "; block (" << b.x << ", " << b.y << ", " << b.z << ") threads " << t.index << " to "
              << threads_[next - 1].index << " " << state(t);
    }
    return message.str();
  }

  std::mutex mutex_;
  Shape shape_{};
  std::function<void()> kernel_;
  std::mt19937_64 random_;
  Stacks stacks_;
  Clocks order_;
  std::vector<Block> blocks_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::map<std::pair<int, int>, Barrier> barriers_;  // by the rank of the block and the number of the barrier
  GlobalMemory global_;
  Thread* self_ = nullptr;
  void* scheduler_ = nullptr;
  int live_ = 0;
  std::string problem_;
};

}  // namespace simt
