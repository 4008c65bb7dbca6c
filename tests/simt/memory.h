// The emulated memories. They record who accessed them, and check every access.
//
// The order of accesses is tracked by vector clocks with one entry per warp. A barrier ends a period of each warp that
// waits there. An access in period t of warp A is ordered before an access of warp B if B has since synchronized,
// directly or through other warps, with A after the end of period t. The same clock orders the lanes of a warp:
// __syncwarp ends a period, a shuffle or a matrix instruction does not.
//
// The smallest tracked unit is two bytes, because kernels do not write single bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace simt {

constexpr int WARP = 32;

enum class Access { READ, WRITE, ADD };

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
[[noreturn]] inline void fault(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Fault(message.str());
}

// Identifies a thread.
struct ThreadId {
  int index = 0, rank = 0;  // of the thread in its block, of the block in the cluster
  int warp = 0;             // in the cluster
  uint64_t number = 0;      // in the grid, starting at 1
  int lane() const { return index % WARP; }
};

class Clocks {
 public:
  void reset(int warps) {
    warps_ = warps;
    at_.assign(static_cast<size_t>(warps) * warps, 0);
    for (int w = 0; w < warps; ++w) of(w, w) = 1;
  }
  int warps() const { return warps_; }
  uint32_t now(int warp) const { return at_[static_cast<size_t>(warp) * warps_ + warp]; }
  // Whether an access of warp `other` in its period `at` is ordered before an access of `warp` now.
  bool seen(int warp, int other, uint32_t at) const { return at_[static_cast<size_t>(warp) * warps_ + other] > at; }
  void end_period(int warp) { ++of(warp, warp); }
  // A barrier of these warps: ends their periods and orders all accesses before the barrier.
  void synchronize(const std::vector<int>& who) {
    std::vector<uint32_t> all(warps_, 0);
    for (int w : who) {
      end_period(w);
      for (int v = 0; v < warps_; ++v) all[v] = std::max(all[v], of(w, v));
    }
    for (int w : who) std::copy(all.begin(), all.end(), &of(w, 0));
  }

 private:
  uint32_t& of(int warp, int other) { return at_[static_cast<size_t>(warp) * warps_ + other]; }
  int warps_ = 0;
  std::vector<uint32_t> at_;
};

// ---- shared memory, of one block ----

class SharedMemory {
 public:
  // Prepares the memory of the block with this rank in the cluster.
  void reset(int rank, int bytes, int threads, const Clocks& order) {
    rank_ = rank;
    order_ = &order;
    live_ = threads;
    own_warps_ = threads / WARP;
    bytes_.assign(bytes, 0xFF);  // NaN, in every type
    cells_.assign((bytes + 1) / 2, {});
    reads_.assign(cells_.size() * order.warps(), {});
    visits_.assign(order.warps(), 0);
  }

  // Checks and records an access of `size` bytes by `me`. Returns a pointer to them.
  unsigned char* touch(const ThreadId& me, uint32_t address, uint32_t size, Access access) {
    check(address, size);
    if (me.rank != rank_) visit(me);
    for (uint32_t c = address / 2; c < (address + size) / 2; ++c) access == Access::READ ? read(me, c) : write(me, c);
    return bytes_.data() + address;
  }

  // The start and the end of an asynchronous copy of 16 bytes. The emulator completes a copy only when it is waited
  // for, as late as possible. No thread may access the destination between start and end.
  void copy_begins(const ThreadId& me, uint32_t address) {
    touch(me, address, COPY, Access::WRITE);
    for (uint32_t c = address / 2; c < (address + COPY) / 2; ++c) cells_[c].state = Cell::IN_FLIGHT;
  }
  void copy_lands(const ThreadId& me, uint32_t address, const void* from) {
    for (uint32_t c = address / 2; c < (address + COPY) / 2; ++c) {
      cells_[c].state = Cell::WRITTEN;
      cells_[c].written_at = order_->now(me.warp);
    }
    from ? std::memcpy(&bytes_[address], from, COPY) : std::memset(&bytes_[address], 0, COPY);
  }

  // Call it when a thread of the block ends. The memory is released with the last thread. Accesses by other blocks of
  // the cluster must be ordered before that, not only happen to be earlier.
  void thread_ends() {
    if (--live_) return;
    for (int w = 0; w < order_->warps(); ++w)
      if (visits_[w] && !known_by_the_block(w, visits_[w]))
        fault("the block ends, and no barrier orders the accesses of warp ", w, " of the cluster to its shared memory");
  }

 private:
  static constexpr uint32_t COPY = 16;

  struct Cell {
    static constexpr uint8_t NEVER = 0, WRITTEN = 1, IN_FLIGHT = 2;
    uint8_t state = NEVER;
    bool read = false;  // since the last write, which was checked against earlier reads
    uint32_t written_at = 0;
    const ThreadId* writer = nullptr;
  };
  static constexpr uint32_t SEVERAL = WARP;  // as a lane: several lanes of the warp have read
  struct Read {                              // the last read of a cell by a warp; `at` 0: none
    uint32_t at = 0, lane = 0;
  };

