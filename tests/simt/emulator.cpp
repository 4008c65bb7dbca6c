// What Python asks of the emulator.
#include "machine.h"

extern "C" void simt_seed(uint64_t seed) { simt::Machine::get().seed = seed; }
extern "C" uint64_t simt_launches() { return simt::Machine::get().launches; }
