// A math warpgroup's mainloop: 128 of K by wgmma into a scratch accumulator, then promoted with that block's scales.
//
// Within a K tile the tensor cores add with about 13 bits, so the promotion is what keeps the result's precision. It hides
// behind the wgmma of the next K tile, which is issued first, into a second scratch accumulator.
#pragma once
#include <utility>

#include "cute/arch/mma_sm90_desc.hpp"
#include "cute/arch/mma_sm90_gmma.hpp"

#include "direct/schedule.cuh"

namespace moe::direct {

// The thread's place in the fragment of a 64-row wgmma: registers 4j .. 4j + 3 hold rows `row` and `row + 8`, columns
// 8j + column and + 1 of each.
struct Fragment {
  int row, column;
  __device__ __forceinline__ Fragment() : row(threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4), column(threadIdx.x % 4 * 2) {}
};

// K-major rows of 128 bytes in the 128-byte swizzle: groups of 8 rows follow each other at 1024 bytes.
__device__ __forceinline__ uint64_t operand(uint8_t const* rows) {
  cute::GmmaDescriptor descriptor;
  descriptor.bitfield.start_address_ = static_cast<uint16_t>(cute::cast_smem_ptr_to_uint(rows) >> 4);
  descriptor.bitfield.leading_byte_offset_ = 1;
  descriptor.bitfield.stride_byte_offset_ = 1024 >> 4;
  descriptor.bitfield.layout_type_ = 1;
  return descriptor;
}

template <class Mma, int... i>
__device__ __forceinline__ void multiply(uint64_t a, uint64_t b, float* d, bool accumulate, std::integer_sequence<int, i...>) {
  Mma::fma(a, b, d[i]..., accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

template <class C>
using Accumulators = float[C::kMmas][C::kAccumulators];

template <class C>
__device__ __forceinline__ void fence(Accumulators<C>& values) {
#pragma unroll
  for (int h = 0; h < C::kMmas; ++h) {
#pragma unroll
    for (int i = 0; i < C::kAccumulators; ++i) cute::warpgroup_fence_operand(values[h][i]);
  }
}

// The scales of one K tile that a thread's accumulators need.
template <class C>
struct Scales {
  static constexpr int kTokenScales = C::kSwapAB ? C::kColumns / 4 : 2;
  float tokens[kTokenScales], weights[C::kWeightScales];

  __device__ __forceinline__ void load(float const* scales, int warpgroup, Fragment const& at) {
    if constexpr (C::kSwapAB) {
#pragma unroll
      for (int j = 0; j < C::kColumns / 8; ++j) {
        float2 const pair = *reinterpret_cast<float2 const*>(scales + 8 * j + at.column);
        tokens[2 * j] = pair.x;
        tokens[2 * j + 1] = pair.y;
      }
    } else {
      tokens[0] = scales[warpgroup * 64 + at.row];
      tokens[1] = scales[warpgroup * 64 + at.row + 8];
    }
#pragma unroll
    for (int i = 0; i < C::kWeightScales; ++i) weights[i] = scales[C::kTokens + i];
  }

  __device__ __forceinline__ void promote(Accumulators<C>& sum, Accumulators<C> const& part) const {
#pragma unroll
    for (int h = 0; h < C::kMmas; ++h) {
#pragma unroll
      for (int i = 0; i < C::kAccumulators; ++i) {
        // Swapped, each wgmma has its own rows of weights; otherwise gate and up are halves of the columns.
        int const weight = C::kSwapAB ? h : i * C::kWeightScales / C::kAccumulators;
        int const token = C::kSwapAB ? i / 4 * 2 + i % 2 : i / 2 % 2;
        sum[h][i] += tokens[token] * weights[weight] * part[h][i];
      }
    }
  }
};

// Frees a stage's tiles in every block that may write to them. By one warp.
template <class C>
__device__ __forceinline__ void release(uint64_t* empty) {
  int const lane = threadIdx.x % 32;
  if constexpr (C::kCluster == 1) {
    if (lane == 0) PlainBarrier::arrive(empty);
  } else {
    if (lane < C::kCluster) PlainBarrier::arrive(empty, lane, 1);
  }
}

// One K tile on its way: what its wgmma add up, the scales to promote that with, and the barrier that frees its stage.
template <class C>
struct InFlight {
  Accumulators<C> part;
  Scales<C> scales;
  uint64_t* empty;

  __device__ __forceinline__ void issue(typename C::SharedStorage& shared, Ring<C::kStages>& ring, int warpgroup, Fragment const& at) {
    constexpr auto kRegisters = std::make_integer_sequence<int, C::kAccumulators>{};
    TileBarrier::wait(&shared.full[ring.stage], ring.phase);
    uint64_t const a = operand((C::kSwapAB ? shared.weights[ring.stage] : shared.tokens[ring.stage]) + warpgroup * 64 * kTileK);
    uint64_t const b = operand(C::kSwapAB ? shared.tokens[ring.stage] : shared.weights[ring.stage]);
    fence<C>(part);
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < kTileK / kInstructionK; ++step) {
      int const offset = step * kInstructionK >> 4;
#pragma unroll
      for (int h = 0; h < C::kMmas; ++h) {
        multiply<typename C::Mma>(a + offset + (h * 128 * kTileK >> 4), b + offset, part[h], step > 0, kRegisters);
      }
    }
    cute::warpgroup_commit_batch();
    scales.load(shared.scales[ring.stage], warpgroup, at);
    asm volatile("" ::: "memory");  // the wrapper of arrive lets the compiler move loads past it
    PlainBarrier::arrive(&shared.scales_read[ring.stage]);  // every thread for itself: each has read its own
    empty = &shared.empty[ring.stage];
    ring.advance();
  }

  template <int kLater>  // K tiles issued after this one
  __device__ __forceinline__ void retire(Accumulators<C>& sum) {
    cute::warpgroup_wait<kLater>();
    fence<C>(part);
    release<C>(empty);
    scales.promote(sum, part);
  }
};

// sum = one pass over K.
template <class C>
__device__ __forceinline__ void multiply_tile(Params const& p, typename C::SharedStorage& shared, Ring<C::kStages>& ring,
                                              int warpgroup, Fragment const& at, Accumulators<C>& sum) {
#pragma unroll
  for (int h = 0; h < C::kMmas; ++h) {
#pragma unroll
    for (int i = 0; i < C::kAccumulators; ++i) sum[h][i] = 0.0f;
  }
  int const blocks = p.k / kTileK;
  InFlight<C> even, odd;
  even.issue(shared, ring, warpgroup, at);
  for (int block = 1; block < blocks; block += 2) {
    odd.issue(shared, ring, warpgroup, at);
    even.template retire<1>(sum);
    if (block + 1 == blocks) {
      odd.template retire<0>(sum);
      return;
    }
    even.issue(shared, ring, warpgroup, at);
    odd.template retire<1>(sum);
  }
  even.template retire<0>(sum);
}

}  // namespace moe::direct
