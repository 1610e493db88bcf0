// A math warpgroup's mainloop: 128 of K by wgmma into a scratch accumulator, then promoted with that block's scales.
//
// Within a K tile the tensor cores add with about 13 bits, so the promotion is what keeps the result's precision. Where
// registers allow it hides behind the wgmma of the next K tile, which is issued first, into a second scratch accumulator;
// where they do not, behind those of the other math warpgroup.
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

template <class C>
using Accumulators = float[C::kMmas][C::kAccumulators];

template <int kCount>
__device__ __forceinline__ void fence(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(values[i]);
}

template <class C>
__device__ __forceinline__ void clear(Accumulators<C>& sum) {
#pragma unroll
  for (int h = 0; h < C::kMmas; ++h) {
#pragma unroll
    for (int i = 0; i < C::kAccumulators; ++i) sum[h][i] = 0.0f;
  }
}

// The scales of one K tile that a thread's accumulators need.
template <class C>
struct Scales {
  static constexpr int kTokenScales = C::kSwapAB ? C::kColumns / 4 : 2;
  float tokens[kTokenScales], weights[C::kMmas];

  __device__ __forceinline__ void load(float const* scales, int warpgroup, Fragment const& at) {
    if constexpr (C::kSwapAB) {
#pragma unroll
      for (int j = 0; j < C::kColumns / 8; ++j) {
        float2 const pair = *reinterpret_cast<float2 const*>(scales + 8 * j + at.column);
        tokens[2 * j] = pair.x;
        tokens[2 * j + 1] = pair.y;
      }
    } else {
      int const row = (C::kHalf ? 0 : warpgroup * 64) + at.row;
      tokens[0] = scales[row];
      tokens[1] = scales[row + 8];
    }
#pragma unroll
    for (int h = 0; h < C::kMmas; ++h) weights[h] = scales[C::kTokens + h];
  }

  // sum += part of instruction h, scaled.
  __device__ __forceinline__ void promote(int h, float (&sum)[C::kAccumulators], float const (&part)[C::kAccumulators]) const {
#pragma unroll
    for (int i = 0; i < C::kAccumulators; ++i) {
      int const token = C::kSwapAB ? i / 4 * 2 + i % 2 : i / 2 % 2;
      sum[i] += tokens[token] * weights[h] * part[i];
    }
  }
};

// One K tile in shared memory.
template <class C>
struct Stage {
  typename C::SharedStorage* shared;
  int index;
  uint64_t a, b;

  __device__ __forceinline__ Stage(typename C::SharedStorage& shared_, Ring<C::kStages> const& ring, int warpgroup)
      : shared(&shared_), index(ring.stage),
        a(operand((C::kSwapAB ? shared_.weights[index] : shared_.tokens[index]) + (C::kHalf ? 0 : warpgroup * 64 * kTileK))),
        b(operand((C::kSwapAB ? shared_.tokens[index] : shared_.weights[index]) + (C::kHalf ? warpgroup * 64 * kTileK : 0))) {}

  // Has the compiler work out the operands here and not where they are used, a chain of five instructions that the tensor
  // cores would wait for: 1 to 2 % of a GEMM.
  __device__ __forceinline__ void pin() {
    uint32_t low_a = static_cast<uint32_t>(a), low_b = static_cast<uint32_t>(b);
    asm volatile("" : "+r"(low_a), "+r"(low_b));
    a = a >> 32 << 32 | low_a;
    b = b >> 32 << 32 | low_b;
  }
  __device__ __forceinline__ void wait(uint32_t phase) const { TileBarrier::wait(&shared->full[index], phase); }

  // part = instruction h over step number `step` of K, added to what steps before it gave.
  __device__ __forceinline__ void multiply(int h, int step, float (&part)[C::kAccumulators]) const {
    int const along_k = step * kInstructionK >> 4, block = h * kBlock * kTileK >> 4;
    issue(a + along_k + (C::kSwapAB ? block : 0), b + along_k + (C::kSwapAB ? 0 : block), part, step > 0,
          std::make_integer_sequence<int, C::kAccumulators>{});
  }

