// A math warpgroup's mainloop of bf16 tokens: 64 rows of weights from packed bytes to fragments, times the tile's tokens.
//
// fp32 accumulators stay in the tensor cores over all of K: bf16 products are added with more than the 13 bits of e4m3.
// While the wgmma of some steps are in flight, the thread decodes the fragments of the next.
#pragma once
#include <utility>

#include "direct/mainloop.cuh"
#include "mixed/config.cuh"

namespace moe::mixed {

template <class C>
using Fragments = uint32_t[C::kSteps][4];

template <int kSteps>
__device__ __forceinline__ void fence(uint32_t (&fragments)[kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) cute::warpgroup_fence_operand(fragments[step][r]);
  }
}

template <class C, int... i>
__device__ __forceinline__ void multiply_step(uint32_t const (&a)[4], uint64_t tokens, float* sum, std::integer_sequence<int, i...>) {
  C::Mma::fma(a[0], a[1], a[2], a[3], tokens, sum[i]...);
}

// By every thread for itself: each has read weights of its own.
template <class C>
__device__ __forceinline__ void release(typename C::SharedStorage& shared, int stage) {
  asm volatile("" ::: "memory");  // the wrapper of arrive lets the compiler move loads past it
  PlainBarrier::arrive(&shared.empty[stage]);
}

// sum += a tile's product.
template <class C>
__device__ __forceinline__ void multiply(int blocks, typename C::SharedStorage& shared, Ring<C::kStages>& ring, int math_thread,
                                         float (&sum)[C::kAccumulators]) {
  constexpr int kGroups = kSliceSteps / C::kSteps;
  Fragments<C> a[2] = {};
  int previous = 0;
  for (int block = 0; block < blocks; ++block) {
    TileBarrier::wait(&shared.full[ring.stage], ring.phase);
    asm volatile("" ::: "memory");  // the wrapper of wait lets the compiler move loads past it
    uint64_t const tokens = direct::operand(shared.tokens[ring.stage]);
    typename C::Weights weights[C::kSlices];
#pragma unroll
    for (int slice = 0; slice < C::kSlices; ++slice) weights[slice].load(shared.weights[ring.stage] + slice * C::Weights::kSliceBytes, math_thread);
#pragma unroll
    for (int slice = 0; slice < C::kSlices; ++slice) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        int const now = (slice * kGroups + group) % 2;
#pragma unroll
        for (int step = 0; step < C::kSteps; ++step) weights[slice].fragment(group * C::kSteps + step, a[now][step]);
        direct::fence(sum);
        fence(a[now]);
        cute::warpgroup_arrive();
#pragma unroll
        for (int step = 0; step < C::kSteps; ++step) {
          int const along_k = slice * C::kTokenSliceBytes + (group * C::kSteps + step) * 16 * 2;
          multiply_step<C>(a[now][step], tokens + (along_k >> 4), sum, std::make_integer_sequence<int, C::kAccumulators>{});
        }
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<1>();
        fence(a[now ^ 1]);  // until here their registers were being read
        if (slice == 0 && group == 0 && block > 0) release<C>(shared, previous);
      }
    }
    previous = ring.stage;
    ring.advance();
  }
  cute::warpgroup_wait<0>();
  direct::fence(sum);
  fence(a[1]);
  release<C>(shared, previous);
}

}  // namespace moe::mixed
