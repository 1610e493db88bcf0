// What a direct grouped GEMM is at compile time, how it divides shared memory, and what a launch passes to it.
//
// A tile is operand A's 128 to 256 rows by operand B's columns. Tokens are A where there are many of them, B (swap_ab)
// where a tile of 8 to 64 holds an expert's. Either way an instruction multiplies with one block of 128 weights, so that
// its result has one weight scale.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <stdint.h>

#include "cute/arch/mma_sm90_gmma.hpp"
#include "cutlass/arch/barrier.h"

#include "abi.h"
#include "numerics.cuh"

namespace moe::direct {

constexpr int kTileK = kBlock;  // one row of the 128-byte swizzle, and one scale block
constexpr int kInstructionK = 32;
constexpr int kMathWarps = 8;
constexpr int kMathThreads = kMathWarps * 32;
constexpr int kThreads = kMathThreads + 128;  // and a producer warpgroup: a warp each for weights, tokens, scales and the list
constexpr int kSharedBytes = 227 * 1024;
constexpr int kMaxStages = 10;
constexpr int kTilesAhead = 2;
constexpr int kStagingPad = 16;  // bytes between rows of the staged output: without it they share their banks

struct alignas(16) Tile {
  int group, first_row, rows;  // rows: how many of the tile's token rows are the group's
  int weight_tile;
  bool half;                   // computed as Half<C>
};

// Of each group, its first row and first item of the list of tiles; behind the last, how many there are.
struct Groups {
  int first_row[kMaxGroups + 1], first_item[kMaxGroups + 1];
};

// What a kernel does beside the product. kSwiglu: the tile holds 128 rows of gate and the same of up, and the epilogue
// writes e4m3 activations and their scales. kGather: tokens are loaded row by row from where they came in, which pays
// where a tile has few: 128 take TMA 4.8 times as long as the whole GEMM, cp.async by two warps 1.4 times. kCombine: the
// epilogue weighs rows and adds them to their tokens' output.
struct Plain { static constexpr bool kSwiglu = false, kGather = false, kCombine = false; };
struct Swiglu : Plain { static constexpr bool kSwiglu = true; };
struct GatherSwiglu : Swiglu { static constexpr bool kGather = true; };
struct Combine : Plain { static constexpr bool kCombine = true; };

template <class Mma_, int kTokens_, int kWeights_, bool kSwapAB_, class Ends_>
struct Config {
  using Mma = Mma_;
  static constexpr int kTokens = kTokens_, kWeights = kWeights_;
  static constexpr bool kHalf = false;
  static constexpr int kHalfRows = !kSwapAB_ && kTokens == 128 ? kTokens / 2 : 0;  // of half a tile: see Half
  static constexpr bool kSwapAB = kSwapAB_, kSwiglu = Ends_::kSwiglu, kGather = Ends_::kGather, kCombine = Ends_::kCombine;
  static constexpr int kColumns = kSwapAB ? kTokens : kBlock;  // of an instruction, whose rows are 64
  static constexpr int kMmas = kWeights / kBlock;              // instructions a warpgroup issues a step of K
  static constexpr int kAccumulators = kColumns / 2;           // registers of each
  // Blocks of weights that one tile takes from different places, each with a TMA load of its own.
  static constexpr int kWeightLoads = kSwiglu ? 2 : 1;
  static constexpr int kTokenLoads = kHalfRows > 0 ? 2 : 1;
  static constexpr int kMmasTogether = 1;                      // as registers have room for their results, unswapped
  // Output columns of a tile, and the bytes of one.
  static constexpr int kOutputs = kSwiglu ? kWeights / 2 : kWeights;
  static constexpr int kOutputBytes = kSwiglu ? 1 : 2;

