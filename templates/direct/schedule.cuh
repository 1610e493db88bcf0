// Which tiles a thread block computes, in which order.
#pragma once
#include "direct/config.cuh"

namespace moe::direct {

// Token tiles of an expert that are worked on side by side: with the weight tiles that 132 blocks take at a time they
// make a patch that L2 holds, and every weight tile is read from memory once.
constexpr int kBand = 16;

struct Tile {
  int group, first_row, rows;  // rows: how many of the tile's token rows are the group's
  int weight_tile;
};

// cumulative_tiles[g]: token tiles of the groups before g. By all threads of a block.
template <class C>
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

// Walks a block's share of all tiles, ascending: each role of the block walks for itself.
template <class C>
class Schedule {
 public:
  __device__ __forceinline__ Schedule(Params const& p, int const* cumulative_tiles, int cluster_rank)
      : p_(p), cumulative_(cumulative_tiles), across_(p.n / (C::kWeights * C::kCluster)), rank_(cluster_rank),
        next_(blockIdx.x / C::kCluster), step_(gridDim.x / C::kCluster) {}

  __device__ __forceinline__ bool next(Tile& tile) {
    while (group_ < p_.groups && cumulative_[group_ + 1] * across_ <= next_) ++group_;
    if (group_ == p_.groups) return false;
    int const down = cumulative_[group_ + 1] - cumulative_[group_];
    int const index = next_ - cumulative_[group_] * across_;
    int const band = index / (kBand * across_), in_band = index - band * kBand * across_;
    int const height = min(kBand, down - band * kBand);
    int const token_tile = band * kBand + in_band % height;
    int const first = p_.expert_offsets[group_], end = p_.expert_offsets[group_ + 1];
    tile.group = group_;
    tile.first_row = first + token_tile * C::kTokens;
    tile.rows = min(C::kTokens, end - tile.first_row);
    tile.weight_tile = in_band / height * C::kCluster + rank_;
    next_ += step_;
    return true;
  }

 private:
  Params const& p_;
  int const* cumulative_;
  int across_, rank_, next_, step_, group_ = 0;
};

}  // namespace moe::direct
