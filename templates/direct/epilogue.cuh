// Accumulators -> output rows, staged in shared memory and written row by row with bulk copies, so that a tile that
// reaches past its group's last row stores nothing there.
#pragma once
#include "cute/arch/copy_sm80.hpp"
#include "cute/arch/copy_sm90.hpp"
#include "cute/arch/copy_sm90_tma.hpp"

#include "direct/mainloop.cuh"

namespace moe::direct {

__device__ __forceinline__ void sync_math_warps() { cutlass::arch::NamedBarrier::sync(kMathThreads, 0u); }

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t const*>(&pair);
}

// What a math thread stores of a tile: a row, or of half a tile one of the pieces that its warpgroup has of a row.
template <class C>
struct Stored {
  static constexpr int kPieces = C::kHalf ? C::kOutputs / kBlock : 1, kColumns = C::kHalf ? kBlock / 2 : C::kOutputs;
  int row, staged;         // of the tile, kTokens or more: none; of shared.staging
  int piece = 0, column = 0;// of the tile
  __device__ __forceinline__ explicit Stored(int math_thread) : row(math_thread), staged(math_thread) {
    if constexpr (C::kSwapAB) return;
    int const warp = math_thread / 32, lane = math_thread % 32;
    piece = lane / 16;
    staged = warp * 16 + lane % 16;
    row = piece < kPieces ? (C::kHalf ? staged % C::kHalfRows : staged) : C::kTokens;
    if (C::kHalf) column = piece * kBlock + warp / 4 * kColumns;
  }
};

// Before a tile's product, which hides the time it takes.
template <class C, class Params>
__device__ __forceinline__ void load_origins(Params const& p, typename C::SharedStorage& shared, Tile const& tile, int math_thread) {
  if constexpr (C::kCombine) {
    Stored<C> const to(math_thread);
    if (to.row < tile.rows && to.piece == 0) {
      cute::SM80_CP_ASYNC_CACHEALWAYS<uint64_t>::copy(reinterpret_cast<uint64_t const&>(p.row_origins[tile.first_row + to.row]), reinterpret_cast<uint64_t&>(shared.origins[to.staged]));
    }
  }
}

template <class C>
__device__ __forceinline__ void wait_for_origins() {
  if constexpr (C::kCombine) cute::cp_async_wait<0>();
}

// dst += src, in bf16, rounded to nearest.
__device__ __forceinline__ void add_bulk(void const* shared, void* global, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%0], [%1], %2;" ::"l"(global),
               "r"(cute::cast_smem_ptr_to_uint(shared)), "r"(bytes)
               : "memory");
}

// Starts the copy of what a thread stores; it waits for that before it stages the row again.
template <class C, class Params>
__device__ __forceinline__ void store_staged(Params const& p, typename C::SharedStorage const& shared, Tile const& tile, int math_thread) {
  Stored<C> const from(math_thread);
  if (from.row >= tile.rows) return;
  int64_t const columns = C::kSwiglu ? p.n / 2 : p.n, first = tile.weight_tile * C::kOutputs + from.column;
  int64_t const to_row = C::kCombine ? shared.origins[from.staged].token : tile.first_row + from.row;
  uint8_t* const to = static_cast<uint8_t*>(p.output) + (to_row * columns + first) * C::kOutputBytes;
  int const bytes = min(int64_t(from.kColumns), columns - first) * C::kOutputBytes;
  uint8_t const* const staged = shared.staging + from.staged * C::kStagingPitch + from.piece * from.kColumns * C::kOutputBytes;
  if constexpr (C::kCombine) {
    add_bulk(staged, to, bytes);
  } else {
    cute::SM90_BULK_COPY_S2G::copy(staged, to, bytes);
  }
}

// Unswapped: a warp holds 16 rows, whole or of half a tile the pieces of its warpgroup, which it stages and stores by itself.
template <class C>
struct WarpRows {
  static constexpr int kRows = 16;
  int staged, first;  // of the rows: the first of those staged, and which it is of the tile
  uint8_t* staging;
  __device__ __forceinline__ WarpRows(typename C::SharedStorage& shared, int math_warp)
      : staged(math_warp * kRows), first(C::kHalf ? staged % C::kHalfRows : staged), staging(shared.staging + staged * C::kStagingPitch) {}
  // told: of a kernel that tells what is in memory, and then not only read from shared memory.
  __device__ __forceinline__ void begin(bool told = false) const {
    if (told) {
      asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    } else {
      cute::tma_store_wait<0>();
    }
    __syncwarp();
  }
  template <class Params>
  __device__ __forceinline__ void finish(Params const& p, typename C::SharedStorage const& shared, Tile const& tile, int math_thread) const {
    cute::tma_store_fence();
    __syncwarp();
    store_staged<C>(p, shared, tile, math_thread);
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
  template <class Params>
  static __device__ __forceinline__ void finish(Params const& p, typename C::SharedStorage const& shared, Tile const& tile, int math_thread) {
    cute::tma_store_fence();
    sync_math_warps();
    store_staged<C>(p, shared, tile, math_thread);
    cute::tma_store_arrive();
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
    WarpRows<C> const rows(shared, warp);
    wait_for_origins<C>();
    rows.begin();
    if constexpr (C::kCombine) weigh_rows<C>(shared.origins + rows.staged, lane, sum);
    uint8_t* const row = rows.staging + (lane / 8 % 2 * 8 + lane % 8) * C::kStagingPitch;
#pragma unroll
    for (int h = 0; h < C::kMmas; ++h) {
#pragma unroll
      for (int j = 0; j < C::kColumns / 8; j += 2) {
        float const* const v = &sum[h][4 * j];
        cute::SM90_U32x4_STSM_N::copy(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]),
                                      at(row, h * C::kColumns + 8 * j + lane / 16 * 8));
      }
    }
    rows.finish(p, shared, tile, math_thread);
  }
}

}  // namespace moe::direct
