// The mixed grouped GEMM: one persistent thread block an SM, a producer warpgroup and two math warpgroups.
#pragma once
#include "cutlass/arch/reg_reconfig.h"

#include "dependent_launch.cuh"
#include "direct/epilogue.cuh"
#include "direct/kernel.cuh"
#include "mixed/mainloop.cuh"
#include "mixed/promoted.cuh"
#include "mixed/producer.cuh"
#include "mixed/swiglu.cuh"

namespace moe::mixed {

template <class C>
__device__ __forceinline__ void start(Params const& p, typename C::SharedStorage& shared) {
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&p.tokens));
    for (int stage = 0; stage < C::kStages; ++stage) {
      PlainBarrier::init(&shared.full[stage], 1);
      PlainBarrier::init(&shared.empty[stage], kMathThreads);
    }
    for (int tile = 0; tile < kTilesAhead; ++tile) {
      PlainBarrier::init(&shared.tile_ready[tile], 1);
      PlainBarrier::init(&shared.tile_read[tile], 1 + kMathThreads);
    }
    PlainBarrier::init(&shared.tile_wanted, 1);
    cutlass::arch::fence_barrier_init();
  }
  if constexpr (C::kFp8) list_magnitudes(shared.magnitudes);
  if constexpr (C::kSwiglu) {
    for (int i = threadIdx.x; i < C::kTokens * C::kRowBlocks; i += C::kThreads) shared.amax[0][i] = 0;
  }
  // With either, who loads tokens waits for what the predecessor writes, and with ids lets the successor start.
  bool const counts = direct::counts_ids<C>(p);
  if (!counts && !p.offsets_ready) wait_for_predecessor();
  if (!counts) allow_successor_to_start();
  direct::list_groups<C>(p, shared.groups);  // ends with a barrier of the block
}

// What becomes of the thread's two rows of weights once they are multiplied; read before, while the loads are awaited.
template <class C>
struct Affine {
  float scale, bias[2] = {0.0f, 0.0f};
  __device__ __forceinline__ Affine(Params const& p, Tile const& tile, int math_thread)
      : scale((p.weight_scales ? p.weight_scales[tile.group] : 1.0f) * C::Weights::kScale) {
    if (!p.bias) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = tile.weight_tile * kSliceRows + math_thread / 32 * 16 + math_thread % 32 / 4 + half * 8, rows = p.n;
      if constexpr (C::kSwiglu) row = output_column(tile, math_thread), rows = p.n / 2;
      int const first = !C::kSwiglu ? 0 : half == 0 ? p.gate_row : p.up_row;
      if (row < rows) bias[half] = p.bias[int64_t(tile.group) * p.n + first + row];
    }
  }
  template <int kCount>
  __device__ __forceinline__ void apply(float (&sum)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = fmaf(sum[i], scale, bias[i / 2 % 2]);
  }
};

template <class C>
__device__ __forceinline__ void multiply_tiles(Params const& p, typename C::SharedStorage& shared) {
  int const math_thread = threadIdx.x - 128, blocks = ceil_div(p.k, C::kTileK);
  direct::Tiles<C> tiles(shared);
  Ring<C::kStages> ring;
  Ring<2> turn;
  Tile tile;
  if constexpr (C::kFp8) {
    if (math_thread >= 128) pass_turn<C>(1);  // the first turn is the first warpgroup's
  }
  while (tiles.next(tile)) {
    direct::load_origins<C>(p, shared, tile, math_thread);
    Affine<C> const affine(p, tile, math_thread);
    direct::Accumulators<C> sum;
    direct::clear<C>(sum);
    if constexpr (C::kFp8) {
      multiply_promoted<C>(blocks, shared, ring, math_thread, sum[0]);
    } else {
      multiply<C>(blocks, shared, ring, math_thread, sum[0]);
    }
    affine.apply(sum[0]);
    if constexpr (C::kSwiglu) {
      activate_tile<C>(p, shared, tile, math_thread, turn, sum[0]);
    } else {
      direct::store_tile<C>(p, shared, tile, math_thread, sum);
    }
  }
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
      if (lane == 0) produce_tiles<C>(p, shared);
    } else if (warp == 1) {
      if (lane == 0) direct::list_tiles<C>(p, shared);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<C::kMathRegisters>();
    multiply_tiles<C>(p, shared);
  }
}

}  // namespace moe::mixed
