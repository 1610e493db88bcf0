// The direct grouped GEMM: one persistent thread block an SM, a producer warpgroup and two math warpgroups.
#pragma once
#include "cutlass/arch/reg_reconfig.h"

#include "dependent_launch.cuh"
#include "direct/epilogue.cuh"
#include "direct/producer.cuh"
#include "direct/swiglu.cuh"

namespace moe::direct {

// 128 * 40 + 256 * 232 registers are those of an SM.
constexpr int kProducerRegisters = 40, kMathRegisters = 232;

template <class C>
__device__ __forceinline__ void start(Params const& p, typename C::SharedStorage& shared) {
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&p.tokens));
    cute::prefetch_tma_descriptor(reinterpret_cast<cute::TmaDescriptor const*>(&p.weights));
    for (int stage = 0; stage < C::kStages; ++stage) {
      PlainBarrier::init(&shared.full[stage], 1 + 32);  // the thread that loads tiles, the warp that loads scales
      PlainBarrier::init(&shared.empty[stage], kMathWarps * C::kCluster);
      PlainBarrier::init(&shared.scales_read[stage], kMathThreads);
    }
    cutlass::arch::fence_barrier_init();
  }
  if (threadIdx.x < C::kTokens) shared.amax[0][threadIdx.x] = 0.0f;
  if constexpr (C::kCluster > 1) {
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  }
  wait_for_predecessor();
  allow_successor_to_start();
  count_tiles<C>(p, shared.cumulative_tiles);  // ends with a barrier of the block
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1) grouped_gemm(__grid_constant__ Params const p) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& shared = *reinterpret_cast<typename C::SharedStorage*>(shared_bytes);
  int const rank = C::kCluster == 1 ? 0 : static_cast<int>(cute::block_rank_in_cluster());
  start<C>(p, shared);
  Schedule<C> schedule(p, shared.cumulative_tiles, rank);

  int const warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    int const warp = threadIdx.x / 32;
    if (warp == 0) {
      if (threadIdx.x == 0) produce_tiles<C>(p, shared, schedule, rank);
    } else if (warp == 1) {
      produce_scales<C>(p, shared, schedule);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<kMathRegisters>();
    int const math_thread = threadIdx.x - 128;
    Fragment const at;
    Ring<C::kStages> ring;
    Ring<2> turn;
    Tile tile;
    while (schedule.next(tile)) {
      Accumulators<C> sum;
      multiply_tile<C>(p, shared, ring, warpgroup - 1, at, sum);
      if constexpr (!C::kSwiglu) {
        store_tile<C>(p, shared, tile, math_thread, sum);
      } else if constexpr (C::kSwapAB) {
        swiglu_columns<C>(p, shared, tile, math_thread, turn, sum);
      } else {
        RowBlocks<C> blocks(shared, math_thread);
        blocks.first_pass(p, sum[0]);
        multiply_tile<C>(p, shared, ring, warpgroup - 1, at, sum);
        blocks.second_pass(p, tile, sum[0]);
      }
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");  // staged rows must be read before the block ends
  }
  if constexpr (C::kCluster > 1) {
    // A block's shared memory must outlive the loads and arrivals that its peer sends there.
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  }
}

}  // namespace moe::direct
