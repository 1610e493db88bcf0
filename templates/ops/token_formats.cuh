// The token encodings: what 16 values of a row become, a thread, in the gather and activation stages.
//
// fp8_block keeps e4m3 codes and their scales. The others keep the bf16 value of code times block factor, which is exact
// (e4m3 has 4 significant bits, e2m1 times an e4m3 factor at most 6), so that one GEMM serves all of them; only fp8, which
// has no block factors, keeps its codes where the weights have kernels that multiply e4m3. Where values are rounded, the
// operations are IEEE's, so that plain torch gives the same bits.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <type_traits>

#include "abi.h"
#include "numerics.cuh"

namespace moe {

// 16 consecutive values a thread: 16-byte loads and stores of bf16 and e4m3. Eight lanes hold one block of fp8_block,
// two one of mxfp8, and each lane one of nvfp4.
constexpr int kValuesPerThread = 16;
constexpr int kLanesPerBlock = kBlock / kValuesPerThread;

using Values = float[kValuesPerThread];

// What MOE_TOKENS_FP8 is called inside where its codes are kept.
constexpr auto kFp8Codes = static_cast<MoeTokens>(MOE_TOKENS_NVFP4 + 1);

inline bool keeps_fp8_codes(MoeLayer const& layer) { return layer.weights == MOE_WEIGHTS_FP8_MXFP4; }

inline int64_t row_value_bytes(MoeLayer const& layer) { return layer.tokens == MOE_TOKENS_FP8_BLOCK || keeps_fp8_codes(layer) ? 1 : 2; }

// Calls body(a constant of the layer's encoding).
template <class Body>
cudaError_t with_tokens(MoeLayer const& layer, Body body) {
  if (keeps_fp8_codes(layer)) return body(std::integral_constant<MoeTokens, kFp8Codes>{});
  switch (layer.tokens) {
    case MOE_TOKENS_FP8_BLOCK: return body(std::integral_constant<MoeTokens, MOE_TOKENS_FP8_BLOCK>{});
    case MOE_TOKENS_BF16: return body(std::integral_constant<MoeTokens, MOE_TOKENS_BF16>{});
    case MOE_TOKENS_FP8: return body(std::integral_constant<MoeTokens, MOE_TOKENS_FP8>{});
    case MOE_TOKENS_MXFP8: return body(std::integral_constant<MoeTokens, MOE_TOKENS_MXFP8>{});
    case MOE_TOKENS_NVFP4: return body(std::integral_constant<MoeTokens, MOE_TOKENS_NVFP4>{});
    default: return cudaErrorInvalidValue;
  }
}

__device__ __forceinline__ void load_bf16x8(__nv_bfloat16 const* from, float* to) {
  uint4 const packed = *reinterpret_cast<uint4 const*>(from);
  uint32_t const words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void load_bf16x16(__nv_bfloat16 const* from, Values& to) {
  load_bf16x8(from, to);
  load_bf16x8(from + 8, to + 8);
}

__device__ __forceinline__ uint4 pack_bf16x8(float const* from) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    words[i] = *reinterpret_cast<uint32_t const*>(&pair);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ uint16_t encode_e4m3x2(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ float2 decode_e4m3x2(uint16_t codes) {
  return __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3)));
}

// As a float of the same exponent field, subnormals included, a code is 2^-126 times its value.
__device__ __forceinline__ float decode_e2m1(uint32_t code) {
  return __uint_as_float((code & 8) << 28 | (code & 7) << 22) * 0x1p126f;
}

__device__ __forceinline__ float decode_ue8m0(uint32_t code) {
  return __uint_as_float(code == 0 ? 0x00400000u : code == 255 ? 0x7fffffffu : code << 23); // subnormal 2^-127, NaN
}

__device__ __forceinline__ void round_e4m3x2(float& low, float& high) {
  float2 const rounded = decode_e4m3x2(encode_e4m3x2(low, high));
  low = rounded.x;
  high = rounded.y;
}

