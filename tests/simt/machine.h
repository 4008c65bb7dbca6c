// A machine of threads, warps, blocks and clusters on one thread of the host, that checks what kernels do.
//
// Each CUDA thread is a fiber. Warps take turns in a random order that a seed decides; a fiber runs until it waits for
// others: for the lanes of its warp at what a warp does together, for a barrier. Clusters run one after another, the
// blocks of one together. A fault ends the launch with a sentence:
//   - an access outside a tensor or outside the block's shared memory, or not aligned to its size;
//   - a read of shared memory that no one has written, or where an asynchronous copy is on its way;
//   - a race: two accesses of one location, one of them a write, that no barrier puts in an order. Of global memory:
//     a location that one thread writes and another touches in the same launch, unless both add atomically;
//   - a deadlock, with who waits for what; lanes of a warp that do different things together;
//   - the end of a block whose shared memory others of its cluster read, with no barrier in between.
//
// Order is kept by vector clocks, one number a warp: a barrier ends a period of the warps that meet there. An access
// in period t of warp A is seen by B once B has met, directly or through others, an A whose period t was over.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace simt {

constexpr int WARP = 32;

// ---- fibers ----

// Saves the registers that a call must keep on the stack of `from`, and goes on with the stack `to`.
extern "C" void simt_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.weak simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#else
#error "the SIMT emulator switches stacks in x86-64 assembly; add the same few lines for this machine"
#endif

constexpr size_t STACK_BYTES = 128 << 10;

// Stacks are kept for the next launch.
class Stacks {
 public:
  void* take() {
    if (free_.empty()) {
      void* fresh =
          mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fresh == MAP_FAILED) throw std::runtime_error("simt: no memory for a thread's stack");
      return fresh;
    }
    void* kept = free_.back();
    free_.pop_back();
    return kept;
  }
  void give_back(void* stack) { free_.push_back(stack); }

 private:
  std::vector<void*> free_;
};

// ---- what a thread and a place in memory remember ----

struct Copy {
  uint32_t to;
  const void* from;  // null: zeros
};

struct Thread {
  int index, rank;  // within its block, and that block's within the cluster
  int warp;         // within the cluster
  void* stack = nullptr;
  void* stack_pointer = nullptr;
  const char* waits_for = nullptr;  // null while it can run
  bool done = false;
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last one is open
  int lane() const { return index % WARP; }
};

// Two bytes of shared memory.
struct Cell {
  static constexpr uint8_t NEVER = 0, WRITTEN = 1, ON_ITS_WAY = 2;
  uint8_t state = NEVER;
  uint32_t written_at = 0;
  const Thread* writer = nullptr;
};

constexpr uint32_t SEVERAL = WARP;  // lanes of a warp have read
struct Read {                       // of a cell, by a warp
  uint32_t at = 0, lane = 0;
  bool any = false;
};

struct Block {
  int64_t x, y, z;
  int live = 0;  // threads
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
  std::vector<Read> reads;  // cells × warps of the cluster
};

// What lanes do together: each leaves a value, the last to come works on all of them.
struct Warp {
  static constexpr size_t SLOT = 64;
  alignas(16) unsigned char slots[WARP][SLOT];
  const char* meeting = nullptr;
  int arrived = 0, running = 0;
  std::vector<Thread*> lanes;
};

struct Barrier {
  std::vector<Thread*> waiting;
};

