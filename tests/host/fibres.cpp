// The scheduler: runs the threads of several blocks as fibres until all have ended. It is compiled without a sanitizer,
// but tells a sanitizer, if one is loaded, when fibres switch and which operations order memory.
#include "fibres.h"
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#define IF_THERE extern "C" __attribute__((weak))
IF_THERE void* __tsan_get_current_fiber();
IF_THERE void* __tsan_create_fiber(unsigned);
IF_THERE void __tsan_switch_to_fiber(void*, unsigned);
IF_THERE void __tsan_acquire(void*);
IF_THERE void __tsan_release(void*);
IF_THERE void __sanitizer_start_switch_fiber(void**, const void*, size_t);
IF_THERE void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
IF_THERE void __asan_poison_memory_region(const volatile void*, size_t);
IF_THERE void __asan_unpoison_memory_region(const volatile void*, size_t);

namespace shim {

constexpr size_t STACK = 64 << 10, SHARED = 320 << 10, GAP = 64;
constexpr unsigned TOGETHER = 16;
constexpr unsigned WITHOUT_SYNC = 1;

Thread* current;
Block* blocks;
Index grid, block_shape;

void fail(const char* what) {
  const Block& block = *current->block;
  fprintf(stderr, "SHIM: %s (block %u, thread %u)\n", what, block.index.x, current->index.x);
  fflush(stderr);
  _exit(70);
}

static void acquire(void* at) { if (__tsan_acquire) __tsan_acquire(at); }
static void release(void* at) { if (__tsan_release) __tsan_release(at); }

// A barrier that all members pass together, and that orders memory. Two rounds in turn have separate addresses for the
// sanitizer, because the first member may enter the next round before the last one has left this one.
struct Barrier {
  unsigned arrived = 0, round = 0;
  bool any = false, result[2] = {};
  char places[2];

  void complete() {
    result[round & 1] = any;
    arrived = 0, any = false, ++round;
  }
};

struct Fibre : Thread {
  ucontext_t context;
  char* stack = nullptr;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  bool ended = false, spins = false;
  const Barrier* waits_for = nullptr;
  unsigned round = 0, cluster_round = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[32];
  unsigned live = 0;
};

struct State : Block {
  Barrier barrier, cluster_barrier;  // the second is used in the first block of a cluster
  std::vector<Warp> warps;
  std::vector<std::pair<const void*, char*>> variables;
  size_t used = 0;
  unsigned live = 0;
  char end;
};

static ucontext_t scheduler;
static void *scheduler_tsan, *scheduler_fake_stack;
static const void* scheduler_stack;
static size_t scheduler_stack_size;
static std::vector<State> states;
static char start, all_fences;
static size_t dynamic_bytes;
static void (*kernel)(void**);
static void** arguments;

static Fibre& self() { return *static_cast<Fibre*>(current); }
static State& state() { return *static_cast<State*>(current->block); }

static void to_scheduler(bool for_good = false) {
  Fibre& fibre = self();
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fibre.fake_stack, scheduler_stack, scheduler_stack_size);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(scheduler_tsan, WITHOUT_SYNC);
  swapcontext(&fibre.context, &scheduler);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fibre.fake_stack, nullptr, nullptr);
}

static void to_fibre(Fibre& fibre) {
  current = &fibre;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&scheduler_fake_stack, fibre.stack, STACK);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fibre.tsan, WITHOUT_SYNC);
  swapcontext(&scheduler, &fibre.context);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

static unsigned arrive(Barrier& barrier, unsigned members, bool ordered) {
  const unsigned round = barrier.round;
  if (ordered) release(&barrier.places[round & 1]);
  if (++barrier.arrived == members) barrier.complete();
  return round;
}

static void wait(Barrier& barrier, unsigned round, bool ordered) {
  if (barrier.round == round) {
    self().waits_for = &barrier, self().round = round;
    to_scheduler();
  }
  if (ordered) acquire(&barrier.places[round & 1]);
}

bool barrier_or(bool value) {
  Barrier& barrier = state().barrier;
  barrier.any |= value;
  const unsigned round = arrive(barrier, state().live, true);
  wait(barrier, round, true);
  return barrier.result[round & 1];
}

void barrier() { barrier_or(false); }

uint64_t exchange(uint64_t bits, unsigned source_lane) {
  Warp& warp = state().warps[current->index.x / 32];
  warp.slots[current->index.x & 31] = bits;
  wait(warp.barrier, arrive(warp.barrier, warp.live, false), false);
  const uint64_t found = warp.slots[source_lane];
  wait(warp.barrier, arrive(warp.barrier, warp.live, false), false);
  return found;
}

void cluster(unsigned size) {
  State& block = state();
  if (grid.x % size) fail("the grid is not made of whole clusters");
  block.cluster = size;
  block.rank = block.index.x % size;
}

static State& first_of_cluster() { return *(static_cast<State*>(current->block) - current->block->rank); }

static unsigned cluster_members() {
  unsigned members = 0;
  for (unsigned rank = 0; rank < current->block->cluster; ++rank) members += (&first_of_cluster() + rank)->live;
  return members;
}

void cluster_arrive(bool ordered) {
  self().cluster_round = arrive(first_of_cluster().cluster_barrier, cluster_members(), ordered);
}

void cluster_wait(bool ordered) { wait(first_of_cluster().cluster_barrier, self().cluster_round, ordered); }

