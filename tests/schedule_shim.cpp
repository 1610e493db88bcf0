// templates/direct/schedule.cuh for the host: a thread for each thread block, each of which lists its tiles.
#include <algorithm>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline

struct Index { int x; };
static thread_local Index blockIdx, gridDim, threadIdx;

inline int min(int a, int b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }
inline int atomicAdd(int32_t* counter, int by) { return __atomic_fetch_add(counter, by, __ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) {}
inline void __syncthreads() {}
inline int __shfl_sync(unsigned, int value, int) { return value; }
inline int __shfl_up_sync(unsigned, int value, int) { return value; }

namespace moe {

constexpr int kFewSlots = 1024, kMaxGroups = 512;
constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline void wait_for_predecessor() {}

namespace direct {

constexpr int kTilesAhead = 2, kThreads = 384;

struct Tile {
  int group, first_row, rows, weight_tile;
  bool half;
};

struct Groups {
  int first_row[kMaxGroups + 1], first_item[kMaxGroups + 1];
};

inline int opaque(int value) { return value; }

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  void advance() { stage = (stage + 1) % kStages; }
};

struct Shared {
  Tile tiles[kTilesAhead];
  uint64_t tile_ready[kTilesAhead], tile_read[kTilesAhead], tile_wanted;
  Groups groups;
};

// A tile that is ready is noted, and read at once.
static thread_local Shared* shared_of_block;
static thread_local std::vector<Tile>* tiles_of_block;
struct PlainBarrier {
  static void wait(uint64_t*, uint32_t) { std::this_thread::yield(); }
  static void arrive(uint64_t* barrier) { tiles_of_block->push_back(shared_of_block->tiles[barrier - shared_of_block->tile_ready]); }
};

struct Params {
  int32_t const* expert_offsets;
  int32_t* tiles_taken;
  int32_t const* tokens_done;
  int groups, n, k;
  int32_t const* topk_ids;
  int num_slots, first_expert;
};

template <int kTokens_, int kHalfRows_, bool kSwapAB_, int kBlocksPerSm_ = 1>
struct Config {
  static constexpr int kTokens = kTokens_, kWeights = 256, kHalfRows = kHalfRows_, kBlocksPerSm = kBlocksPerSm_;
  static constexpr bool kCombine = false, kSwapAB = kSwapAB_;
  using SharedStorage = Shared;
};

}  // namespace direct
}  // namespace moe

#include "direct/schedule.cuh"

using namespace moe::direct;

template <class C>
static int list_all(Params const& p, int blocks, int32_t* out) {
  std::mutex lock;
  int count = 0;
  std::vector<std::thread> threads;
  for (int block = 0; block < blocks; ++block) {
    threads.emplace_back([&, block] {
      Shared shared{};
      std::vector<Tile> tiles;
      blockIdx.x = block, gridDim.x = blocks, shared_of_block = &shared, tiles_of_block = &tiles;
      for (int group = 0; group < p.groups; ++group) {
        TokenTiles<C> const down(p.expert_offsets[group + 1] - p.expert_offsets[group]);
        shared.groups.first_row[group + 1] = p.expert_offsets[group + 1];
        shared.groups.first_item[group + 1] = shared.groups.first_item[group] + down.items(moe::ceil_div(p.n, C::kWeights));
      }
      list_tiles<C>(p, shared);
      std::lock_guard const hold(lock);
      for (Tile const& tile : tiles) {
        int32_t const fields[] = {block, tile.group, tile.first_row, tile.rows, tile.weight_tile, tile.half};
        std::copy(std::begin(fields), std::end(fields), out + 6 * count++);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  return count;
}

// Tiles of all blocks as rows of (block, group, first_row, rows, weight_tile, half), in any order of blocks; how many.
extern "C" int list_tiles_of_all(int kind, int32_t const* offsets, int groups, int n, int k, int blocks, int32_t* tiles_taken, int32_t* out) {
  Params const p{offsets, tiles_taken, nullptr, groups, n, k, nullptr, 0, 0};
  switch (kind) {
    case 0: return list_all<Config<32, 0, true>>(p, blocks, out);
    case 1: return list_all<Config<32, 0, true, 2>>(p, blocks, out);
    case 2: return list_all<Config<128, 64, false>>(p, blocks, out);
    default: return list_all<Config<192, 0, false>>(p, blocks, out);
  }
}
