// Which tiles a thread block computes, in which order: one thread walks, all roles of the block read what it finds.
#pragma once
#include <climits>

#include "dependent_launch.cuh"
#include "direct/config.cuh"

namespace moe::direct {

// Token tiles of an expert that are worked on side by side: with the weight tiles that 132 blocks take at a time they
// make a patch that L2 holds, and every weight tile is read from memory once.
constexpr int kBand = 16;

// Of an expert with a tile and a few rows more, those rows' tile reads weights that the other one has just read, if both
// keep in step. Where K is long they do not for long, once one is computed in half the time: 4 to 8 % lost at 7168, 1 to 15 %
// gained up to 4096.
constexpr int kLongK = 4096;

// Rounds at the end in which blocks take what the others have left: up to 12 % of a GEMM of unequal experts. Before, tiles
// are dealt, which keeps blocks that read the same weights or tokens in step: with a long K, all rounds open were 1 to 6 %
// slower from 2048 tokens on. Of swapped kernels, whose weights no two blocks read, all rounds but the first are open. For SMs
// do not get equal shares of memory's bandwidth: some, by their numbers those of GPCs with few, get 1.3 to 1.4 times what
// others do, and with all rounds dealt had nothing to do for a fifth of GEMM1.
template <class C>
__device__ __forceinline__ int open_rounds(int k) { return C::kSwapAB ? INT_MAX : k > kLongK ? 1 : 8; }

// A block of a swapped kernel takes its next tile this many K tiles before the end of the one it loads: two tiles ahead, up to
// 30 % were lost, for it is few tiles that a block has. Those of many rows list them two ahead: 1 to 4 % slower if not.
constexpr int kAskAhead = 4;

// A group's token tiles. The last of three or more is left out where it is a half: blocks take two of its weight tiles at
// a time, which takes as long as a whole tile. With fewer, the weights' way from memory is what takes long.
template <class C>
struct TokenTiles {
  int const rows, whole;  // whole: those that are not left out
  __device__ __forceinline__ explicit TokenTiles(int rows_)
      : rows(rows_), whole(ceil_div(rows > 2 * C::kTokens ? rows - C::kHalfRows : rows, C::kTokens)) {}
  // What a block takes at a time.
  __device__ __forceinline__ int items(int across) const {
    return whole * across + (rows > whole * C::kTokens ? ceil_div(across, 2) : 0);
  }
};

// Whether a block counts ids for itself. Swapped kernels may: of few slots, and the code costs the others.
template <class C, class Params>
__device__ __forceinline__ bool counts_ids(Params const& p) {
  if constexpr (C::kSwapAB) return p.topk_ids;
  return false;
}

// counts[g]: rows of group g. By all threads of a block.
template <class Params>
__device__ __forceinline__ void count_rows(Params const& p, int* counts) {
  constexpr int kBatch = ceil_div(kFewSlots, kThreads);  // loads in flight together
  int const thread = opaque(threadIdx.x);
  int group[kBatch];
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    int const slot = i * kThreads + thread;
    group[i] = slot < p.num_slots ? p.topk_ids[slot] - p.first_expert : -1;
  }
  for (int i = thread; i < p.groups; i += kThreads) counts[i] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kBatch; ++i) {
    if (group[i] >= 0 && group[i] < p.groups) atomicAdd(counts + group[i], 1);
  }
  __syncthreads();
}

// Values of lanes, first all of values[0], become the sums of those before them, and of `total`, which becomes that of all. By a
// warp.
template <int kCount>
__device__ __forceinline__ void add_up(int (&values)[kCount], int lane, int& total) {
  int inclusive[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) inclusive[i] = values[i];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const other = __shfl_up_sync(0xffffffffu, inclusive[i], distance);
      if (lane >= distance) inclusive[i] += other;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = total + inclusive[i] - values[i];
    total += __shfl_sync(0xffffffffu, inclusive[i], 31);
  }
}

