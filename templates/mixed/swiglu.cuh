// Epilogue of gate_up: SwiGLU, then the layer's token encoding, kept as tokens are: e4m3, or the bf16 of code times block
// factor.
//
// A tile's weights are 64 rows of gate and the same 64 of up, packed so that each warp multiplies 8 and 8 of them: of the two
// rows of a fragment that a thread holds, the upper is gate and the lower up, for one column of activations.
#pragma once
#include "direct/swiglu.cuh"
#include "mixed/config.cuh"
#include "token_formats.cuh"

namespace moe::mixed {

constexpr int kWarpOutputs = 8;

// Column of the activations, of one half of gate_up, that the thread holds.
__device__ __forceinline__ int output_column(Tile const& tile, int math_thread) {
  return tile.weight_tile * (kSliceRows / 2) + math_thread / 32 * kWarpOutputs + math_thread % 32 / 4;
}

// v[2j + i]: the thread's column of token 8j + 2 (lane % 4) + i. Rounds every block of a row by its largest magnitude, which
// two or four warps find together.
template <class C, MoeTokens kEncoding>
__device__ __forceinline__ void round_blocks(typename C::SharedStorage& shared, int math_thread, direct::Ring<2>& turn, float* v) {
  using Rounding = BlockRounding<kEncoding>;
  int const lane = math_thread % 32, block = math_thread / 32 * kWarpOutputs / Rounding::kValues;
  int* const amax = shared.amax[turn.stage] + block;
  int* const other = shared.amax[turn.stage ^ 1];
#pragma unroll
  for (int j = 0; j < C::kTokens / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float const mine = direct::lanes_max<32, 4>(fabsf(v[2 * j + i]));
      // Positive floats compare as integers do.
      if (lane < 4) atomicMax(amax + (8 * j + 2 * lane + i) * C::kRowBlocks, __float_as_int(mine));
    }
  }
  direct::sync_math_warps();
  for (int i = math_thread; i < C::kTokens * C::kRowBlocks; i += kMathThreads) other[i] = 0;
  turn.advance();
#pragma unroll
  for (int j = 0; j < C::kTokens / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Rounding const round(__int_as_float(amax[(8 * j + 2 * (lane % 4) + i) * C::kRowBlocks]));
      v[2 * j + i] = round(v[2 * j + i]);
    }
  }
}

template <class C>
__device__ __forceinline__ void stage_outputs(typename C::SharedStorage& shared, int math_thread, float const* v) {
  int const lane = math_thread % 32, column = math_thread / 32 * kWarpOutputs;
  // A lane names the place of one 8x8 matrix's row: the matrices are this warp's eight columns of up to four times eight
  // tokens, and go in transposed.
  auto at = [&](int j) -> cute::uint128_t& {
    return *reinterpret_cast<cute::uint128_t*>(shared.staging + (j * 8 + lane) * C::kStagingPitch + 2 * column);
  };
  auto pair = [&](int j) { return direct::pack_bf16(v[2 * j], v[2 * j + 1]); };
  if constexpr (C::kTokens == 8) {
    cute::SM90_U16x2_STSM_T::copy(pair(0), at(0));
  } else if constexpr (C::kTokens == 16) {
    cute::SM90_U16x4_STSM_T::copy(pair(0), pair(1), at(0));
  } else {
#pragma unroll
    for (int j = 0; j < C::kTokens / 8; j += 4) cute::SM90_U16x8_STSM_T::copy(pair(j), pair(j + 1), pair(j + 2), pair(j + 3), at(j));
  }
}

template <class C>
__device__ __forceinline__ void stage_e4m3(typename C::SharedStorage& shared, int math_thread, float const* v) {
  int const lane = math_thread % 32, warp = math_thread / 32;
  uint8_t* const staged = shared.staging + lane % 4 * 2 * C::kStagingPitch + warp * kWarpOutputs + lane / 4;
#pragma unroll
  for (int j = 0; j < C::kTokens / 8; ++j) {
    uint32_t const pair = encode_e4m3x2(v[2 * j], v[2 * j + 1]);
    staged[8 * j * C::kStagingPitch] = static_cast<uint8_t>(pair);
    staged[(8 * j + 1) * C::kStagingPitch] = static_cast<uint8_t>(pair >> 8);
  }
}

template <class C>
__device__ __forceinline__ void activate_tile(Params const& p, typename C::SharedStorage& shared, Tile const& tile, int math_thread,
                                              direct::Ring<2>& turn, float (&sum)[C::kAccumulators]) {
  SwigluFactors factors{p.clamp ? p.clamp[tile.group] : p.clamp_limit};
  if (p.alpha) factors.alpha = p.alpha[tile.group];
  if (p.beta) factors.beta = p.beta[tile.group];
  float const multiplier = p.multiplier ? p.multiplier[tile.group] : 1.0f;
#pragma unroll
  for (int j = 0; j < C::kTokens / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[2 * j + i] = swiglu(sum[4 * j + i], sum[4 * j + 2 + i], factors) * multiplier;
  }
  direct::BlockRows<C>::begin();
  if constexpr (C::kFp8) {
    stage_e4m3<C>(shared, math_thread, sum);
  } else {
    switch (p.encoding) {
      case MOE_TOKENS_FP8:
#pragma unroll
        for (int i = 0; i < C::kTokens / 4; i += 2) round_e4m3x2(sum[i], sum[i + 1]);
        break;
      case MOE_TOKENS_MXFP8: round_blocks<C, MOE_TOKENS_MXFP8>(shared, math_thread, turn, sum); break;
      case MOE_TOKENS_NVFP4: round_blocks<C, MOE_TOKENS_NVFP4>(shared, math_thread, turn, sum); break;
      default: break;
    }
    stage_outputs<C>(shared, math_thread, sum);
  }
  direct::BlockRows<C>::finish(p, shared, tile, math_thread);
}

}  // namespace moe::mixed
