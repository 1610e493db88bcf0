// The thread that loads: packed weights as they lie in memory, tokens by TMA.
#pragma once
#include "cute/arch/copy_sm90_desc.hpp"
#include "cute/arch/copy_sm90_tma.hpp"

#include "dependent_launch.cuh"
#include "direct/schedule.cuh"
#include "mixed/config.cuh"

namespace moe::mixed {

// CuTe's wrapper of this instruction has no cache hint.
__device__ __forceinline__ void load_bytes(uint8_t* to, uint8_t const* from, int bytes, uint64_t* full, uint64_t hint) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               :
               : "r"(cute::cast_smem_ptr_to_uint(to)), "l"(from), "r"(bytes), "r"(cute::cast_smem_ptr_to_uint(full)), "l"(hint)
               : "memory");
}

// Of the first tile, weights come as many stages ahead as there are before tokens do: they do not depend on the
// predecessor, whose last thread blocks still multiply.
template <class C>
__device__ __forceinline__ void produce_tiles(Params const& p, typename C::SharedStorage& shared) {
  // Where a tile has few tokens, weights pass through L2 once and must not push the tokens out.
  constexpr auto kWeightHint = static_cast<uint64_t>(C::kTokens <= 64 ? cute::TMA::CacheHintSm90::EVICT_FIRST : cute::TMA::CacheHintSm90::EVICT_NORMAL);
  constexpr auto kTokenHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);
  int const blocks = ceil_div(p.k, C::kTileK), across = ceil_div(p.n, C::kWeights);
  int64_t const tile_bytes = int64_t(ceil_div(p.k, kPackedK)) * (kPackedK / C::kTileK) * C::kWeightBytes;
  auto load_weights = [&](Tile const& tile, int stage, int block) {
    uint8_t const* const from = p.weights + (int64_t(tile.group) * across + tile.weight_tile) * tile_bytes + int64_t(block) * C::kWeightBytes;
    TileBarrier::arrive_and_expect_tx(&shared.full[stage], C::kTileBytes);
    load_bytes(shared.weights[stage], from, C::kWeightBytes, &shared.full[stage], kWeightHint);
  };
  direct::Tiles<C> tiles(shared);
  Ring<C::kStages> ring;
  Tile tile;
  bool more = tiles.next(tile);
  int ahead = more ? min(C::kStages, blocks) : 0;
  for (int stage = 0; stage < ahead; ++stage) load_weights(tile, stage, stage);
  wait_for_predecessor();
  if (direct::counts_ids<C>(p)) allow_successor_to_start();  // not before: it takes expert_offsets to be ready
  for (; more; more = tiles.next(tile)) {
    for (int block = 0; block < blocks; ++block) {
      if (ahead > 0) {
        --ahead;
      } else {
        PlainBarrier::wait(&shared.empty[ring.stage], ring.phase ^ 1);
        load_weights(tile, ring.stage, block);
      }
#pragma unroll
      for (int slice = 0; slice < C::kSlices; ++slice) {
        cute::SM90_TMA_LOAD_3D::copy(&p.tokens, &shared.full[ring.stage], kTokenHint, shared.tokens[ring.stage] + slice * C::kTokenSliceBytes,
                                     (block * C::kSlices + slice) * kSwizzleBytes, tile.first_row, 0);
      }
      if (block == max(blocks - direct::kAskAhead, 0)) PlainBarrier::arrive(&shared.tile_wanted);
      ring.advance();
    }
  }
}

}  // namespace moe::mixed
