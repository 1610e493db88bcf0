// The producer warpgroup: one thread feeds weights by TMA, one tokens, or a warp that gathers, and one warp scales.
#pragma once
#include "cute/arch/copy_sm80.hpp"
#include "cute/arch/copy_sm90_desc.hpp"
#include "cute/arch/copy_sm90_tma.hpp"

#include "dependent_launch.cuh"
#include "direct/schedule.cuh"

namespace moe::direct {

// Row of gate_up, or of the plain weights, at which block number `part` of a tile starts.
template <class C>
__device__ __forceinline__ int weight_row(Params const& p, Tile const& tile, int part) {
  if constexpr (C::kSwiglu) return (part == 0 ? p.gate_row : p.up_row) + tile.weight_tile * kBlock;
  return tile.weight_tile * C::kWeights + part * kBlock;
}

// Weights pass through L2 once where tokens are few; there, they must not push the tokens out.
template <class C>
constexpr auto kWeightHint = static_cast<uint64_t>(C::kSwapAB ? cute::TMA::CacheHintSm90::EVICT_FIRST : cute::TMA::CacheHintSm90::EVICT_NORMAL);
constexpr auto kTokenHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);

// Before a block's first tokens; for those of later tiles, who lists them has waited.
template <class C>
__device__ __forceinline__ void wait_for_first_tokens(Params const& p, Tile const& tile) {
  if constexpr (!C::kSwapAB && C::kCombine) {
    if (p.tokens_done) return wait_for_tokens(p, tile.group);
  }
  wait_for_predecessor();
  if (counts_ids<C>(p)) allow_successor_to_start();  // not before: it takes expert_offsets to be ready
}

// Calls first(tile) once, begin(tile) for every tile, and load(tile, stage, k) for every K tile once its stage is free.
template <class C, class First, class Begin, class Load>
__device__ __forceinline__ void fill_stages(Params const& p, typename C::SharedStorage& shared, First first, Begin begin, Load load) {
  Tiles<C> tiles(shared);
  Ring<C::kStages> ring;
  Tile tile;
  bool more = tiles.next(tile);
  if (more) first(tile);
  for (; more; more = tiles.next(tile)) {
    begin(tile);
    for (int k = 0; k < p.k; k += kTileK) {
      PlainBarrier::wait(&shared.empty[ring.stage], ring.phase ^ 1);
      load(tile, ring.stage, k);
      ring.advance();
    }
  }
}

// By one thread. Of the first tile, weights come as many stages ahead as there are before tokens do: they do not depend on
// the predecessor, whose last thread blocks still multiply.
template <class C>
__device__ __forceinline__ void produce_weights(Params const& p, typename C::SharedStorage& shared) {
  int const ask_at = max(p.k - kAskAhead * kTileK, 0);
  auto nothing = [](Tile const&) {};
  fill_stages<C>(p, shared, nothing, nothing, [&](Tile const& tile, int stage, int k) {
    constexpr int kLoadBytes = C::kWeightBytes / C::kWeightLoads;
    TileBarrier::arrive_and_expect_tx(&shared.full[stage], C::kWeightBytes);
#pragma unroll
    for (int part = 0; part < C::kWeightLoads; ++part) {
      cute::SM90_TMA_LOAD_3D::copy(&p.weights, &shared.full[stage], kWeightHint<C>, shared.weights[stage] + part * kLoadBytes, k,
                                   weight_row<C>(p, tile, part), tile.group);
    }
    if (C::kSwapAB && k == ask_at) PlainBarrier::arrive(&shared.tile_wanted);
  });
}

