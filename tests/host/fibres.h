// Threads of a CUDA grid as fibres of one CPU thread: what the kernels' side (cuda.h) and the scheduler (fibres.cpp) share.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace shim {

struct Index {
  unsigned x, y, z;
};

struct Copy {  // cp.async: the bytes arrive when they are waited for
  char* to;
  const char* from;
  int bytes, group;
};

struct Block;

struct Thread {
  Index index;
  Block* block;
  int groups = 0;  // committed groups of copies
  std::vector<Copy> copies;
};

struct Block {
  Index index;
  unsigned rank = 0, cluster = 1;  // of the cluster that it is part of
  char* memory = nullptr;          // shared memory: what is dynamic first; null once the block has ended
};

extern Thread* current;
extern Block* blocks;  // of the batch that runs together
extern Index grid, block_shape;

void fail(const char* what);  // ends the process
void barrier();
bool barrier_or(bool value);
void cluster(unsigned size);       // the block is one of so many
void cluster_arrive(bool release);
void cluster_wait(bool acquire);
uint64_t exchange(uint64_t bits, unsigned source_lane);  // between the lanes of a warp; orders no memory
void fence();
void yield();                                            // of a thread that waits for another block
char* dynamic_memory();
char* variable(const void* key, size_t size, size_t alignment);  // a __shared__ variable of the block
Block* of_cluster(unsigned rank);

}  // namespace shim