// By all threads of a block.
template <class C, class Params>
__device__ __forceinline__ void list_groups(Params const& p, Groups& groups) {
  constexpr int kBatch = 4;  // loads in flight together: most layers have at most 128 local experts
  if (counts_ids<C>(p)) count_rows(p, groups.first_row);
  if (threadIdx.x < 32) {
    int const lane = threadIdx.x, across = ceil_div(p.n, C::kWeights);
    int all_rows = 0, all_items = 0;
    for (int base = 0; base < p.groups; base += 32 * kBatch) {
      int rows[kBatch], row[kBatch], item[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        int const group = base + 32 * i + lane;
        bool const is_one = group < p.groups;
        if (counts_ids<C>(p)) {
          row[i] = rows[i] = is_one ? groups.first_row[group] : 0;
        } else {
          row[i] = is_one ? p.expert_offsets[group] : 0;
          rows[i] = is_one ? p.expert_offsets[group + 1] - row[i] : 0;
        }
        item[i] = TokenTiles<C>(rows[i]).items(across);
      }
      if (counts_ids<C>(p)) add_up(row, lane, all_rows);
      add_up(item, lane, all_items);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        int const group = base + 32 * i + lane;
        if (group < p.groups) groups.first_row[group] = row[i], groups.first_item[group] = item[i];
        if (group == p.groups - 1) groups.first_row[p.groups] = row[i] + rows[i];
      }
    }
    if (lane == 0) groups.first_item[p.groups] = all_items;
  }
  __syncthreads();
}

// The group of an item, which is not before `group`. By halves: of few tokens most groups have none, and a step from one
// to the next is some 40 cycles.
__device__ __forceinline__ int group_of(int item, int group, int groups, int const* first_item) {
  for (int beyond = groups; beyond - group > 1;) {
    int const middle = (group + beyond) / 2;
    (first_item[middle] <= item ? group : beyond) = middle;
  }
  return group;
}

// A role's place in the list of the block's tiles.
template <class C>
class Tiles {
 public:
  __device__ __forceinline__ explicit Tiles(typename C::SharedStorage& shared) : shared_(shared) {}

  // By every thread of the role, each for itself.
  __device__ __forceinline__ bool next(Tile& tile) {
    PlainBarrier::wait(&shared_.tile_ready[ring_.stage], ring_.phase);
    tile = shared_.tiles[ring_.stage];
    asm volatile("" ::: "memory");  // the wrapper of arrive lets the compiler move loads past it
    PlainBarrier::arrive(&shared_.tile_read[ring_.stage]);
    ring_.advance();
    return tile.rows > 0;
  }

 private:
  typename C::SharedStorage& shared_;
  Ring<kTilesAhead> ring_;
};

// Until all rows of a group are in memory, of a predecessor that counts them. By one thread, for all that learn of the tile
// from it.
template <class Params>
__device__ __forceinline__ void wait_for_tokens(Params const& p, int group) {
  int const pieces = (p.expert_offsets[group + 1] - p.expert_offsets[group]) * (p.k / 64);
  int done;
  while (true) {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(p.tokens_done + group) : "memory");
    if (done >= pieces) break;
    __nanosleep(32);
  }
  asm volatile("fence.proxy.async.global;" ::: "memory");  // TMA will read them
}

// The first number that a block takes: the count where there is none for it. An SM's second block has one only where all first
// ones have. Where there are too few for as many blocks as there are SMs, some have one here and there: 96 for the first 96 of
// 132, which are six GPCs of eight, took 33 us, and spread 28. The last blocks are left out first, for they start late where
// the kernel before still runs.
template <class C>
__device__ __forceinline__ int first_number(int count) {
  int const blocks = gridDim.x / C::kBlocksPerSm, before = blockIdx.x / blocks * blocks, block = blockIdx.x - before;
  int const left = max(count - before, 0);
  if (left >= blocks) return blockIdx.x;
  int const among = blocks - (blocks - left) / 4, number = ceil_div(block * left, among);
  return block < among && ceil_div((block + 1) * left, among) > number ? before + number : count;
}

