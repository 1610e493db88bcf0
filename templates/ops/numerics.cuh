// The layer's arithmetic outside the GEMMs, written once for the kernels that run it as a stage of its own and for those
// that fuse it: SwiGLU, and e4m3 with one scale per block of 128. Other encodings: token_formats.cuh.
#pragma once
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace moe {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kBlock = 128;           // scale granularity along the contraction
// Slots that one block sorts, 4096 in 12.7 us, which take a cluster 9 with 16384; and that the blocks of a GEMM count.
constexpr int kFewSlots = 1024;
constexpr int kMaxGroups = 512;       // local experts, of which the blocks of a GEMM hold a list
constexpr float kE4m3Max = 448.0f;
constexpr float kAmaxFloor = 1e-10f;  // keeps the scale of an all-zero block finite

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// clamp_limit <= 0: none.
__device__ __forceinline__ void clamp_gate_up(float& gate, float& up, float clamp_limit) {
  if (clamp_limit > 0.0f) {
    gate = fminf(gate, clamp_limit);
    up = fminf(fmaxf(up, -clamp_limit), clamp_limit);
  }
}

// x * sigmoid(alpha * x), two units in the last place. The instructions themselves: __expf and __fdividef look after
// subnormal results, which nothing can be seen of here, by as many instructions again.
__device__ __forceinline__ float swish(float x, float alpha) {
  float power, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * (-1.44269504f * alpha)));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + power));
  return x * inverse;
}

__device__ __forceinline__ float swiglu(float gate, float up, float clamp_limit) {
  clamp_gate_up(gate, up, clamp_limit);
  return swish(gate, 1.0f) * up;
}

// What SwiGLU takes of one expert beside gate and up.
struct SwigluFactors {
  float clamp_limit, alpha = 1.0f, beta = 0.0f;
};

__device__ __forceinline__ float swiglu(float gate, float up, SwigluFactors const& f) {
  clamp_gate_up(gate, up, f.clamp_limit);
  return swish(gate, f.alpha) * (up + f.beta);
}

// IEEE division and reciprocal, so that formats/fp8_block.py gives the same bits.
struct BlockScale {
  float scale, inverse;
  __device__ __forceinline__ explicit BlockScale(float amax) {
    scale = __fdiv_rn(fmaxf(amax, kAmaxFloor), kE4m3Max);
    inverse = __frcp_rn(scale);
  }
  __device__ __forceinline__ uint32_t quantise(float low, float high) const {
    return __nv_cvt_float2_to_fp8x2(make_float2(low * inverse, high * inverse), __NV_SATFINITE, __NV_E4M3);
  }
};

}  // namespace moe
