// The C functions that Python calls.
#include "machine.h"

extern "C" __attribute__((visibility("default"))) void simt_seed(uint64_t seed) { simt::Machine::get().seed = seed; }
extern "C" __attribute__((visibility("default"))) uint64_t simt_launches() { return simt::Machine::get().launches; }
extern "C" __attribute__((visibility("default"))) void simt_device(int shared_bytes, bool has_clusters) {
  simt::Machine::get().device = {shared_bytes, has_clusters};
}
