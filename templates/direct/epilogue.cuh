// Accumulators -> output rows, staged in shared memory and written row by row with bulk copies, so that a tile that
// reaches past its group's last row stores nothing there.
#pragma once
#include "cute/arch/copy_sm90.hpp"
#include "cute/arch/copy_sm90_tma.hpp"

#include "direct/mainloop.cuh"

namespace moe::direct {

__device__ __forceinline__ void sync_math_warps() { cutlass::arch::NamedBarrier::sync(kMathThreads, 0u); }

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t const*>(&pair);
}

// Starts the copy of one staged row of `C::kOutputs` columns; the thread waits for it before it stages that row again.
template <class C>
__device__ __forceinline__ void store_row(Params const& p, Tile const& tile, uint8_t const* staged, int row) {
  int64_t const columns = C::kSwiglu ? p.n / 2 : p.n;
  int64_t const at = (tile.first_row + row) * columns + tile.weight_tile * C::kOutputs;
  cute::SM90_BULK_COPY_S2G::copy(staged, static_cast<uint8_t*>(p.output) + at * C::kOutputBytes, C::kOutputs * C::kOutputBytes);
}

// Unswapped: a warp holds 16 whole rows, which it stages and stores by itself.
template <class C>
struct WarpRows {
  static constexpr int kRows = 16;
  uint8_t* staging;  // of the warp
  int first;         // row of the tile
  __device__ __forceinline__ WarpRows(typename C::SharedStorage& shared, int math_warp)
      : staging(shared.staging + math_warp * kRows * C::kStagingPitch), first(math_warp * kRows) {}
  __device__ __forceinline__ void begin() const {
    cute::tma_store_wait<0>();
    __syncwarp();
  }
  __device__ __forceinline__ void finish(Params const& p, Tile const& tile) const {
    cute::tma_store_fence();
    __syncwarp();
    int const lane = threadIdx.x % 32;
    if (lane < kRows && first + lane < tile.rows) store_row<C>(p, tile, staging + lane * C::kStagingPitch, first + lane);
    cute::tma_store_arrive();
  }
};

// Swapped: all math warps hold a part of every row.
template <class C>
struct BlockRows {
  static __device__ __forceinline__ void begin() {
    cute::tma_store_wait<0>();
    sync_math_warps();
  }
  static __device__ __forceinline__ void finish(Params const& p, typename C::SharedStorage const& shared, Tile const& tile, int math_thread) {
    cute::tma_store_fence();
    sync_math_warps();
    if (math_thread < tile.rows) store_row<C>(p, tile, shared.staging + math_thread * C::kStagingPitch, math_thread);
    cute::tma_store_arrive();
  }
};

template <class C>
__device__ __forceinline__ void store_tile(Params const& p, typename C::SharedStorage& shared, Tile const& tile, int math_thread,
                                           Accumulators<C> const& sum) {
  int const lane = math_thread % 32, warp = math_thread / 32;
  auto at = [](uint8_t* row, int column) -> cute::uint128_t& { return *reinterpret_cast<cute::uint128_t*>(row + 2 * column); };
  if constexpr (C::kSwapAB) {
    BlockRows<C>::begin();
#pragma unroll
    for (int h = 0; h < C::kMmas; ++h) {
      // A lane names the place of one 8x8 matrix's row: the matrices are this warp's two by eight weights of one or
      // two times eight tokens, and go in transposed.
      int const column = h * 128 + warp * 16 + lane / 8 % 2 * 8;
      if constexpr (C::kTokens == 8) {
        auto& to = at(shared.staging + lane % 8 * C::kStagingPitch, column);
        cute::SM90_U16x4_STSM_T::copy(pack_bf16(sum[h][0], sum[h][1]), pack_bf16(sum[h][2], sum[h][3]), to);
      } else {
#pragma unroll
        for (int j = 0; j < C::kTokens / 8; j += 2) {
          auto& to = at(shared.staging + ((j + lane / 16) * 8 + lane % 8) * C::kStagingPitch, column);
          float const* const v = &sum[h][4 * j];
          cute::SM90_U16x8_STSM_T::copy(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]), to);
        }
      }
    }
    BlockRows<C>::finish(p, shared, tile, math_thread);
  } else {
    WarpRows<C> const rows(shared, warp);
    rows.begin();
    uint8_t* const row = rows.staging + (lane / 8 % 2 * 8 + lane % 8) * C::kStagingPitch;
#pragma unroll
    for (int h = 0; h < C::kMmas; ++h) {
#pragma unroll
      for (int j = 0; j < C::kColumns / 8; j += 2) {
        float const* const v = &sum[h][4 * j];
        cute::SM90_U32x4_STSM_N::copy(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]),
                                      at(row, h * kBlock + 8 * j + lane / 16 * 8));
      }
    }
    rows.finish(p, tile);
  }
}

}  // namespace moe::direct