// Numbers that a block takes from 0 on: every gridDim.x-th, and of the last ones whatever the others have left, from a counter.
// The first is known before the predecessor has finished.
template <class C, class Params>
class Numbers {
 public:
  __device__ __forceinline__ Numbers(Params const& p, int count)
      : p_(p), count_(count), dealt_(max(count / int(gridDim.x) - open_rounds<C>(p.k), 1) * int(gridDim.x)),
        number_(first_number<C>(count)) {}
  __device__ __forceinline__ bool more() const { return number_ < count_; }
  __device__ __forceinline__ int operator*() const { return number_; }
  __device__ __forceinline__ void operator++() {
    int const blocks = gridDim.x;
    if (number_ + blocks < dealt_) {
      number_ += blocks;
      return;
    }
    // It may count with the same counter.
    if (number_ < dealt_ && !counts_tokens()) wait_for_predecessor();
    int const taken = atomicAdd(p_.tiles_taken, 1);
    // Every block that had any takes one too many: this was the last.
    if (taken == count_ - dealt_ + blocks - 1) *p_.tiles_taken = 0;
    number_ = dealt_ + taken;
  }

 private:
  __device__ __forceinline__ bool counts_tokens() const {
    if constexpr (C::kSwapAB) return false;
    else return p_.tokens_done;
  }

  Params const& p_;
  int const count_, dealt_;
  int number_;
};

// Lists a block's share of all tiles, ascending, and then one without rows. By one thread: a tile takes it hundreds of
// cycles, in divisions and in loads, which the math warps do not have.
template <class C, class Params>
__device__ __forceinline__ void list_tiles(Params const& p, typename C::SharedStorage& shared) {
  Groups const& groups = shared.groups;
  int const across = ceil_div(p.n, C::kWeights), items = groups.first_item[p.groups], blocks = gridDim.x;
  // Where the last round has items for no more than half of the blocks, two share one.
  int const left = items % blocks, to_share = C::kHalfRows > 0 && 2 * left <= blocks ? left : 0, to_take = items - to_share;
  Ring<kTilesAhead> ring;
  uint32_t wanted = 0;
  auto list = [&](Tile const& tile) {
    PlainBarrier::wait(&shared.tile_read[ring.stage], ring.phase ^ 1);
    shared.tiles[ring.stage] = tile;
    asm volatile("" ::: "memory");
    PlainBarrier::arrive(&shared.tile_ready[ring.stage]);
    ring.advance();
    if (!C::kSwapAB || tile.rows == 0) return;
    PlainBarrier::wait(&shared.tile_wanted, wanted);
    wanted ^= 1;
  };
  int group = 0;
  for (Numbers<C, Params> number(p, to_take + 2 * to_share); number.more(); ++number) {
    int const beyond = *number - to_take, item = beyond < 0 ? *number : to_take + beyond / 2;
    bool const first = beyond < 0 || beyond % 2 == 0, second = beyond < 0 || beyond % 2 == 1;  // halves to take of the item
    if (groups.first_item[group + 1] <= item) group = group_of(item, group + 1, p.groups, groups.first_item);
    if constexpr (!C::kSwapAB && C::kCombine) {
      // Here, two tiles ahead, the time that it takes to ask hides. The first tile's weights must not wait.
      if (p.tokens_done && *number >= blocks) wait_for_tokens(p, group);
    }
    int const offset = groups.first_row[group], index = item - groups.first_item[group];
    TokenTiles<C> const down(groups.first_row[group + 1] - offset);
    if (index < down.whole * across) {
      int const band = index / (kBand * across), in_band = index - band * kBand * across;
      int const height = min(kBand, down.whole - band * kBand), row = (band * kBand + in_band % height) * C::kTokens;
      int const rows = min(C::kTokens, down.rows - row);
      bool const shares = !first || !second, keeps_step = row > 0 && p.k > kLongK;
      Tile tile{group, offset + row, rows, in_band / height, shares || (rows <= C::kHalfRows && !keeps_step)};
      if (!second) tile.rows = min(rows, C::kHalfRows);
      if (!first) tile.rows -= C::kHalfRows, tile.first_row += C::kHalfRows;
      if (tile.rows > 0) list(tile);
    } else {
      int const row = down.whole * C::kTokens;
      Tile tile{group, offset + row, down.rows - row, 2 * (index - down.whole * across), true};
      if (first) list(tile);
      ++tile.weight_tile;
      if (second && tile.weight_tile < across) list(tile);
    }
  }
  list(Tile{});
}

}  // namespace moe::direct
