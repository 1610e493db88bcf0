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

// Pairs of e4m3 in columns 2q and 2q + 1 of four 8-column groups, where q is the lane's place in its quad -> all eight
// columns of group number q: a 4x4 transpose of pairs.
__device__ __forceinline__ uint2 gather_group(uint32_t groups01, uint32_t groups23, int lane) {
  bool const odd = lane & 1, upper = lane & 2;
  uint32_t const got = __shfl_xor_sync(0xffffffffu, upper ? groups01 : groups23, 2);
  // Two groups of the lanes that are q modulo 2.
  uint32_t const low = upper ? got : groups01, high = upper ? groups23 : got;
  uint32_t const first = __byte_perm(low, high, 0x5410), second = __byte_perm(low, high, 0x7632);
  uint32_t const others = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
  uint32_t const even_lanes = odd ? others : first, odd_lanes = odd ? second : others;
  return make_uint2(__byte_perm(even_lanes, odd_lanes, 0x5410), __byte_perm(even_lanes, odd_lanes, 0x7632));
}

// sum[0] = SwiGLU of gate in sum[0] and up in sum[1].
template <class C>
__device__ __forceinline__ void activate(Params const& p, Accumulators<C>& sum) {
  if (p.clamp_limit > 0.0f) {
#pragma unroll
    for (int i = 0; i < C::kAccumulators; ++i) clamp_gate_up(sum[0][i], sum[1][i], p.clamp_limit);
  }
#pragma unroll
  for (int i = 0; i < C::kAccumulators; ++i) sum[0][i] = swish(sum[0][i], 1.0f) * sum[1][i];
}

// What a warp's last epilogue left on its way to memory. The next one tells GEMM2, which may wait for it: to wait for it at
// once would cost every tile that time.
struct Done {
  int group = 0, pieces = 0;  // of 64 activations
  // By warps whose lanes know their share to be there.
  __device__ __forceinline__ void tell(int32_t* output_done) const {
    if (output_done && pieces > 0 && threadIdx.x % 32 == 0) {
      asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(output_done + group), "r"(pieces) : "memory");
    }
  }
};

// Unswapped: a quad of lanes has the 128 columns of a row's block, or half of them.
template <class C>
__device__ __forceinline__ void swiglu_rows(Params const& p, typename C::SharedStorage& shared, Tile const& tile, int math_thread,
                                            Ring<2>& turn, Done& done, Accumulators<C>& sum) {
  int const lane = math_thread % 32, warpgroup = math_thread / 128;
  WarpRows<C> const rows(shared, math_thread / 32);
  activate<C>(p, sum);
  float const* const v = sum[0];
  float amax[2] = {0.0f, 0.0f};  // of the thread's two rows
#pragma unroll
  for (int i = 0; i < C::kAccumulators; ++i) amax[i / 2 % 2] = fmaxf(amax[i / 2 % 2], fabsf(v[i]));
#pragma unroll
  for (int half = 0; half < 2; ++half) amax[half] = lanes_max<4, 1>(amax[half]);
  if constexpr (C::kHalf) {
    float* const of_row = shared.amax[turn.stage] + rows.first + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) of_row[warpgroup * C::kHalfRows + half * 8] = amax[half];
    sync_math_warps();
#pragma unroll
    for (int half = 0; half < 2; ++half) amax[half] = fmaxf(amax[half], of_row[(warpgroup ^ 1) * C::kHalfRows + half * 8]);
    turn.advance();
  }
  done.tell(p.output_done);
  done = {tile.group, min(max(tile.rows - rows.first, 0), kWarpRows) * (C::kHalf ? 1 : kBlock / 64)};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int const row = lane / 4 + half * 8;
    BlockScale const block(amax[half]);
    uint8_t* const staged = rows.staging + row * C::kStagingPitch + lane % 4 * 8;
#pragma unroll
    for (int j = 0; j < C::kColumns / 8; j += 4) {
      uint32_t pair[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) pair[i] = block.quantise(v[4 * (j + i) + 2 * half], v[4 * (j + i) + 2 * half + 1]);
      *reinterpret_cast<uint2*>(staged + 8 * j) = gather_group(pair[0] | pair[1] << 16, pair[2] | pair[3] << 16, lane);
    }
    if (lane % 4 == 0 && (!C::kHalf || warpgroup == 0) && rows.first + row < tile.rows) {
      p.output_scales[int64_t(tile.first_row + rows.first + row) * (p.n / 2 / kBlock) + tile.weight_tile] = block.scale;
    }
  }
  rows.template store<C::kColumns>(p, shared, tile, 0, lane);
}

// Swapped: a tile has all 128 columns of a block, spread over all math warps.
template <class C>
__device__ __forceinline__ void swiglu_columns(Params const& p, typename C::SharedStorage& shared, Tile const& tile, int math_thread,
                                               Ring<2>& turn, Accumulators<C>& sum) {
  int const lane = math_thread % 32, warp = math_thread / 32;
  auto* const amax = reinterpret_cast<int*>(shared.amax[turn.stage]);
  int* const other = reinterpret_cast<int*>(shared.amax[turn.stage ^ 1]);
  BlockRows<C>::begin();
  activate<C>(p, sum);
  float const* const v = sum[0];
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
