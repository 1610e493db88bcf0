// What the bandwidth-bound stages of a layer share: 16 values a thread and their quantiser, and one function a stage.
#pragma once
#include <cuda_bf16.h>
#include <stdint.h>

#include "abi.h"
#include "dependent_launch.cuh"
#include "numerics.cuh"

namespace moe {

constexpr int kMaxTopK = 32;
constexpr int kMaxExperts = 1024;

struct Buffers {
  int32_t* expert_offsets;
  int32_t* permuted_row;
  uint8_t* rows;
  float* row_scales;
  __nv_bfloat16* gemm1_output;
  uint8_t* activation;
  float* activation_scales;
  __nv_bfloat16* gemm2_output;
  MoeGroupMetadata gemm1, gemm2;
  void* gemm_workspace;
};

cudaError_t route(MoeFp8BlockLayer const& layer);
cudaError_t permute(MoeFp8BlockLayer const& layer, Buffers const& buffers);
cudaError_t gather(MoeFp8BlockLayer const& layer, Buffers const& buffers);
cudaError_t activate(MoeFp8BlockLayer const& layer, Buffers const& buffers);
cudaError_t combine(MoeFp8BlockLayer const& layer, Buffers const& buffers);

// Several stages, in one launch where that is faster.
cudaError_t permute_and_gather(MoeFp8BlockLayer const& layer, Buffers const& buffers);
cudaError_t route_permute_and_gather(MoeFp8BlockLayer const& layer, Buffers const& buffers);

// 16 consecutive values a thread, so that eight lanes hold one 1x128 block: 16-byte loads of bf16 and one
// 16-byte store of e4m3.
constexpr int kValuesPerThread = 16;
constexpr int kLanesPerBlock = kBlock / kValuesPerThread;

__device__ __forceinline__ void load_bf16x8(__nv_bfloat16 const* from, float* to) {
  uint4 const packed = *reinterpret_cast<uint4 const*>(from);
  uint32_t const words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

// Quantises the 16 values of each of eight neighbouring lanes as one block. Must be reached by whole warps.
__device__ __forceinline__ uint4 quantise_block(float const (&values)[kValuesPerThread], float& scale) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kValuesPerThread; ++i) amax = fmaxf(amax, fabsf(values[i]));
#pragma unroll
  for (int lanes = 1; lanes < kLanesPerBlock; lanes *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, lanes));
  BlockScale const block(amax);
  scale = block.scale;
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = block.quantise(values[4 * i], values[4 * i + 1]) | block.quantise(values[4 * i + 2], values[4 * i + 3]) << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace moe
