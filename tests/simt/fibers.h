// Fibers for the emulator: each emulated CUDA thread runs on a stack of its own.
#pragma once

#include <sys/mman.h>

#include "memory.h"

namespace simt {

// Pushes the callee-saved registers, stores the stack pointer in `from`, and continues on the stack `to`.
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
#error "the SIMT emulator switches stacks in x86-64 assembly; port simt_switch to this machine"
#endif

// Stacks are reused by later launches. The lowest page of each is protected, so that a stack overflow crashes.
class Stacks {
 public:
  static constexpr size_t BYTES = 128 << 10, GUARD = 4096;

  void* take() {
    if (free_.empty()) {
      void* fresh = mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fresh == MAP_FAILED || mprotect(fresh, GUARD, PROT_NONE))
        fault("no memory for the stack of a thread; launch fewer threads");
      return fresh;
    }
    void* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give_back(void* stack) { free_.push_back(stack); }

 private:
  std::vector<void*> free_;
};

}  // namespace simt
