// The producer warpgroup: one thread feeds tiles by TMA, one warp feeds scales.
#pragma once
#include "cute/arch/copy_sm80.hpp"
#include "cute/arch/copy_sm90_desc.hpp"
#include "cute/arch/copy_sm90_tma.hpp"

#include "direct/schedule.cuh"

namespace moe::direct {

// Row of gate_up, or of the plain weights, at which load number `part` of a pass starts.
template <class C>
__device__ __forceinline__ int weight_row(Params const& p, Tile const& tile, int pass, int part) {
  if constexpr (C::kSwiglu) return (part == 0 ? p.gate_row : p.up_row) + tile.weight_tile * C::kOutputs + pass * (C::kOutputs / C::kPasses);
  return tile.weight_tile * C::kWeights;
}

template <class C>
__device__ __forceinline__ void produce_tiles(Params const& p, typename C::SharedStorage& shared, Schedule<C> schedule, int rank) {
  // Weights pass through L2 once where tokens are few; there, they must not push the tokens out.
  constexpr auto kWeightHint = static_cast<uint64_t>(C::kSwapAB ? cute::TMA::CacheHintSm90::EVICT_FIRST : cute::TMA::CacheHintSm90::EVICT_NORMAL);
  constexpr auto kTokenHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
  constexpr int kLoadRows = C::kPassWeights / C::kWeightLoads;
  Ring<C::kStages> ring;
  Tile tile;
  while (schedule.next(tile)) {
    for (int pass = 0; pass < C::kPasses; ++pass) for (int k = 0; k < p.k; k += kTileK) {
      PlainBarrier::wait(&shared.empty[ring.stage], ring.phase ^ 1);
      uint64_t* const full = &shared.full[ring.stage];
      TileBarrier::arrive_and_expect_tx(full, C::kTileBytes);
#pragma unroll
      for (int part = 0; part < C::kWeightLoads; ++part) {
        cute::SM90_TMA_LOAD_3D::copy(&p.weights, full, kWeightHint, shared.weights[ring.stage] + part * kLoadRows * kTileK,
                                     k, weight_row<C>(p, tile, pass, part), tile.group);
      }
      if constexpr (C::kCluster == 1) {
        cute::SM90_TMA_LOAD_3D::copy(&p.tokens, full, kTokenHint, shared.tokens[ring.stage], k, tile.first_row, 0);
      } else {
        // Every block loads its share of the tokens for the whole cluster.
        constexpr int kShare = C::kTokens / C::kCluster;
        cute::SM90_TMA_LOAD_MULTICAST_3D::copy(&p.tokens, full, (1 << C::kCluster) - 1, kTokenHint,
                                               shared.tokens[ring.stage] + rank * kShare * kTileK, k, tile.first_row + rank * kShare, 0);
      }
      ring.advance();
    }
  }
}

// By one warp. cp.async, because scales of neighbouring rows are k/128 floats apart and rows start anywhere.
template <class C>
__device__ __forceinline__ void produce_scales(Params const& p, typename C::SharedStorage& shared, Schedule<C> schedule) {
  using Copy = cute::SM80_CP_ASYNC_CACHEALWAYS<float>;
  int const lane = threadIdx.x % 32, k_blocks = p.k / kTileK;
  Ring<C::kStages> ring;
  Tile tile;
  while (schedule.next(tile)) {
    float const* const tokens = p.token_scales + int64_t(tile.first_row) * k_blocks;
    float const* weights = p.weight_scales;
    if (lane < C::kWeightScales) {
      // Both passes of a tile lie in the same blocks of gate and up.
      int const row = weight_row<C>(p, tile, 0, C::kSwiglu ? lane : 0) + (C::kSwiglu ? 0 : lane * kBlock);
      weights += (int64_t(tile.group) * (p.n / kBlock) + row / kBlock) * k_blocks;
    }
    for (int pass = 0; pass < C::kPasses; ++pass) for (int block = 0; block < k_blocks; ++block) {
      PlainBarrier::wait(&shared.scales_read[ring.stage], ring.phase ^ 1);
      float* const scales = shared.scales[ring.stage];
#pragma unroll
      for (int i = 0; i < ceil_div(C::kTokens, 32); ++i) {
        int const row = 32 * i + lane;
        if (row < tile.rows) Copy::copy(tokens[row * k_blocks + block], scales[row]);
      }
      if (lane < C::kWeightScales) Copy::copy(weights[block], scales[C::kTokens + lane]);
      cutlass::arch::cpasync_barrier_arrive_noinc(&shared.full[ring.stage]);
      ring.advance();
    }
  }
}

}  // namespace moe::direct