  static constexpr int kBlocksPerSm = 1;  // 2 of half the stages: nowhere faster, up to 1.7 % slower
  // Math warpgroups: tokens as operand A are 64 for each. Registers of a thread add up to an SM's 64 K.
  static constexpr int kMathWarps = kSwapAB ? direct::kMathWarps : kTokens / 16;
  static constexpr int kMathThreads = kMathWarps * 32, kThreads = kMathThreads + 128;
  static constexpr int kProducerRegisters = kMathWarps == 12 ? 56 : 40, kMathRegisters = kMathWarps == 12 ? 152 : 232;
  static constexpr int kTokenBytes = kTokens * kTileK, kWeightBytes = kWeights * kTileK;
  static constexpr int kTileBytes = kTokenBytes + kWeightBytes;
  static constexpr int kScales = (kTokens + kMmas + 3) / 4 * 4;
  // Swapped: of a tile's row; else a warp stages its 16 rows by pieces.
  static constexpr int kStagedBytes = kSwapAB ? kOutputs * kOutputBytes : 128;
  static constexpr int kStagingPitch = kStagedBytes + kStagingPad;
  static constexpr int kStagingBytes = kTokens * kStagingPitch;
  static constexpr int kFixedBytes = kStagingBytes + sizeof(Groups) + 2 * 4 * kTokens + (kCombine ? 8 * kTokens : 0) + 256;
  static constexpr int kStagesThatFit = (kSharedBytes - kFixedBytes) / (kTileBytes + kScales * 4 + 24);
  static constexpr int kStages = kStagesThatFit < kMaxStages ? kStagesThatFit : kMaxStages;

  static_assert(kTokens % 8 == 0 && kWeights % kBlock == 0 && kMmas <= 2);
  static_assert(kSwapAB || kTokens == 128 || (kTokens == 192 && kMmas == 1));
  static_assert(!kSwiglu || kMmas == 2, "one block of gate, one of up");
  static_assert(kStages >= 3);

  struct SharedStorage {
    alignas(1024) uint8_t tokens[kStages][kTokenBytes];
    alignas(1024) uint8_t weights[kStages][kWeightBytes];
    alignas(16) uint8_t staging[kStagingBytes];
    alignas(16) float scales[kStages][kScales];  // of the tokens, then of the weights
    alignas(16) float amax[2][kTokens];          // of the tile before may still be read: they take turns
    MoeRowOrigin origins[kCombine ? kTokens : 1];// of the staged rows
    Tile tiles[kTilesAhead];
    alignas(8) uint64_t full[kStages], empty[kStages], scales_read[kStages];
    uint64_t tile_ready[kTilesAhead], tile_read[kTilesAhead], tile_wanted;
    Groups groups;
  };
  static_assert(sizeof(SharedStorage) <= kSharedBytes);
};

// How a kernel computes a tile of few rows in half the time: the math warpgroups, which divide other tiles by rows, divide
// every block of weights, and multiply 64 rows by 64 of gate and 64 of up together, as many products as of a whole tile.
template <class C>
struct Half : C {
  using Mma = cute::SM90::GMMA::MMA_64x64x32_F32E4M3E4M3_SS_TN<>;
  static constexpr bool kHalf = true;
  static constexpr int kColumns = C::kColumns / 2, kAccumulators = C::kAccumulators / 2, kMmasTogether = C::kMmas;
};

struct Params {
  CUtensorMap tokens, weights;  // [rows, k] and [groups, n, k] of e4m3
  float const* token_scales;    // [rows, k/128]
  float const* weight_scales;   // [groups, n/128, k/128]
  int32_t const* expert_offsets;// [groups + 1]
  int32_t* tiles_taken;
  int32_t* output_done;         // as the next, in MoeGemmOperands
  int32_t const* tokens_done;
  void* output;                 // bf16 [rows, n], or e4m3 [rows, n/2]; [T, n] to combine
  float* output_scales;         // [rows, n/2/128], with SwiGLU
  int groups, n, k;
  int gate_row, up_row;         // first row of either half of gate_up
  float clamp_limit;
  bool offsets_ready;           // before the predecessor has finished
  int32_t const* topk_ids;      // as the next, in MoeGemmOperands
  int num_slots, first_expert;
  MoeRowOrigin const* row_origins; // [rows], to gather or combine
};

// The same value, of which the compiler does not know it: what follows from it is worked out where it is used, instead of
// before the loop over tiles, and takes no register in the main loop.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// A ring of stages, and the parity that its barriers have in this round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) { stage = 0; phase ^= 1; }
  }
};

using TileBarrier = cutlass::arch::ClusterTransactionBarrier;
using PlainBarrier = cutlass::arch::ClusterBarrier;

}  // namespace moe::direct