// To nearest, ties to even, saturating at 6. The unit in the last place is half the power of two below, at least 0.5;
// a sum whose own last place that is rounds to it.
__device__ __forceinline__ float round_e2m1(float x) {
  float const magnitude = fabsf(x);
  float const power = __uint_as_float(max(__float_as_uint(magnitude) & 0x7f800000u, 0x3f800000u));
  float const shift = power * (0.75f * 8388608.0f);
  return copysignf(fminf((magnitude + shift) - shift, 6.0f), x);
}

__device__ __forceinline__ float largest_magnitude(Values const& values) {
  float amax = 0.0f;
#pragma unroll
  for (int i = 0; i < kValuesPerThread; ++i) amax = fmaxf(amax, fabsf(values[i]));
  return amax;
}

// How a block of kValues values is rounded, by its largest magnitude.
template <MoeTokens kTokens>
struct BlockRounding;

// OCP MX: the factor's exponent is that of the largest magnitude less e4m3's largest, 8, and at least -127.
template <>
struct BlockRounding<MOE_TOKENS_MXFP8> {
  static constexpr int kValues = 32;
  float multiplier, factor;
  __device__ __forceinline__ explicit BlockRounding(float amax) {
    uint32_t const code = max(__float_as_uint(amax) >> 23, 8u) - 8;
    multiplier = __uint_as_float((254 - code) << 23);
    factor = decode_ue8m0(code);
  }
  __device__ __forceinline__ float operator()(float value) const {
    return decode_e4m3x2(encode_e4m3x2(value * multiplier, 0.0f)).x * factor;
  }
};

template <>
struct BlockRounding<MOE_TOKENS_NVFP4> {
  static constexpr int kValues = 16;
  float factor, reciprocal;
  __device__ __forceinline__ explicit BlockRounding(float amax) {
    factor = decode_e4m3x2(encode_e4m3x2(__fdiv_rn(amax, 6.0f), 0.0f)).x;
    reciprocal = factor > 0.0f ? __frcp_rn(factor) : 0.0f; // a factor of zero: all codes are
  }
  __device__ __forceinline__ float operator()(float value) const {
    // A division: its remainder corrects the first guess to the nearest quotient, in a third of __fdiv_rn's time.
    float const guess = value * reciprocal;
    float const quotient = fmaf(fmaf(-guess, factor, value), reciprocal, guess);
    return round_e2m1(quotient) * factor;
  }
};

// Rounds through an encoding that is stored as bf16. Must be reached by whole warps.
template <MoeTokens kTokens>
__device__ __forceinline__ void round16(Values& values) {
  if constexpr (kTokens == MOE_TOKENS_FP8) {
#pragma unroll
    for (int i = 0; i < kValuesPerThread; i += 2) round_e4m3x2(values[i], values[i + 1]);
  } else if constexpr (kTokens == kFp8Codes) {
    // Packing rounds.
  } else if constexpr (kTokens != MOE_TOKENS_BF16) {
    float amax = largest_magnitude(values);
    if constexpr (BlockRounding<kTokens>::kValues == 2 * kValuesPerThread) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, 1));
    BlockRounding<kTokens> const round(amax);
#pragma unroll
    for (int i = 0; i < kValuesPerThread; ++i) values[i] = round(values[i]);
  }
}

