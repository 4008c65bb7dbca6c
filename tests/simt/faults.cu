// Kernels with one fault each, which the emulator must find. The expected messages are in test_simt.py.
#include "cases.h"

namespace fastgpt {
namespace {

float number(int i) { return static_cast<float>(i); }
SharedAddress place(int i) { return shared_memory() + 4 * i; }

// ---- addresses ----

void past_a_tensor(In in, Out out) { store(out + thread(), load(in + (thread() + 1))); }
void before_a_tensor(In in, Out out) { store(out + (thread() - 1), load(in + thread())); }
void past_a_tensor_by_half_a_vector(In in, Out out) { store_vector(out + 2 * thread(), load_vector<2>(in)); }
void no_tensor(In, Out out) { store(out + thread(), load(In{})); }
void past_shared_memory(In, Out) { store_shared(place(thread() + 1), 0.0f); }
void misaligned_in_a_tensor(In in, Out) { load_vector<4>(in + 1); }
void before_shared_memory(In, Out) { store_shared(SharedAddress{0}, 0.0f); }
void misaligned_in_shared_memory(In, Out) { store_shared(shared_memory() + 2, 0.0f); }
void copy_misaligned(In in, Out) { copy_async(shared_memory(), in + 2); }
void copied(SharedAddress to, In from) {
  copy_async(to, from);
  commit_copies();
  wait_copies<0>();
}
void copy_past_shared_memory(In in, Out) { copied(shared_memory() + 16 * thread() + 16, in); }
void copy_past_a_tensor(In in, Out) { copied(shared_memory() + 16 * thread(), in + 4 * thread()); }

// ---- order ----

void read_before_any_write(In, Out out) { store(out + thread(), load_shared<float>(place(thread()))); }
void half_of_it_never_written(In, Out out) {
  store_shared(shared_memory() + 4 * thread(), uint16_t{0});
  store(out + thread(), load_shared<float>(place(thread())));
}
void read_without_a_barrier(In, Out out) {
  if (warp() == 0) store_shared(place(lane()), 1.0f);
  if (warp() == 1) store(out + lane(), load_shared<float>(place(lane())));
}
void overwritten_without_a_barrier(In, Out out) {
  store_shared(place(thread()), 1.0f);
  sync_block();
  if (warp() == 0) store(out + lane(), load_shared<float>(place(lane())));
  if (warp() == 1) store_shared(place(lane()), 2.0f);
}
void written_by_two_warps(In, Out) { store_shared(place(lane()), number(warp())); }
void lanes_without_a_barrier(In, Out out) {
  store_shared(place(lane()), 1.0f);
  store(out + lane(), load_shared<float>(place(lane() ^ 1)));
}
void a_shuffle_is_no_barrier(In, Out out) {
  store_shared(place(lane()), 1.0f);
  shuffle_xor(0, 1);
  store(out + lane(), load_shared<float>(place(lane() ^ 1)));
}
void lanes_overwrite(In, Out out) {
  store_shared(place(lane()), 1.0f);
  sync_warp();
  store(out + lane(), load_shared<float>(place(lane() ^ 1)));
  store_shared(place(lane()), 2.0f);
}
void matrices_overwritten(In, Out) {
  for (int i = 0; i < 4; ++i) store_shared(place(4 * lane() + i), 1.0f);
  sync_warp();
  uint32_t r[4];
  load_matrices(r, place(4 * lane()));
  store_shared(place(4 * (lane() ^ 1)), 2.0f);
}
void barrier_of_others(In, Out out) {
  store_shared(place(thread()), 1.0f);
  sync_named(1 + warp() / 2, 64);  // warps 0 and 1, and 2 and 3
  store(out + thread(), load_shared<float>(place(thread() ^ 64)));
}

// ---- asynchronous copies ----

SharedAddress own() { return shared_memory() + 16 * thread(); }

void copy_read_before_its_wait(In in, Out out) {
  copy_async(own(), in);
  commit_copies();
  store(out + thread(), load_shared<float>(own()));
}
void copy_of_the_last_group_read(In in, Out out) {
  copy_async(own(), in);
  commit_copies();
  copy_async(own() + 16 * threads(), in);
  commit_copies();
  wait_copies<1>();
  store(out + thread(), load_shared<float>(own()));  // complete
  store(out + thread(), load_shared<float>(own() + 16 * threads()));
}
void copy_never_committed(In in, Out out) {
  copy_async(own(), in);
  wait_copies<0>();
  store(out + thread(), load_shared<float>(own()));
}
void copy_seen_by_others_without_a_barrier(In in, Out out) {
  copy_async(own(), in);
  commit_copies();
  wait_copies<0>();
  if (lane() % 2) store(out + thread(), load_shared<float>(own() - 16));
}
void copy_over_what_is_read(In in, Out out) {
  store_shared(own(), 1.0f);
  sync_block();
  if (warp() == 0) store(out + lane(), load_shared<float>(own()));
  if (warp() == 1) copied(shared_memory() + 16 * lane(), in);
}
void write_over_a_copy(In in, Out) {
  copy_async(own(), in);
  commit_copies();
  store_shared(own(), 1.0f);
}
void copy_left_in_flight(In in, Out) {
  copy_async(own(), in);
  commit_copies();
}

// ---- barriers and warp-wide operations ----

void barrier_for_some(In, Out) {
  if (warp() == 0) sync_block();
  if (warp() == 1) sync_named(3, 96);
}
void one_warp_has_ended(In, Out) {
  if (warp() == 1) return;
  sync_block();
}
void one_lane_has_ended(In, Out) {
  if (lane() == 7) return;
  shuffle_xor(1, 1);
}
void lanes_at_different_operations(In, Out) { lane() < 16 ? static_cast<void>(shuffle_xor(1, 1)) : sync_warp(); }
void lanes_at_different_barriers(In, Out) { sync_named(lane() < 16 ? 1 : 2, 32); }
void barrier_of_two_counts(In, Out) { sync_named(1, warp() == 0 ? 64 : 96); }
void barrier_out_of_range(In, Out) { sync_named(16, 64); }
void barrier_of_half_a_warp(In, Out) { sync_named(1, 48); }
void shuffle_from_nowhere(In, Out) { shuffle_xor(1, 32); }

// ---- blocks ----

void blocks_write_one_place(In, Out out) { store(out + thread(), 1.0f); }
void blocks_write_what_others_read(In, Out out) {
  store(out + (block_x() * threads() + thread()), 1.0f);
  load(out + thread());
}
void added_and_read(In, Out out) {
  atomic_add(out, 1.0f);
  load(out);
}
void added_and_written(In, Out out) { thread() ? atomic_add(out, 1.0f) : store(out, 1.0f); }

void cluster_reads_too_early(In, Out out) {
  store_shared(place(thread()), 1.0f);
  sync_block();
  store(out + (block_x() * threads() + thread()), load_shared_of<float>(cluster_rank() ^ 1, place(thread())));
  sync_cluster();
}
void cluster_ends_too_early(In, Out out) {
  store_shared(place(thread()), 1.0f);
  sync_cluster();
  store(out + (block_x() * threads() + thread()), load_shared_of<float>(cluster_rank() ^ 1, place(thread())));
}
void block_of_no_cluster(In, Out) { load_shared_of<float>(1, shared_memory()); }

// ---- launches ----

void nothing(In, Out) {}
__global__ void __launch_bounds__(32, 1) bounded(In, Out) {}

const Case CASES[] = {
    {"past a tensor", {.threads = 32}, run<past_a_tensor>},
    {"before a tensor", {.threads = 32}, run<before_a_tensor>},
    {"past a tensor by half a vector", {.threads = 32}, run<past_a_tensor_by_half_a_vector>},
    {"no tensor", {.threads = 32}, run<no_tensor>},
    {"past shared memory", {.threads = 32, .shared = 128}, run<past_shared_memory>},
    {"before shared memory", {.threads = 32, .shared = 128}, run<before_shared_memory>},
    {"misaligned in a tensor", {.threads = 32}, run<misaligned_in_a_tensor>},
    {"misaligned in shared memory", {.threads = 32, .shared = 128}, run<misaligned_in_shared_memory>},
    {"copy misaligned", {.threads = 32, .shared = 512}, run<copy_misaligned>},
    {"copy past shared memory", {.threads = 32, .shared = 512}, run<copy_past_shared_memory>},
    {"copy past a tensor", {.threads = 32, .shared = 512}, run<copy_past_a_tensor>},
    {"read before any write", {.threads = 32, .shared = 128}, run<read_before_any_write>},
    {"half of it never written", {.threads = 32, .shared = 128}, run<half_of_it_never_written>},
    {"read without a barrier", {.threads = 64, .shared = 128}, run<read_without_a_barrier>},
    {"overwritten without a barrier", {.threads = 64, .shared = 256}, run<overwritten_without_a_barrier>},
    {"written by two warps", {.threads = 64, .shared = 128}, run<written_by_two_warps>},
    {"lanes without a barrier", {.threads = 32, .shared = 128}, run<lanes_without_a_barrier>},
    {"a shuffle is no barrier", {.threads = 32, .shared = 128}, run<a_shuffle_is_no_barrier>},
    {"lanes overwrite", {.threads = 32, .shared = 128}, run<lanes_overwrite>},
    {"matrices overwritten", {.threads = 32, .shared = 512}, run<matrices_overwritten>},
    {"barrier of others", {.threads = 128, .shared = 512}, run<barrier_of_others>},
    {"copy read before its wait", {.threads = 32, .shared = 512}, run<copy_read_before_its_wait>},
    {"copy of the last group read", {.threads = 32, .shared = 1024}, run<copy_of_the_last_group_read>},
    {"copy never committed", {.threads = 32, .shared = 512}, run<copy_never_committed>},
    {"copy seen by others without a barrier",
     {.threads = 32, .shared = 512},
     run<copy_seen_by_others_without_a_barrier>},
    {"copy over what is read", {.threads = 64, .shared = 1024}, run<copy_over_what_is_read>},
    {"write over a copy", {.threads = 32, .shared = 512}, run<write_over_a_copy>},
    {"copy left in flight", {.threads = 32, .shared = 512}, run<copy_left_in_flight>},
    {"barrier for some", {.x = 2, .threads = 96}, run<barrier_for_some>},
    {"one warp has ended", {.threads = 64}, run<one_warp_has_ended>},
    {"one lane has ended", {.threads = 32}, run<one_lane_has_ended>},
    {"lanes at different operations", {.threads = 32}, run<lanes_at_different_operations>},
    {"lanes at different barriers", {.threads = 32}, run<lanes_at_different_barriers>},
    {"barrier of two counts", {.threads = 96}, run<barrier_of_two_counts>},
    {"barrier out of range", {.threads = 64}, run<barrier_out_of_range>},
    {"barrier of half a warp", {.threads = 64}, run<barrier_of_half_a_warp>},
    {"shuffle from nowhere", {.threads = 32}, run<shuffle_from_nowhere>},
    {"blocks write one place", {.x = 2, .threads = 32}, run<blocks_write_one_place>},
    {"blocks write what others read", {.x = 2, .threads = 32}, run<blocks_write_what_others_read>},
    {"added and read", {.threads = 32}, run<added_and_read>},
    {"added and written", {.threads = 32}, run<added_and_written>},
    {"cluster reads too early", {.x = 2, .threads = 32, .shared = 128, .cluster = 2}, run<cluster_reads_too_early>},
    {"cluster ends too early", {.x = 2, .threads = 32, .shared = 128, .cluster = 2}, run<cluster_ends_too_early>},
    {"block of no cluster", {.threads = 32, .shared = 128}, run<block_of_no_cluster>},
    {"no block", {.x = 0, .threads = 32}, run<nothing>},
    {"too many blocks", {.y = 65536, .threads = 32}, run<nothing>},
    {"half a warp", {.threads = 48}, run<nothing>},
    {"too many threads", {.threads = 1056}, run<nothing>},
    {"a cluster that does not fit", {.x = 4, .threads = 32, .cluster = 3}, run<nothing>},
    {"more threads than its launch bounds", {.threads = 64}, run<bounded>},
    {"too much shared memory", {.threads = 32, .shared = 228 << 10}, run<nothing>},
};

}  // namespace
}  // namespace fastgpt

FASTGPT_EXPORTED const char* simt_fault(
    const char* name, const float* in, int64_t in_size, float* out, int64_t out_size) {
  return fastgpt::run_case(fastgpt::CASES, name, in, in_size, out, out_size);
}