  void check(uint32_t address, uint32_t size) const {
    if (address + uint64_t{size} > bytes_.size())
      fault("an access of ", size, " bytes at byte ", address, " of ", bytes_.size(), " of shared memory");
    if (address % size || size < 2) fault("an access of ", size, " bytes of shared memory that is not aligned");
  }
  void visit(const ThreadId& me) {
    if (!live_) fault("an access of the shared memory of a block that has ended");
    visits_[me.warp] = order_->now(me.warp);
  }
  bool known_by_the_block(int warp, uint32_t at) const {
    for (int w = rank_ * own_warps_; w < (rank_ + 1) * own_warps_; ++w)
      if (order_->seen(w, warp, at)) return true;
    return false;
  }

  template <typename... Parts>
  [[noreturn]] static void fault_at(uint32_t cell, const Parts&... parts) {
    fault("byte ", 2 * cell, " of shared memory: ", parts...);
  }
  void check_after_write(const ThreadId& me, uint32_t c, const char* what) const {
    const Cell& cell = cells_[c];
    if (cell.state == Cell::IN_FLIGHT) fault_at(c, what, " where an asynchronous copy is in flight");
    if (cell.writer && cell.writer != &me && !order_->seen(me.warp, cell.writer->warp, cell.written_at))
      fault_at(c, what, " races with a write by thread ", cell.writer->index);
  }
  void read(const ThreadId& me, uint32_t c) {
    check_after_write(me, c, "a read");
    if (cells_[c].state == Cell::NEVER) fault_at(c, "a read before any write");
    Read& last = reads_[static_cast<size_t>(c) * order_->warps() + me.warp];
    const uint32_t lane = me.lane(), now = order_->now(me.warp);
    cells_[c].read = true;
    last = {now, last.at == now && last.lane != lane ? SEVERAL : lane};
  }
  void write(const ThreadId& me, uint32_t c) {
    check_after_write(me, c, "a write");
    for (int w = 0; cells_[c].read && w < order_->warps(); ++w) {
      const Read& last = reads_[static_cast<size_t>(c) * order_->warps() + w];
      if (!last.at || order_->seen(me.warp, w, last.at)) continue;
      if (w == me.warp && last.lane == static_cast<uint32_t>(me.lane())) continue;
      fault_at(c, "a write races with a read by warp ", w);
    }
    cells_[c] = {Cell::WRITTEN, false, order_->now(me.warp), &me};
  }

  int rank_ = 0, own_warps_ = 0, live_ = 0;
  const Clocks* order_ = nullptr;
  std::vector<unsigned char> bytes_;
  std::vector<Cell> cells_;
  std::vector<Read> reads_;       // cells × warps of the cluster
  std::vector<uint32_t> visits_;  // the last period in which a warp of another block accessed this memory
};

// ---- global memory, during one launch ----
//
// Threads of a grid count as unordered here, even after a barrier of their block: no kernel passes data between threads
// through global memory.
class GlobalMemory {
 public:
  void reset() {
    pages_.clear();
    last_page_ = nullptr;
  }

  // Checks and records an access of `size` bytes at p, in a tensor [begin, end).
  void touch(const ThreadId& me, const void* p, size_t size, const void* begin, const void* end, Access access) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p), first = reinterpret_cast<uintptr_t>(begin);
    const uintptr_t last = reinterpret_cast<uintptr_t>(end);
    if (at < first || at + size > last)
      fault(
          "an access of ",
          size,
          " bytes at byte ",
          static_cast<intptr_t>(at - first),
          " of a tensor of ",
          last - first,
          " bytes");
    if (at % size) fault("an access of ", size, " bytes of global memory that is not aligned");
    for (uintptr_t c = at / 2; c < (at + size + 1) / 2; ++c) mark(me.number, cell(c), access);
  }

 private:
  static constexpr size_t PAGE = 2048;
  static constexpr uint64_t MANY = ~uint64_t{0};
  struct Cell {  // the number of a thread, 0 for none, or MANY
    uint64_t writer = 0, reader = 0, adder = 0;
  };

  Cell& cell(uintptr_t c) {
    if (!last_page_ || last_number_ != c / PAGE) {
      auto& page = pages_[c / PAGE];
      if (page.empty()) page.resize(PAGE);
      last_page_ = page.data();
      last_number_ = c / PAGE;
    }
    return last_page_[c % PAGE];
  }
  static void mark(uint64_t me, Cell& cell, Access access) {
    const auto other = [&](uint64_t who) { return who && who != me; };
    if (other(cell.writer)) fault("global memory that another thread of this launch has written");
    if (access != Access::READ && other(cell.reader))
      fault("a write of global memory that another thread of this launch reads");
    if (access != Access::ADD && other(cell.adder)) fault("global memory to which another thread of this launch adds");
    uint64_t& seen = access == Access::READ ? cell.reader : access == Access::WRITE ? cell.writer : cell.adder;
    seen = other(seen) ? MANY : me;
  }

  std::unordered_map<uintptr_t, std::vector<Cell>> pages_;
  Cell* last_page_ = nullptr;
  uintptr_t last_number_ = 0;
};

}  // namespace simt
