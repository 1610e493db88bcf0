// Accumulators -> output rows, staged in shared memory and written from there 16 bytes a lane, so that neighbours write
// neighbouring bytes and rows past the group's last are left out. Bulk copies of whole rows, one lane each, take longer: the
// instruction takes one lane's addresses at a time.
#pragma once
#include "cute/arch/copy_sm80.hpp"
#include "cute/arch/copy_sm90.hpp"

#include "direct/mainloop.cuh"

namespace moe::direct {

constexpr int kWarpRows = 16;  // of a 64-row instruction's result, in a warp

__device__ __forceinline__ void sync_math_warps() { cutlass::arch::NamedBarrier::sync(kMathThreads, 0u); }

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t const*>(&pair);
}

// Before a tile's product, which hides the time it takes.
template <class C, class Params>
__device__ __forceinline__ void load_origins(Params const& p, typename C::SharedStorage& shared, Tile const& tile, int math_thread) {
  if constexpr (C::kCombine) {
    int const lane = math_thread % 32, staged = C::kSwapAB ? math_thread : math_thread / 32 * kWarpRows + lane;
    int const row = C::kHalf ? staged % C::kHalfRows : staged;
    if (row < tile.rows && (C::kSwapAB || lane < kWarpRows)) {
      cute::SM80_CP_ASYNC_CACHEALWAYS<uint64_t>::copy(reinterpret_cast<uint64_t const&>(p.row_origins[tile.first_row + row]), reinterpret_cast<uint64_t&>(shared.origins[staged]));
    }
  }
}

template <class C>
__device__ __forceinline__ void wait_for_origins() {
  if constexpr (C::kCombine) cute::cp_async_wait<0>();
}

// Eight bf16 += values, rounded to nearest.
__device__ __forceinline__ void add(void* to, uint4 values) {
  asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(values.x), "r"(values.y),
               "r"(values.z), "r"(values.w)
               : "memory");
}

// Stores kRows staged rows of kBytes: of the staging from row `staged` on, of the tile from `row` and `column` on.
template <class C, int kRows, int kBytes, int kThreadsToStore, class Params>
__device__ __forceinline__ void store_staged(Params const& p, typename C::SharedStorage const& shared, Tile const& tile, int staged, int row,
                                             int column, int thread) {
  constexpr int kChunks = kBytes / 16;
  int64_t const columns = C::kSwiglu ? p.n / 2 : p.n, first_column = int64_t(tile.weight_tile) * C::kOutputs + column;
#pragma unroll
  for (int first = 0; first < kRows * kChunks; first += kThreadsToStore) {
    int const below = (first + thread) / kChunks, chunk = (first + thread) % kChunks;
    int64_t const to_column = first_column + chunk * (16 / C::kOutputBytes);
    if (row + below >= tile.rows || to_column >= columns) continue;
    uint4 const values = *reinterpret_cast<uint4 const*>(shared.staging + (staged + below) * C::kStagingPitch + chunk * 16);
    int64_t const to_row = C::kCombine ? shared.origins[staged + below].token : tile.first_row + row + below;
    uint8_t* const to = static_cast<uint8_t*>(p.output) + (to_row * columns + to_column) * C::kOutputBytes;
    if constexpr (C::kCombine) {
      add(to, values);
    } else {
      *reinterpret_cast<uint4*>(to) = values;
    }
  }
}

// Unswapped: a warp holds 16 rows, which it stages and stores by itself, of half a tile its warpgroup's columns of each block.
template <class C>
struct WarpRows {
  int staged, first, column;  // of the rows: the first of those staged, and which it is of the tile
  uint8_t* staging;
  __device__ __forceinline__ WarpRows(typename C::SharedStorage& shared, int math_warp)
      : staged(math_warp * kWarpRows), first(C::kHalf ? staged % C::kHalfRows : staged), column(C::kHalf ? math_warp / 4 * C::kColumns : 0),
        staging(shared.staging + staged * C::kStagingPitch) {}
  template <int kBytes, class Params>
  __device__ __forceinline__ void store(Params const& p, typename C::SharedStorage const& shared, Tile const& tile, int from_column, int lane) const {
    __syncwarp();
    store_staged<C, kWarpRows, kBytes, 32>(p, shared, tile, staged, first, column + from_column, lane);
    __syncwarp();
  }
};