enum class Access { READ, WRITE, ADD };

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

  void launch(const char* name, const Shape& shape, std::function<void()> kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    name_ = name;
    shape_ = shape;
    kernel_ = std::move(kernel);
    ++launches;
    random_.seed(seed);
    global_.clear();
    last_page_ = nullptr;
    cluster_number_ = 0;
    if (shape.threads < 1 || shape.threads > 1024)
      throw_fault("a block of " + std::to_string(shape.threads) + " threads");
    if (shape.cluster < 1 || shape.cluster > 8 || shape.x % shape.cluster)
      throw_fault("clusters of " + std::to_string(shape.cluster) + " in a grid of " + std::to_string(shape.x));
    if (shape.shared > MOST_SHARED) throw_fault("more shared memory than a block may have");
    for (int64_t z = 0; z < shape.z; ++z)
      for (int64_t y = 0; y < shape.y; ++y)
        for (int64_t x = 0; x < shape.x; x += shape.cluster, ++cluster_number_) run_cluster(x, y, z);
  }

  static constexpr int MOST_SHARED = 227 << 10;

  // -- of the running thread --

  const Thread& self() const { return *self_; }
  const Block& block() const { return blocks_[self_->rank]; }
  const Shape& shape() const { return shape_; }

  // Shared memory of the block with this rank; `size` bytes that are read or written.
  unsigned char* shared(int rank, uint32_t address, uint32_t size, Access access) {
    Block& b = blocks_[rank];
    if (!b.live) fault("a read of shared memory of a block that has ended");
    check_shared(b, address, size);
    for (uint32_t c = address / 2; c < (address + size) / 2; ++c)
      access == Access::READ ? read_cell(b, c) : write_cell(b, c);
    return b.shared.data() + address;
  }

  // `size` bytes of global memory at p, which belongs to a tensor from begin to end.
  void global(const void* p, size_t size, const void* begin, const void* end, Access access) {
    const char *at = static_cast<const char*>(p), *first = static_cast<const char*>(begin);
    if (at < first || at + size > static_cast<const char*>(end)) {
      std::ostringstream said;
      said << "an access of " << size << " bytes at byte " << (at - first) << " of a tensor of "
           << (static_cast<const char*>(end) - first) << " bytes";
      fault(said.str());
    }
    if (reinterpret_cast<uintptr_t>(p) % size)
      fault("an access of " + std::to_string(size) + " bytes that is not aligned");
    const uintptr_t from = reinterpret_cast<uintptr_t>(p) / 2, to = (reinterpret_cast<uintptr_t>(p) + size + 1) / 2;
    for (uintptr_t c = from; c < to; ++c) touch_global(page_of(c), access);
  }

  void copy(uint32_t to, const void* from) {
    Block& b = blocks_[self_->rank];
    check_shared(b, to, 16);
    for (uint32_t c = to / 2; c < to / 2 + 8; ++c) {
      write_cell(b, c);
      b.cells[c].state = Cell::ON_ITS_WAY;
    }
    if (self_->groups.empty()) self_->groups.emplace_back();
    self_->groups.back().push_back({to, from});
  }
  void commit() {
    if (self_->groups.empty()) self_->groups.emplace_back();
    self_->groups.emplace_back();
  }
  // The copies of all closed groups but the last `left` land now, and not before.
  void wait_for_copies(int left) {
    const int closed = static_cast<int>(self_->groups.size()) - 1;
    for (int g = 0; g < closed - left; ++g) {
      Block& b = blocks_[self_->rank];
      for (const Copy& copy : self_->groups.front()) {
        for (uint32_t c = copy.to / 2; c < copy.to / 2 + 8; ++c) {
          b.cells[c].state = Cell::WRITTEN;
          b.cells[c].written_at = now();
        }
        copy.from ? std::memcpy(&b.shared[copy.to], copy.from, 16) : std::memset(&b.shared[copy.to], 0, 16);
      }
      self_->groups.erase(self_->groups.begin());
    }
  }

  // What the lanes of a warp do together, `work` on all their values; returns this lane's.
  template <typename T, typename F>
  T together(const char* what, const T& mine, F&& work) {
    static_assert(sizeof(T) <= Warp::SLOT);
    Warp& w = warps_[self_->warp];
    Thread* const me = self_;
    if (w.arrived && w.meeting != what)
      fault(std::string("lanes of one warp are at ") + w.meeting + " and at " + what + " at the same time");
    w.meeting = what;
    std::memcpy(w.slots[me->lane()], &mine, sizeof(T));
    if (++w.arrived < static_cast<int>(w.lanes.size())) {
      wait(what);
    } else {
      T* all[WARP];
      for (int l = 0; l < WARP; ++l) all[l] = reinterpret_cast<T*>(w.slots[l]);
      work(all);
      w.arrived = 0;
      for (Thread* t : w.lanes) wake(t);
    }
    T result;
    std::memcpy(&result, w.slots[me->lane()], sizeof(T));
    return result;
  }

  void sync_warp() {
    together("__syncwarp", 0, [&](int**) { ++clocks_[self_->warp][self_->warp]; });
  }
  void sync_block() { meet(barriers_[{self_->rank, 0}], shape_.threads, "__syncthreads"); }
  void sync_named(int number, int count) {
    if (number < 1 || number > 15 || count % WARP || count > shape_.threads) fault("a named barrier that is none");
    meet(barriers_[{self_->rank, number}], count, "a named barrier");
  }
  void sync_cluster() { meet(barriers_[{-1, 0}], shape_.threads * shape_.cluster, "the cluster's barrier"); }

  [[noreturn]] void fault(const std::string& what) {
    const Block& b = block();
    std::ostringstream said;
    said << "block (" << b.x << ", " << b.y << ", " << b.z << ") thread " << self_->index << ": " << what;
    throw_fault(said.str());
  }

 private:
  // -- running --

  void run_cluster(int64_t x, int64_t y, int64_t z) {
    const int count = shape_.threads * shape_.cluster, per_block = (shape_.threads + WARP - 1) / WARP;
    const int all_warps = per_block * shape_.cluster;
    blocks_.assign(shape_.cluster, {});
    threads_.assign(count, {});
    warps_.assign(all_warps, {});
    clocks_.assign(all_warps, std::vector<uint32_t>(all_warps, 0));
    for (int w = 0; w < all_warps; ++w) clocks_[w][w] = 1;
    barriers_.clear();
    problem_.clear();
    for (int rank = 0; rank < shape_.cluster; ++rank) {
      Block& b = blocks_[rank];
      b.x = x + rank, b.y = y, b.z = z, b.live = shape_.threads;
      b.shared.assign(shape_.shared, 0xFF);  // NaN, in every type
      b.cells.assign(shape_.shared / 2, {});
      b.reads.assign(b.cells.size() * all_warps, {});
    }
    for (int i = 0; i < count; ++i) {
      Thread& t = threads_[i];
      t.rank = i / shape_.threads;
      t.index = i % shape_.threads;
      t.warp = t.rank * per_block + t.index / WARP;
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
    self_ = nullptr;
    if (!problem_.empty()) throw std::runtime_error("simt: " + problem_);
  }

  // A stack that looks as if its owner had just called simt_switch, from the beginning of `body`.
  void prepare(Thread& t) {
    t.stack = stacks_.take();
    void** top = reinterpret_cast<void**>(static_cast<char*>(t.stack) + STACK_BYTES) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(&Machine::body);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    t.stack_pointer = top;
  }

  static void body() {
    Machine& m = get();
    try {
      m.kernel_();
      for (const auto& group : m.self_->groups)
        if (!group.empty()) m.fault("it ends while copies are on their way");
      if (!--m.blocks_[m.self_->rank].live && m.shape_.cluster > 1) m.check_end_of_block();
    } catch (const std::exception& error) {
      if (m.problem_.empty()) m.problem_ = error.what();
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
  void wake(Thread* t) {
    if (!t->waits_for) return;
    t->waits_for = nullptr;
    ++warps_[t->warp].running;
  }

  void meet(Barrier& barrier, int count, const char* what) {
    barrier.waiting.push_back(self_);
    if (static_cast<int>(barrier.waiting.size()) < count) return wait(what);
    // The periods of all who are here end; all see what was done in them.
    std::vector<bool> here(warps_.size(), false);
    for (const Thread* t : barrier.waiting) here[t->warp] = true;
    std::vector<uint32_t> seen(warps_.size(), 0);
    for (size_t w = 0; w < here.size(); ++w)
      if (here[w]) {
        ++clocks_[w][w];
        for (size_t v = 0; v < seen.size(); ++v) seen[v] = std::max(seen[v], clocks_[w][v]);
      }
    for (size_t w = 0; w < here.size(); ++w)
      if (here[w]) clocks_[w] = seen;
    for (Thread* t : barrier.waiting) wake(t);
    barrier.waiting.clear();
  }

  std::string deadlock() const {
    std::ostringstream said;
    said << name_ << ": nobody can go on;";
    for (const Thread& t : threads_) {
      const Thread* before = t.index ? &t - 1 : nullptr;
      const auto state = [](const Thread& x) { return x.done ? "has ended" : x.waits_for; };
      if (before && state(*before) == state(t)) continue;
      const Thread* last = &t;
      while (last + 1 < threads_.data() + threads_.size() && last[1].index && state(last[1]) == state(t)) ++last;
      said << " block " << t.rank << " threads " << t.index << " to " << last->index
           << (t.done ? " have ended;" : std::string(" wait for ") + t.waits_for + ";");
    }
    return said.str();
  }

  [[noreturn]] void throw_fault(const std::string& what) { throw std::runtime_error(std::string(name_) + ", " + what); }

  // -- order --

  uint32_t now() const { return clocks_[self_->warp][self_->warp]; }
  bool seen(int warp, uint32_t at) const { return clocks_[self_->warp][warp] > at; }

  void check_shared(const Block& b, uint32_t address, uint32_t size) {
    if (address + size > b.shared.size()) {
      std::ostringstream said;
      said << "an access of " << size << " bytes at byte " << address << " of " << b.shared.size()
           << " of shared memory";
      fault(said.str());
    }
    if (address % size) fault("an access of " + std::to_string(size) + " bytes of shared memory that is not aligned");
  }
  [[noreturn]] void fault_at(uint32_t cell, const std::string& what) {
    fault("byte " + std::to_string(2 * cell) + " of shared memory: " + what);
  }
  static std::string named(const Thread& t) { return "thread " + std::to_string(t.index); }

  void check_after_write(const Block& b, uint32_t c, const char* what) {
    const Cell& cell = b.cells[c];
    if (cell.state == Cell::ON_ITS_WAY) fault_at(c, std::string(what) + " where an asynchronous copy is on its way");
    if (cell.writer && cell.writer != self_ && !seen(cell.writer->warp, cell.written_at))
      fault_at(c, std::string(what) + " races with a write by " + named(*cell.writer));
  }
  void read_cell(Block& b, uint32_t c) {
    check_after_write(b, c, "a read");
    if (b.cells[c].state == Cell::NEVER) fault_at(c, "a read before any write");
    Read& read = b.reads[c * warps_.size() + self_->warp];
    const uint32_t lane = self_->lane();
    read = {now(), read.any && read.at == now() && read.lane != lane ? SEVERAL : lane, true};
  }
  void write_cell(Block& b, uint32_t c) {
    check_after_write(b, c, "a write");
    for (size_t w = 0; w < warps_.size(); ++w) {
      const Read& read = b.reads[c * warps_.size() + w];
      if (!read.any || seen(w, read.at)) continue;
      if (static_cast<int>(w) == self_->warp && read.lane == static_cast<uint32_t>(self_->lane())) continue;
      fault_at(c, "a write races with a read by warp " + std::to_string(w));
    }
    Cell& cell = b.cells[c];
    cell = {Cell::WRITTEN, now(), self_};
  }

  // The other blocks of the cluster must have read what they wanted, and a barrier must say so.
  void check_end_of_block() {
    const Block& b = block();
    const int per_block = static_cast<int>(warps_.size()) / shape_.cluster;
    for (uint32_t c = 0; c < b.cells.size(); ++c)
      for (int w = 0; w < static_cast<int>(warps_.size()); ++w) {
        const Read& read = b.reads[c * warps_.size() + w];
        if (w / per_block != self_->rank && read.any && !seen(w, read.at))
          fault_at(c, "its block ends, with no barrier after a read by another block");
      }
  }

  // -- global memory --

  static constexpr size_t PAGE = 2048;
  struct Touch {  // a thread of the whole grid, or none, or several
    uint64_t writer = 0, reader = 0, adder = 0;
  };
  static constexpr uint64_t MANY = ~uint64_t{0};

  Touch& page_of(uintptr_t cell) {
    if (!last_page_ || last_number_ != cell / PAGE) {
      auto& page = global_[cell / PAGE];
      if (page.empty()) page.resize(PAGE);
      last_page_ = page.data();
      last_number_ = cell / PAGE;
    }
    return last_page_[cell % PAGE];
  }
  void touch_global(Touch& touch, Access access) {
    const uint64_t me = (cluster_number_ * threads_.size() + (self_ - threads_.data())) + 1;
    const auto other = [&](uint64_t who) { return who && who != me; };
    if (other(touch.writer)) fault("global memory that another thread of this launch has written");
    if (access != Access::READ && other(touch.reader))
      fault("a write of global memory that another thread of this launch reads");
    if (access != Access::ADD && other(touch.adder)) fault("global memory to which another thread of this launch adds");
    uint64_t& mark = access == Access::READ ? touch.reader : access == Access::WRITE ? touch.writer : touch.adder;
    mark = other(mark) ? MANY : me;
  }

  std::mutex mutex_;
  const char* name_ = "";
  Shape shape_{};
  std::function<void()> kernel_;
  std::mt19937_64 random_;
  Stacks stacks_;
  std::vector<Block> blocks_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<std::vector<uint32_t>> clocks_;
  std::map<std::pair<int, int>, Barrier> barriers_;
  std::unordered_map<uintptr_t, std::vector<Touch>> global_;
  Touch* last_page_ = nullptr;
  uintptr_t last_number_ = 0;
  uint64_t cluster_number_ = 0;
  Thread* self_ = nullptr;
  void* scheduler_ = nullptr;
  int live_ = 0;
  std::string problem_;
};

}  // namespace simt