Block* of_cluster(unsigned rank) {
  if (rank >= current->block->cluster) fail("shared memory of a block that is not in the cluster");
  Block* found = &first_of_cluster() + rank;
  if (!found->memory) fail("shared memory of a block that has ended");
  return found;
}

void fence() {
  acquire(&all_fences);
  release(&all_fences);
}

void yield() {
  self().spins = true;
  to_scheduler();
}

char* dynamic_memory() { return current->block->memory; }

char* variable(const void* key, size_t size, size_t alignment) {
  State& block = state();
  for (const auto& [known, place] : block.variables)
    if (known == key) return place;
  block.used = (block.used + alignment - 1) / alignment * alignment;
  if (block.used + size > SHARED) fail("more shared memory than a block has");
  char* place = block.memory + block.used;
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(place, size);
  block.used += size + GAP;
  block.variables.push_back({key, place});
  return place;
}

static void body() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
  acquire(&start);
  kernel(arguments);
  State& block = state();
  Warp& warp = block.warps[current->index.x / 32];
  release(&block.end);
  self().ended = true;
  if (--block.live && block.barrier.arrived == block.live) block.barrier.complete();
  if (--warp.live && warp.barrier.arrived == warp.live) warp.barrier.complete();
  to_scheduler(true);
}

// Start a block. Its shared memory is filled with NaN.
static void begin(State& block, unsigned x, unsigned threads) {
  block.index = {x, 0, 0};
  block.live = threads;
  block.warps.resize((threads + 31) / 32);
  for (unsigned t = 0; t < threads; ++t) ++block.warps[t / 32].live;
  block.memory = (char*)aligned_alloc(GAP, SHARED);
  for (size_t i = 0; i < SHARED; ++i) ((volatile char*)block.memory)[i] = (char)0xff;
  block.used = (dynamic_bytes + 2 * GAP - 1) / GAP * GAP;
  if (__asan_poison_memory_region)
    __asan_poison_memory_region(block.memory + dynamic_bytes, SHARED - dynamic_bytes);
}

static void end(State& block) {
  acquire(&block.end);
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(block.memory, SHARED);
  free(block.memory);
  block.memory = nullptr;
}

// Run the threads of a block until each has ended or waits for another block. Return whether any made progress.
static bool run_block(std::vector<Fibre*>& fibres) {
  State& block = *static_cast<State*>(fibres[0]->block);
  bool further = false;
  for (bool again = true; again;) {
    again = false;
    for (Fibre* fibre : fibres) {
      if (fibre->ended || (fibre->waits_for && fibre->waits_for->round == fibre->round)) continue;
      fibre->waits_for = nullptr, fibre->spins = false;
      to_fibre(*fibre);
      again |= !fibre->spins;
    }
    further |= again;
  }
  if (!block.live && block.memory) end(block);
  return further;
}

// Run all threads to the end. Each block runs as far as it can before the next one does, so that a block that misses a
// wait is far ahead of the others. The seed chooses the order of blocks and threads.
static void run(std::vector<Fibre>& fibres, unsigned threads, unsigned seed) {
  std::vector<std::vector<Fibre*>> order(fibres.size() / threads);
  std::mt19937 random(seed);
  for (size_t i = 0; i < fibres.size(); ++i) order[i / threads].push_back(&fibres[i]);
  for (auto& block : order) if (seed) std::shuffle(block.begin(), block.end(), random);
  if (seed) std::shuffle(order.begin(), order.end(), random);
  for (bool further = true; further;) {
    further = false;
    for (auto& block : order) further |= run_block(block);
  }
  for (Fibre& fibre : fibres)
    if (!fibre.ended) current = &fibre, fail("deadlock: nobody can go on");
}

// The stack and the sanitizer's handle of a fibre. They are kept for later batches, because creating them is slow.
struct Kept {
  char* stack;
  void* tsan;
};

static Kept kept(size_t fibre) {
  static std::vector<Kept> all;
  while (all.size() <= fibre) {
    void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) perror("SHIM: no memory for a stack"), _exit(70);
    all.push_back({(char*)stack, __tsan_create_fiber ? __tsan_create_fiber(0) : nullptr});
  }
  return all[fibre];
}

static void run_batch(unsigned first, unsigned count, unsigned threads, unsigned seed) {
  states = std::vector<State>(count);
  blocks = states.data();
  std::vector<Fibre> fibres(count * threads);
  for (unsigned b = 0; b < count; ++b) begin(states[b], first + b, threads);
  for (unsigned i = 0; i < fibres.size(); ++i) {
    Fibre& fibre = fibres[i];
    fibre.index = {i % threads, 0, 0};
    fibre.block = &states[i / threads];
    fibre.stack = kept(i).stack, fibre.tsan = kept(i).tsan;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack;
    fibre.context.uc_stack.ss_size = STACK;
    makecontext(&fibre.context, body, 0);
  }
  release(&start);
  run(fibres, threads, seed);
}

extern "C" void shim_launch(
    void (*function)(void**), void** table, unsigned blocks_in_grid, unsigned threads, size_t shared_bytes, int together,
    unsigned seed) {
  kernel = function, arguments = table, dynamic_bytes = shared_bytes;
  grid = {blocks_in_grid, 1, 1}, block_shape = {threads, 1, 1};
  scheduler_tsan = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr;
  const unsigned batch = together ? blocks_in_grid : TOGETHER;
  for (unsigned first = 0; first < blocks_in_grid; first += batch)
    run_batch(first, std::min(batch, blocks_in_grid - first), threads, seed);
}

}  // namespace shim