  __device__ __forceinline__ void load(Scales<C>& scales, int warpgroup, Fragment const& at) const {
    scales.load(shared->scales[index], warpgroup, at);
    asm volatile("" ::: "memory");  // the wrapper of arrive lets the compiler move loads past it
    PlainBarrier::arrive(&shared->scales_read[index]);  // every thread for itself: each has read its own
  }

  __device__ __forceinline__ void release() const {
    if (threadIdx.x % 32 == 0) PlainBarrier::arrive(&shared->empty[index]);
  }

 private:
  template <int... i>
  static __device__ __forceinline__ void issue(uint64_t a, uint64_t b, float* d, bool accumulate, std::integer_sequence<int, i...>) {
    C::Mma::fma(a, b, d[i]..., accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
  }
};

constexpr int kSteps = kTileK / kInstructionK;

// One K tile on its way: what its wgmma add up, and the scales to promote that with.
template <class C>
struct InFlight {
  Accumulators<C> part;
  Scales<C> scales;
  uint64_t* empty;

  __device__ __forceinline__ void issue(typename C::SharedStorage& shared, Ring<C::kStages>& ring, int warpgroup, Fragment const& at) {
    Stage<C> const stage(shared, ring, warpgroup);
    stage.wait(ring.phase);
#pragma unroll
    for (int h = 0; h < C::kMmas; ++h) fence(part[h]);
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int h = 0; h < C::kMmas; ++h) stage.multiply(h, step, part[h]);
    }
    cute::warpgroup_commit_batch();
    stage.load(scales, warpgroup, at);
    empty = &shared.empty[stage.index];
    ring.advance();
  }

  template <int kLater>  // K tiles issued after this one
  __device__ __forceinline__ void retire(Accumulators<C>& sum) {
    cute::warpgroup_wait<kLater>();
#pragma unroll
    for (int h = 0; h < C::kMmas; ++h) fence(part[h]);
    if (threadIdx.x % 32 == 0) PlainBarrier::arrive(empty);
#pragma unroll
    for (int h = 0; h < C::kMmas; ++h) scales.promote(h, sum[h], part[h]);
  }
};

// sum = a tile's product, by two K tiles in flight.
template <class C>
__device__ __forceinline__ void multiply_in_flight(int blocks, typename C::SharedStorage& shared, Ring<C::kStages>& ring,
                                                   int warpgroup, Fragment const& at, Accumulators<C>& sum) {
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

// sum = a tile's product, by one scratch accumulator for every part of the tile's weights in turn. What can be done before
// the tensor cores have finished a part is done: else they would idle for it.
template <class C>
__device__ __forceinline__ void multiply_by_parts(int blocks, typename C::SharedStorage& shared, Ring<C::kStages>& ring,
                                                  int warpgroup, Fragment const& at, Accumulators<C>& sum) {
  constexpr int kTogether = C::kMmasTogether;
  float part[kTogether][C::kAccumulators];
  Scales<C> next_scales;
  Stage<C> next(shared, ring, warpgroup);
  auto look_up = [&] {
    next.wait(ring.phase);
    next.load(next_scales, warpgroup, at);
    ring.advance();
  };
  look_up();
  for (int block = 0; block < blocks; ++block) {
    Stage<C> const stage = next;
    Scales<C> const scales = next_scales;
#pragma unroll
    for (int first = 0; first < C::kMmas; first += kTogether) {
      bool const last = first + kTogether == C::kMmas;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) fence(part[i]);
      cute::warpgroup_arrive();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) stage.multiply(first + i, step, part[i]);
      }
      cute::warpgroup_commit_batch();
      if (last) {
        next = Stage<C>(shared, ring, warpgroup);
        next.pin();
        if (block + 1 < blocks) look_up();
      }
      cute::warpgroup_wait<0>();
#pragma unroll
      for (int i = 0; i < kTogether; ++i) fence(part[i]);
      if (last) stage.release();
#pragma unroll
      for (int i = 0; i < kTogether; ++i) scales.promote(first + i, sum[first + i], part[i]);
    }
  }
}

}  // namespace moe::direct
