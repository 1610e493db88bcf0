// The direct grouped GEMM: one persistent thread block an SM, a producer warpgroup and two or three math warpgroups.
#pragma once
#include "cutlass/arch/reg_reconfig.h"

#include "dependent_launch.cuh"
#include "direct/epilogue.cuh"
#include "direct/producer.cuh"
#include "direct/swiglu.cuh"

namespace moe::direct {

template <class C>
__device__ __forceinline__ void start(Params const& p, typename C::SharedStorage& shared) {
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&p.tokens));
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&p.weights));
    for (int stage = 0; stage < C::kStages; ++stage) {
      PlainBarrier::init(&shared.full[stage], 1 + 1 + 32);  // who loads weights, who tokens, the warp that loads scales
      PlainBarrier::init(&shared.empty[stage], C::kMathWarps);
      PlainBarrier::init(&shared.scales_read[stage], C::kMathThreads);
    }
    for (int tile = 0; tile < kTilesAhead; ++tile) {
      PlainBarrier::init(&shared.tile_ready[tile], 1);
      PlainBarrier::init(&shared.tile_read[tile], 1 + (C::kGather ? 32 : 1) + 32 + C::kMathThreads);
    }
    PlainBarrier::init(&shared.tile_wanted, 1);
    cutlass::arch::fence_barrier_init();
  }
  if (threadIdx.x < C::kTokens) shared.amax[0][threadIdx.x] = 0.0f;
  // With either, who loads tokens waits for what the predecessor writes, and with ids lets the successor start.
  bool const counts = counts_ids<C>(p);
  if (!counts && !p.offsets_ready) wait_for_predecessor();
  if (!counts) allow_successor_to_start();
  list_groups<C>(p, shared.groups);  // ends with a barrier of the block
}

// What math warps keep from tile to tile.
template <int kStages>
struct Progress {
  Ring<kStages> stages;
  Ring<2> amax_turn;
  Done done;
};

template <class C>
__device__ __forceinline__ void compute_tile(Params const& p, typename C::SharedStorage& shared, Tile const& tile, int blocks, int warpgroup,
                                             Fragment const& at, Progress<C::kStages>& kept) {
  int const math_thread = threadIdx.x - 128;
  load_origins<C>(p, shared, tile, math_thread);
  Accumulators<C> sum;
  clear<C>(sum);
  if constexpr (C::kSwapAB) {
    multiply_in_flight<C>(blocks, shared, kept.stages, warpgroup, at, sum);
  } else {
    multiply_by_parts<C>(blocks, shared, kept.stages, warpgroup, at, sum);
  }
  if constexpr (!C::kSwiglu) {
    store_tile<C>(p, shared, tile, math_thread, sum);
  } else if constexpr (C::kSwapAB) {
    swiglu_columns<C>(p, shared, tile, math_thread, kept.amax_turn, sum);
  } else {
    swiglu_rows<C>(p, shared, tile, math_thread, kept.amax_turn, kept.done, sum);
  }
}

template <class C>
__device__ __forceinline__ void multiply_tiles(Params const& p, typename C::SharedStorage& shared, int warpgroup) {
  int const blocks = p.k / kTileK;
  Fragment const at;
  Tiles<C> tiles(shared);
  Progress<C::kStages> kept;
  Tile tile;
  if constexpr (C::kHalfRows == 0) {
    while (tiles.next(tile)) compute_tile<C>(p, shared, tile, blocks, warpgroup, at, kept);
  } else {
    while (tiles.next(tile)) {
      if (tile.half) {
        compute_tile<Half<C>>(p, shared, tile, blocks, warpgroup, at, kept);
      } else {
        compute_tile<C>(p, shared, tile, blocks, warpgroup, at, kept);
      }
    }
  }
  kept.done.tell(p.output_done);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) grouped_gemm(__grid_constant__ Params const p) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<typename C::SharedStorage*>(shared_bytes);
  start<C>(p, shared);

  int const warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<C::kProducerRegisters>();
    int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0) {
      if constexpr (C::kGather) {
        produce_gathered<C>(p, shared, lane);
      } else {
        if (lane == 0) produce_tokens<C>(p, shared);
      }
    } else if (warp == 1) {
      produce_scales<C>(p, shared);
    } else if (warp == 2) {
      if (lane == 0) list_tiles<C>(p, shared);
    } else if (lane == 0) {
      produce_weights<C>(p, shared);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<C::kMathRegisters>();
    multiply_tiles<C>(p, shared, warpgroup - 1);
  }
}

}  // namespace moe::direct
