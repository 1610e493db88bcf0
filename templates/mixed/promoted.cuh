// A math warpgroup's mainloop of e4m3 tokens: 64 rows of weights from packed bytes to fragments, times the tile's tokens.
//
// The tensor cores add products of e4m3 with about 13 bits, so a K tile's sums are promoted to fp32, by the float that its
// rows' factors are relative to: 64 tokens at a time, while the next 64 multiply.
#pragma once
#include <utility>

#include "direct/mainloop.cuh"
#include "mixed/mainloop.cuh"

namespace moe::mixed {

constexpr uint32_t kTurnBarrier = 1;  // and the next, a warpgroup each; 0 is that of both

// By the block's first threads, before a barrier.
__device__ __forceinline__ void list_magnitudes(Magnitudes (&table)[kDistances]) {
  struct Table { Magnitudes of[kDistances]; };
  constexpr Table kTable = [] {
    Table all{};
    for (int distance = 0; distance < kDistances; ++distance) all.of[distance] = magnitudes(distance);
    return all;
  }();
#pragma unroll
  for (int distance = 0; distance < kDistances; ++distance) {
    if (threadIdx.x == distance) table[distance] = kTable.of[distance];
  }
}

// A K tile's operand A, and what its sums are multiplied by.
struct DecodedTile {
  uint32_t a[kSliceSteps][4];
  float factors[2];

  __device__ __forceinline__ void decode(uint8_t const* slice, Magnitudes const* table, int thread) {
    Fp8Mxfp4 weights;
    weights.load(slice, thread);
#pragma unroll
    for (int step = 0; step < kSliceSteps; ++step) weights.fragment(table, step, a[step]);
#pragma unroll
    for (int half = 0; half < 2; ++half) factors[half] = weights.factor(half);
  }
};

// With one block an SM the warpgroups take turns: one decodes and promotes while the other multiplies. Else they end up in step,
// and the tensor cores idle while both decode.
template <class C>
__device__ __forceinline__ void take_turn(int warpgroup) {
  if constexpr (C::kBlocksPerSm == 1) cutlass::arch::NamedBarrier::sync(kMathThreads, kTurnBarrier + warpgroup);
}
template <class C>
__device__ __forceinline__ void pass_turn(int warpgroup) {
  if constexpr (C::kBlocksPerSm == 1) cutlass::arch::NamedBarrier::arrive(kMathThreads, kTurnBarrier + (warpgroup ^ 1));
}

template <class C, int... i>
__device__ __forceinline__ void multiply_part(uint32_t const (&a)[4], uint64_t tokens, bool accumulate, float* part, std::integer_sequence<int, i...>) {
  C::Mma::fma(a[0], a[1], a[2], a[3], tokens, part[i]..., accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

// sum += a tile's product.
template <class C>
__device__ __forceinline__ void multiply_promoted(int blocks, typename C::SharedStorage& shared, Ring<C::kStages>& ring, int math_thread,
                                                  float (&sum)[C::kAccumulators]) {
  constexpr int kParts = C::kParts, kCount = C::kPartAccumulators;
  int const warpgroup = math_thread / 128;
  float parts[kParts > 1 ? 2 : 1][kCount];
  DecodedTile tile;
  auto promote = [&](int number) {
    float (&part)[kCount] = parts[number % 2];
    direct::fence(part);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[number * kCount + i] += tile.factors[i / 2 % 2] * part[i];
  };
  for (int block = 0; block < blocks; ++block) {
    int const stage = ring.stage;
    TileBarrier::wait(&shared.full[stage], ring.phase);
    asm volatile("" ::: "memory");  // the wrapper of wait lets the compiler move loads past it
    uint64_t const tokens = direct::operand(shared.tokens[stage]);
    tile.decode(shared.weights[stage], shared.magnitudes, math_thread);
    fence(tile.a);
    take_turn<C>(warpgroup);
#pragma unroll
    for (int number = 0; number < kParts; ++number) {
      if (number >= 2) {
        cute::warpgroup_wait<1>();
        promote(number - 2);
      }
      direct::fence(parts[number % 2]);
      cute::warpgroup_arrive();
#pragma unroll
      for (int step = 0; step < kSliceSteps; ++step) {
        int const from = number * (C::kTokens / kParts) * kSwizzleBytes + step * direct::kInstructionK;
        multiply_part<C>(tile.a[step], tokens + (from >> 4), step > 0, parts[number % 2], std::make_integer_sequence<int, kCount>{});
      }
      cute::warpgroup_commit_batch();
    }
    pass_turn<C>(warpgroup);
    if constexpr (kParts > 1) {
      cute::warpgroup_wait<1>();
      promote(kParts - 2);
    }
    cute::warpgroup_wait<0>();
    fence(tile.a);  // until here its registers were being read
    release<C>(shared, stage);
    promote(kParts - 1);
    ring.advance();
  }
}

}  // namespace moe::mixed
