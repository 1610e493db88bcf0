// Epilogue of gate_up: SwiGLU on accumulators that hold gate and up of the same columns, then e4m3 with one scale per 1x128.
#pragma once
#include "direct/epilogue.cuh"

namespace moe::direct {

template <int kLanes, int kFirst>
__device__ __forceinline__ float lanes_max(float value) {
#pragma unroll
  for (int distance = kFirst; distance < kLanes; distance *= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// Unswapped: a warp has 64 of a block's 128 columns after the first pass, the others after the second. The first wait in
// the staged rows, as bf16 like the result of a GEMM that fuses nothing; in registers they would spill.
template <class C>
struct RowBlocks {
  static constexpr int kHalf = C::kAccumulators / 2;
  WarpRows<C> rows;
  float amax[2] = {0.0f, 0.0f};  // of the thread's two rows

  __device__ __forceinline__ RowBlocks(typename C::SharedStorage& shared, int math_thread) : rows(shared, math_thread / 32) {}

  __device__ __forceinline__ uint32_t* kept(int half) const {
    int const lane = threadIdx.x % 32;
    return reinterpret_cast<uint32_t*>(rows.staging + (lane / 4 + half * 8) * C::kStagingPitch) + lane % 4;
  }

  // v[i] = SwiGLU of a pass's accumulators.
  __device__ __forceinline__ void activate(Params const& p, float* v) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      v[i] = swiglu(v[i], v[kHalf + i], p.clamp_limit);
      amax[i / 2 % 2] = fmaxf(amax[i / 2 % 2], fabsf(v[i]));
    }
  }

  __device__ __forceinline__ void first_pass(Params const& p, float* v) {
    activate(p, v);
    rows.begin();
#pragma unroll
    for (int i = 0; i < kHalf; i += 2) kept(i / 2 % 2)[i / 4 * 4] = pack_bf16(v[i], v[i + 1]);
  }

  __device__ __forceinline__ void second_pass(Params const& p, Tile const& tile, float* v) {
    activate(p, v);
    int const lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t first[kHalf / 4];
#pragma unroll
      for (int j = 0; j < kHalf / 4; ++j) first[j] = kept(half)[4 * j];
      __syncwarp();  // e4m3 goes where the neighbours' bf16 was
      int const row = lane / 4 + half * 8;
      BlockScale const block(lanes_max<4, 1>(amax[half]));
      auto* const staged = reinterpret_cast<uint16_t*>(rows.staging + row * C::kStagingPitch) + lane % 4;
#pragma unroll
      for (int j = 0; j < kHalf / 4; ++j) {
        float const low = __uint_as_float(first[j] << 16), high = __uint_as_float(first[j] & 0xffff0000u);
        staged[4 * j] = static_cast<uint16_t>(block.quantise(low, high));
        staged[kHalf + 4 * j] = static_cast<uint16_t>(block.quantise(v[4 * j + 2 * half], v[4 * j + 2 * half + 1]));
      }
      if (lane % 4 == 0 && rows.first + row < tile.rows) {
        p.output_scales[int64_t(tile.first_row + rows.first + row) * (p.n / 2 / kBlock) + tile.weight_tile] = block.scale;
      }
    }
    rows.finish(p, tile);
  }
};

// Swapped: a tile has all 128 columns of a block, spread over all math warps.
template <class C>
__device__ __forceinline__ void swiglu_columns(Params const& p, typename C::SharedStorage& shared, Tile const& tile, int math_thread,
                                               Ring<2>& turn, Accumulators<C>& sum) {
  int const lane = math_thread % 32, warp = math_thread / 32;
  auto* const amax = reinterpret_cast<int*>(shared.amax[turn.stage]);
  int* const other = reinterpret_cast<int*>(shared.amax[turn.stage ^ 1]);
  float* const v = sum[0];
  BlockRows<C>::begin();
#pragma unroll
  for (int i = 0; i < C::kAccumulators; ++i) v[i] = swiglu(v[i], sum[1][i], p.clamp_limit);
#pragma unroll
  for (int j = 0; j < C::kTokens / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float const mine = lanes_max<32, 4>(fmaxf(fabsf(v[4 * j + i]), fabsf(v[4 * j + 2 + i])));
      // Positive floats compare as integers do.
      if (lane < 4) atomicMax(amax + 8 * j + 2 * lane + i, __float_as_int(mine));
    }
  }
  sync_math_warps();
  if (math_thread < C::kTokens) other[math_thread] = 0;
  turn.advance();
#pragma unroll
  for (int j = 0; j < C::kTokens / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const token = 8 * j + lane % 4 * 2 + i;
      BlockScale const block(__int_as_float(amax[token]));
      uint32_t const pair = block.quantise(v[4 * j + i], v[4 * j + 2 + i]);
      uint8_t* const staged = shared.staging + token * C::kStagingPitch + warp * 16 + lane / 4;
      staged[0] = static_cast<uint8_t>(pair);
      staged[8] = static_cast<uint8_t>(pair >> 8);
      if (warp == 0 && lane < 4 && token < tile.rows) {
        p.output_scales[int64_t(tile.first_row + token) * (p.n / 2 / kBlock) + tile.weight_tile] = block.scale;
      }
    }
  }
  BlockRows<C>::finish(p, shared, tile, math_thread);
}

}  // namespace moe::direct