// Tokens that the caller quantised, from the 16-byte aligned `from`-th value on.
template <MoeTokens kTokens>
__device__ __forceinline__ void load_quantised16(void const* codes, void const* factors, int64_t from, Values& to) {
  if constexpr (kTokens == MOE_TOKENS_NVFP4) {
    uint2 const packed = *reinterpret_cast<uint2 const*>(static_cast<uint8_t const*>(codes) + from / 2);
    float const factor = decode_e4m3x2(static_cast<uint8_t const*>(factors)[from / 16]).x;
#pragma unroll
    for (int i = 0; i < kValuesPerThread; ++i) to[i] = decode_e2m1((i < 8 ? packed.x : packed.y) >> 4 * (i % 8)) * factor;
  } else {
    uint4 const packed = *reinterpret_cast<uint4 const*>(static_cast<uint8_t const*>(codes) + from);
    uint32_t const words[4] = {packed.x, packed.y, packed.z, packed.w};
    float const factor = kTokens == MOE_TOKENS_MXFP8 ? decode_ue8m0(static_cast<uint8_t const*>(factors)[from / 32]) : 1.0f;
#pragma unroll
    for (int i = 0; i < kValuesPerThread; i += 2) {
      float2 const pair = decode_e4m3x2(words[i / 4] >> 8 * (i % 4) & 0xffff);
      to[i] = pair.x * factor;
      to[i + 1] = pair.y * factor;
    }
  }
}

// Rows as the GEMMs read them.
struct Rows {
  void* values;  // [rows, width] e4m3 or bf16, by the encoding
  float* scales; // [rows, width / 128], fp8_block only
  int width;
  int64_t value_pitch, scale_pitch; // from row to row
};

inline Rows adjacent_rows(void* values, float* scales, int width) { return {values, scales, width, width, width / kBlock}; }

// A thread's share of a row in its encoding.
template <MoeTokens kTokens>
struct Piece {
  uint4 values[2];
  __device__ __forceinline__ void store(Rows const& rows, int64_t row, int chunk) const {
    auto* const to = reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(rows.values) + row * rows.value_pitch + chunk * kValuesPerThread);
    to[0] = values[0];
    to[1] = values[1];
  }
};

template <>
struct Piece<kFp8Codes> {
  uint4 values;
  __device__ __forceinline__ void store(Rows const& rows, int64_t row, int chunk) const {
    *reinterpret_cast<uint4*>(static_cast<uint8_t*>(rows.values) + row * rows.value_pitch + chunk * kValuesPerThread) = values;
  }
};

template <>
struct Piece<MOE_TOKENS_FP8_BLOCK> {
  uint4 values;
  float scale;
  __device__ __forceinline__ void store(Rows const& rows, int64_t row, int chunk) const {
    *reinterpret_cast<uint4*>(static_cast<uint8_t*>(rows.values) + row * rows.value_pitch + chunk * kValuesPerThread) = values;
    if (chunk % kLanesPerBlock == 0) rows.scales[row * rows.scale_pitch + chunk / kLanesPerBlock] = scale;
  }
};

// quantise(low, high): two e4m3.
template <class Quantise>
__device__ __forceinline__ uint4 pack_e4m3x16(Values const& values, Quantise quantise) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = quantise(values[4 * i], values[4 * i + 1]) | quantise(values[4 * i + 2], values[4 * i + 3]) << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Of values that need no rounding any more.
template <MoeTokens kTokens>
__device__ __forceinline__ Piece<kTokens> pack16(Values const& values) {
  if constexpr (kTokens == kFp8Codes) {
    return {pack_e4m3x16(values, [](float low, float high) { return uint32_t(encode_e4m3x2(low, high)); })};
  } else {
    return {{pack_bf16x8(values), pack_bf16x8(values + 8)}};
  }
}

// Must be reached by whole warps.
template <MoeTokens kTokens>
__device__ __forceinline__ Piece<kTokens> encode16(Values& values) {
  if constexpr (kTokens == MOE_TOKENS_FP8_BLOCK) {
    float amax = largest_magnitude(values);
#pragma unroll
    for (int lanes = 1; lanes < kLanesPerBlock; lanes *= 2) amax = fmaxf(amax, __shfl_xor_sync(kAllLanes, amax, lanes));
    BlockScale const block(amax);
    return {pack_e4m3x16(values, [&](float low, float high) { return block.quantise(low, high); }), block.scale};
  } else {
    round16<kTokens>(values);
    return pack16<kTokens>(values);
  }
}

}  // namespace moe
