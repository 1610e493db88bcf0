// Which tiles a thread block computes, in which order: one thread walks, all roles of the block read what it finds.
#pragma once
#include "direct/config.cuh"

namespace moe::direct {

// Token tiles of an expert that are worked on side by side: with the weight tiles that 132 blocks take at a time they
// make a patch that L2 holds, and every weight tile is read from memory once.
constexpr int kBand = 16;

// cumulative_tiles[g]: token tiles of the groups before g. By all threads of a block.
template <class C, class Params>
__device__ __forceinline__ void count_tiles(Params const& p, int* cumulative_tiles) {
  constexpr int kBatch = 4;  // loads in flight together: most layers have at most 128 local experts
  if (threadIdx.x < 32) {
    int const lane = threadIdx.x;
    int total = 0;
    for (int base = 0; base < p.groups; base += 32 * kBatch) {
      int tiles[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        int const group = base + 32 * i + lane;
        int const rows = group < p.groups ? p.expert_offsets[group + 1] - p.expert_offsets[group] : 0;
        tiles[i] = ceil_div(rows, C::kTokens);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        int inclusive = tiles[i];
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
          int const other = __shfl_up_sync(0xffffffffu, inclusive, distance);
          if (lane >= distance) inclusive += other;
        }
        int const group = base + 32 * i + lane;
        if (group < p.groups) cumulative_tiles[group + 1] = total + inclusive;
        total += __shfl_sync(0xffffffffu, inclusive, 31);
      }
    }
    if (lane == 0) cumulative_tiles[0] = 0;
  }
  __syncthreads();
}

// A role's place in the list of the block's tiles.
template <class C>
class Tiles {
 public:
  __device__ __forceinline__ explicit Tiles(typename C::SharedStorage& shared) : shared_(shared) {}

  // By every thread of the role, each for itself.
  __device__ __forceinline__ bool next(Tile& tile) {
    PlainBarrier::wait(&shared_.tile_ready[ring_.stage], ring_.phase);
    tile = shared_.tiles[ring_.stage];
    asm volatile("" ::: "memory");  // the wrapper of arrive lets the compiler move loads past it
    PlainBarrier::arrive(&shared_.tile_read[ring_.stage]);
    ring_.advance();
    return tile.rows > 0;
  }

 private:
  typename C::SharedStorage& shared_;
  Ring<kTilesAhead> ring_;
};

// Lists a block's share of all tiles, ascending, and then one without rows. By one thread: a tile takes it hundreds of
// cycles, in divisions and in loads, which the math warps do not have.
template <class C, class Params>
__device__ __forceinline__ void list_tiles(Params const& p, typename C::SharedStorage& shared) {
  int const* const cumulative = shared.cumulative_tiles;
  int const across = ceil_div(p.n, C::kWeights);
  int group = 0;
  Ring<kTilesAhead> ring;
  for (int next = blockIdx.x;; next += gridDim.x, ring.advance()) {
    while (group < p.groups && cumulative[group + 1] * across <= next) ++group;
    Tile tile{};
    if (group < p.groups) {
      int const down = cumulative[group + 1] - cumulative[group];
      int const index = next - cumulative[group] * across;
      int const band = index / (kBand * across), in_band = index - band * kBand * across;
      int const height = min(kBand, down - band * kBand);
      int const token_tile = band * kBand + in_band % height;
      tile.group = group;
      tile.first_row = p.expert_offsets[group] + token_tile * C::kTokens;
      tile.rows = min(C::kTokens, p.expert_offsets[group + 1] - tile.first_row);
      tile.weight_tile = in_band / height;
    }
    PlainBarrier::wait(&shared.tile_read[ring.stage], ring.phase ^ 1);
    shared.tiles[ring.stage] = tile;
    asm volatile("" ::: "memory");
    PlainBarrier::arrive(&shared.tile_ready[ring.stage]);
    if (tile.rows == 0) return;
  }
}

}  // namespace moe::direct
