// Threads of a CUDA grid as fibres of one CPU thread: what the kernels (cuda.h) and the scheduler (fibres.cpp) share.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace shim {

struct Index {
  unsigned x, y, z;
};

struct Copy {  // cp.async: the bytes are copied when a thread waits for them
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
  unsigned rank = 0, cluster = 1;  // rank in the cluster and size of the cluster
  char* memory = nullptr;          // shared memory, dynamic first; null once the block has ended
};

extern Thread* current;
extern Block* blocks;  // the blocks that run together
extern Index grid, block_shape;

void fail(const char* what);  // ends the process
void barrier();
bool barrier_or(bool value);
void cluster(unsigned size);       // sets the number of blocks in the cluster
void cluster_arrive(bool release);
void cluster_wait(bool acquire);
uint64_t exchange(uint64_t bits, unsigned source_lane);  // between the lanes of a warp; orders no memory
void fence();
void yield();                                            // called by a thread that waits for another block
char* dynamic_memory();
char* variable(const void* key, size_t size, size_t alignment);  // a __shared__ variable of the block
Block* of_cluster(unsigned rank);

}  // namespace shim