// By one thread. One for weights and tokens took as long, but has to load the first tile's weights ahead of its tokens.
template <class C>
__device__ __forceinline__ void produce_tokens(Params const& p, typename C::SharedStorage& shared) {
  auto wait = [&](Tile const& tile) { wait_for_first_tokens<C>(p, tile); };
  fill_stages<C>(p, shared, wait, [](Tile const&) {}, [&](Tile const& tile, int stage, int k) {
    constexpr int kRows = C::kTokens / C::kTokenLoads;
    TileBarrier::arrive_and_expect_tx(&shared.full[stage], tile.rows > C::kHalfRows ? C::kTokenBytes : C::kTokenBytes / C::kTokenLoads);
#pragma unroll
    for (int row = 0; row < C::kTokens; row += kRows) {
      if (row >= tile.rows) break;
      cute::SM90_TMA_LOAD_3D::copy(&p.tokens, &shared.full[stage], kTokenHint, shared.tokens[stage] + row * kTileK, k, tile.first_row + row, 0);
    }
  });
  wait_for_predecessor();  // so that no block ends before
}

// By one warp: each lane loads rows of tokens one by one. The swizzle follows from the address in shared memory, so
// that rows loaded alone lie as those of one box do. Rows past the group's last keep what was there: no row mixes with another.
template <class C>
__device__ __forceinline__ void produce_gathered(Params const& p, typename C::SharedStorage& shared, int lane) {
  constexpr int kRows = ceil_div(C::kTokens, 32);
  int token[kRows];
  auto wait = [&](Tile const& tile) { wait_for_first_tokens<C>(p, tile); };
  auto begin = [&](Tile const& tile) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int const row = 32 * i + lane;
      token[i] = row < tile.rows ? p.row_origins[tile.first_row + row].token : -1;
    }
  };
  fill_stages<C>(p, shared, wait, begin, [&](Tile const& tile, int stage, int k) {
    // A row's bytes may arrive before they are announced: the count of a barrier's phase goes below zero and back.
    if (lane == 0) TileBarrier::arrive_and_expect_tx(&shared.full[stage], tile.rows * kTileK);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (token[i] < 0) continue;
      cute::SM90_TMA_LOAD_3D::copy(&p.tokens, &shared.full[stage], kTokenHint, shared.tokens[stage] + (32 * i + lane) * kTileK, k, token[i], 0);
    }
  });
  wait_for_predecessor();
}

// By one warp. cp.async, because scales of neighbouring rows are k/128 floats apart and rows start anywhere.
template <class C>
__device__ __forceinline__ void produce_scales(Params const& p, typename C::SharedStorage& shared) {
  using Copy = cute::SM80_CP_ASYNC_CACHEALWAYS<float>;
  constexpr int kRows = ceil_div(C::kTokens, 32);
  int const lane = threadIdx.x % 32, k_blocks = p.k / kTileK;
  Tiles<C> tiles(shared);
  Ring<C::kStages> ring;
  Tile tile;
  bool more = tiles.next(tile);
  if (more) wait_for_first_tokens<C>(p, tile);
  for (; more; more = tiles.next(tile)) {
    float const* tokens[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int const row = 32 * i + lane;
      int64_t at = tile.first_row + row;
      if (C::kGather && row < tile.rows) at = p.row_origins[at].token;
      tokens[i] = p.token_scales + at * k_blocks;
    }
    float const* weights = p.weight_scales;
    if (lane < C::kMmas) weights += (int64_t(tile.group) * (p.n / kBlock) + weight_row<C>(p, tile, lane) / kBlock) * k_blocks;
    for (int block = 0; block < k_blocks; ++block) {
      PlainBarrier::wait(&shared.scales_read[ring.stage], ring.phase ^ 1);
      float* const scales = shared.scales[ring.stage];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        int const row = 32 * i + lane;
        if (row < tile.rows) Copy::copy(tokens[i][block], scales[row]);
      }
      if (lane < C::kMmas) Copy::copy(weights[block], scales[C::kTokens + lane]);
      cutlass::arch::cpasync_barrier_arrive_noinc(&shared.full[ring.stage]);
      ring.advance();
    }
  }
}

}  // namespace moe::direct
