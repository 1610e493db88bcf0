// The producer warpgroup: one thread feeds tiles by TMA, one warp feeds scales.
#pragma once
#include "cute/arch/copy_sm80.hpp"
#include "cute/arch/copy_sm90_desc.hpp"
#include "cute/arch/copy_sm90_tma.hpp"

#include "dependent_launch.cuh"
#include "direct/schedule.cuh"

namespace moe::direct {

// Row of gate_up, or of the plain weights, at which block number `part` of a tile starts.
template <class C>
__device__ __forceinline__ int weight_row(Params const& p, Tile const& tile, int part) {
  if constexpr (C::kSwiglu) return (part == 0 ? p.gate_row : p.up_row) + tile.weight_tile * kBlock;
  return tile.weight_tile * C::kWeights + part * kBlock;
}

// Of the first tile, weights come as many stages ahead as there are before tokens do: they do not depend on the
// predecessor, whose last thread blocks still multiply.
template <class C>
__device__ __forceinline__ void produce_tiles(Params const& p, typename C::SharedStorage& shared) {
  // Weights pass through L2 once where tokens are few; there, they must not push the tokens out.
  constexpr auto kWeightHint = static_cast<uint64_t>(C::kSwapAB ? cute::TMA::CacheHintSm90::EVICT_FIRST : cute::TMA::CacheHintSm90::EVICT_NORMAL);
  constexpr auto kTokenHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
  constexpr int kLoadBytes = C::kWeightBytes / C::kWeightLoads;
  auto load_weights = [&](Tile const& tile, int stage, int k) {
    TileBarrier::arrive_and_expect_tx(&shared.full[stage], C::kTileBytes);
#pragma unroll
    for (int part = 0; part < C::kWeightLoads; ++part) {
      cute::SM90_TMA_LOAD_3D::copy(&p.weights, &shared.full[stage], kWeightHint, shared.weights[stage] + part * kLoadBytes, k,
                                   weight_row<C>(p, tile, part), tile.group);
    }
  };
  Tiles<C> tiles(shared);
  Ring<C::kStages> ring;
  Tile tile;
  bool more = tiles.next(tile);
  int ahead = more ? min(C::kStages, p.k / kTileK) : 0;
  for (int stage = 0; stage < ahead; ++stage) load_weights(tile, stage, stage * kTileK);
  wait_for_predecessor();
  for (; more; more = tiles.next(tile)) {
    for (int k = 0; k < p.k; k += kTileK) {
      if (ahead > 0) {
        --ahead;
      } else {
        PlainBarrier::wait(&shared.empty[ring.stage], ring.phase ^ 1);
        load_weights(tile, ring.stage, k);
      }
      cute::SM90_TMA_LOAD_3D::copy(&p.tokens, &shared.full[ring.stage], kTokenHint, shared.tokens[ring.stage], k, tile.first_row, 0);
      ring.advance();
    }
  }
}

// By one warp. cp.async, because scales of neighbouring rows are k/128 floats apart and rows start anywhere.
template <class C>
__device__ __forceinline__ void produce_scales(Params const& p, typename C::SharedStorage& shared) {
  using Copy = cute::SM80_CP_ASYNC_CACHEALWAYS<float>;
  int const lane = threadIdx.x % 32, k_blocks = p.k / kTileK;
  wait_for_predecessor();
  Tiles<C> tiles(shared);
  Ring<C::kStages> ring;
  Tile tile;
  while (tiles.next(tile)) {
    float const* const tokens = p.token_scales + int64_t(tile.first_row) * k_blocks;
    float const* weights = p.weight_scales;
    if (lane < C::kMmas) weights += (int64_t(tile.group) * (p.n / kBlock) + weight_row<C>(p, tile, lane) / kBlock) * k_blocks;
    for (int block = 0; block < k_blocks; ++block) {
      PlainBarrier::wait(&shared.scales_read[ring.stage], ring.phase ^ 1);
      float* const scales = shared.scales[ring.stage];
#pragma unroll
      for (int i = 0; i < ceil_div(C::kTokens, 32); ++i) {
        int const row = 32 * i + lane;
        if (row < tile.rows) Copy::copy(tokens[row * k_blocks + block], scales[row]);
      }
      if (lane < C::kMmas) Copy::copy(weights[block], scales[C::kTokens + lane]);
      cutlass::arch::cpasync_barrier_arrive_noinc(&shared.full[ring.stage]);
      ring.advance();
    }
  }
}

}  // namespace moe::direct