// Swapped: all math warps hold a part of every row.
template <class C>
struct BlockRows {
  static __device__ __forceinline__ void begin() { sync_math_warps(); }
  template <class Params>
  static __device__ __forceinline__ void finish(Params const& p, typename C::SharedStorage const& shared, Tile const& tile, int math_thread) {
    sync_math_warps();
    store_staged<C, C::kTokens, C::kStagedBytes, kMathThreads>(p, shared, tile, 0, 0, 0, math_thread);
    if constexpr (C::kCombine) sync_math_warps();  // the next tile's origins are loaded before its rows are staged
  }
};

// Multiplies the swapped tile's columns by their weights.
template <class C>
__device__ __forceinline__ void weigh_columns(MoeRowOrigin const* origins, int lane, Accumulators<C>& sum) {
#pragma unroll
  for (int j = 0; j < C::kTokens / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float const weight = origins[8 * j + lane % 4 * 2 + i].weight;
#pragma unroll
      for (int h = 0; h < C::kMmas; ++h) {
        sum[h][4 * j + i] *= weight;
        sum[h][4 * j + 2 + i] *= weight;
      }
    }
  }
}

// Multiplies the 16 rows of a warp, of which origins[0] is the first, by their weights.
template <class C>
__device__ __forceinline__ void weigh_rows(MoeRowOrigin const* origins, int lane, Accumulators<C>& sum) {
  float const upper = origins[lane / 4].weight, lower = origins[lane / 4 + 8].weight;
#pragma unroll
  for (int h = 0; h < C::kMmas; ++h) {
#pragma unroll
    for (int i = 0; i < C::kAccumulators; ++i) sum[h][i] *= i / 2 % 2 ? lower : upper;
  }
}

template <class C, class Params>
__device__ __forceinline__ void store_tile(Params const& p, typename C::SharedStorage& shared, Tile const& tile, int math_thread,
                                           Accumulators<C>& sum) {
  math_thread = opaque(math_thread);
  int const lane = math_thread % 32, warp = math_thread / 32;
  auto at = [](uint8_t* row, int column) -> cute::uint128_t& { return *reinterpret_cast<cute::uint128_t*>(row + 2 * column); };
  if constexpr (C::kSwapAB) {
    wait_for_origins<C>();
    BlockRows<C>::begin();
    if constexpr (C::kCombine) weigh_columns<C>(shared.origins, lane, sum);
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
    constexpr int kStaged = C::kStagedBytes / C::kOutputBytes;  // columns
    WarpRows<C> const rows(shared, warp);
    wait_for_origins<C>();
    __syncwarp();
    if constexpr (C::kCombine) weigh_rows<C>(shared.origins + rows.staged, lane, sum);
    uint8_t* const row = rows.staging + (lane / 8 % 2 * 8 + lane % 8) * C::kStagingPitch;
#pragma unroll
    for (int h = 0; h < C::kMmas; ++h) {
#pragma unroll
      for (int first = 0; first < C::kColumns; first += kStaged) {
#pragma unroll
        for (int j = 0; j < kStaged / 8; j += 2) {
          float const* const v = &sum[h][4 * (first / 8 + j)];
          cute::SM90_U32x4_STSM_N::copy(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]),
                                        at(row, 8 * j + lane / 16 * 8));
        }
        rows.template store<C::kStagedBytes>(p, shared, tile, h * kBlock + first, lane);
      }
    }
  }
}

}  // namespace moe::direct
