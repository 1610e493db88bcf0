// What the bandwidth-bound stages of a layer share: launch with programmatic dependent launch, the e4m3
// quantiser, and one function a stage.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "abi.h"

namespace moe {

constexpr int kBlock = 128;           // scale granularity along the contraction
constexpr float kE4m3Max = 448.0f;
constexpr float kAmaxFloor = 1e-10f;  // keeps the scale of an all-zero block finite
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

// Every kernel of a layer first lets its successor start, so that the successor's launch hides behind it, and then
// waits for its predecessor, in every thread: only then does "my predecessor has finished" imply that everything
// before it has, which is what makes early starts safe along the whole chain.
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void allow_successor_to_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

template <class... Params, class... Args>
cudaError_t launch_in_clusters(void (*kernel)(Params...), int grid, int cluster, int threads, int shared_bytes, void* stream, Args... args) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), int grid, int threads, int shared_bytes, void* stream, Args... args) {
  return launch_in_clusters(kernel, grid, 1, threads, shared_bytes, stream, args...);
}

__host__ __device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

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

// Quantises the 16 values of each of eight neighbouring lanes as one block. IEEE division and reciprocal, so
// that formats/fp8_block.py gives the same bits. Must be reached by whole warps.
__device__ __forceinline__ uint4 quantise_block(float const (&values)[kValuesPerThread], float& scale) {
  float amax = kAmaxFloor;
#pragma unroll
  for (int i = 0; i < kValuesPerThread; ++i) amax = fmaxf(amax, fabsf(values[i]));
#pragma unroll
  for (int lanes = 1; lanes < kLanesPerBlock; lanes *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, lanes));
  scale = __fdiv_rn(amax, kE4m3Max);
  float const inverse = __frcp_rn(scale);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t const low = __nv_cvt_float2_to_fp8x2(make_float2(values[4 * i] * inverse, values[4 * i + 1] * inverse), __NV_SATFINITE, __NV_E4M3);
    uint32_t const high = __nv_cvt_float2_to_fp8x2(make_float2(values[4 * i + 2] * inverse, values[4 * i + 3] * inverse), __NV_SATFINITE, __NV_E4M3);
    words[i] = low | high << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace moe
