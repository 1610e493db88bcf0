// What a mixed grouped GEMM is at compile time, how it divides shared memory, and what a launch passes to it.
//
// Tokens are bf16, or e4m3 without scales, and weights packed; the math warps decode weights to the same in registers, which
// makes them operand A: a tile is 128 weights by 8 to 256 tokens. The schedule, the ring of tiles and the staged stores are
// the direct kernels'.
#pragma once
#include "direct/config.cuh"
#include "mixed/decode.cuh"

namespace moe::mixed {

using direct::kMathThreads;
using direct::kMathWarps;
using direct::Groups;
using direct::kTilesAhead;
using direct::PlainBarrier;
using direct::Ring;
using direct::Tile;
using direct::TileBarrier;

constexpr int kMaxStages = 12;
constexpr int kReservedBytes = 512;  // half of what CUDA takes of an SM's shared memory for a second block
constexpr int kPackedK = 128;  // packed weights are padded to multiples of it along K
constexpr int kSwizzleBytes = 128;  // of a slice, in a row of tokens

template <class Weights_, class Mma_, int kTokens_, int kTileK_, class Ends_>
struct Config {
  using Weights = Weights_;
  using Mma = Mma_;
  static constexpr int kTokens = kTokens_, kWeights = kSliceRows, kTileK = kTileK_;
  static constexpr bool kFp8 = Weights::kFp8;
  static constexpr int kSlices = kTileK / Weights::kSliceK;
  static constexpr int kAccumulators = kTokens / 2;
  // Of bf16 tokens: steps of K whose wgmma are issued together, while the fragments of as many after them are decoded.
  static constexpr int kSteps = kSlices == 1 ? 2 : 4;
  // Of e4m3 tokens, whose sums are promoted: parts of the tile's tokens, of which registers have room for two.
  static constexpr int kParts = ceil_div(kTokens, 64), kPartAccumulators = kAccumulators / kParts;

  // As the direct kernels' epilogue knows a tile.
  static constexpr bool kSwapAB = true, kHalf = false, kSwiglu = Ends_::kSwiglu, kCombine = Ends_::kCombine;
  static constexpr int kMmas = 1, kHalfRows = 0, kThreads = direct::kThreads;
  static constexpr int kOutputs = kSwiglu ? kWeights / 2 : kWeights, kOutputBytes = kSwiglu && kFp8 ? 1 : 2;
  // Blocks of activations that a row of the tile may have amaxes of: nvfp4's of 16 are the shortest.
  static constexpr int kRowBlocks = kSwiglu && !kFp8 ? kOutputs / 16 : 1;

  // Decoding few tokens' weights is bound by how many instructions an SM issues, for which two warps a scheduler wait too
  // often: four are 7 to 14 % faster.
  static constexpr int kBlocksPerSm = Weights::kDecodes && kTokens <= 64 ? 2 : 1;
  static constexpr int kProducerRegisters = kBlocksPerSm == 2 ? 32 : 40, kMathRegisters = kBlocksPerSm == 2 ? 104 : 232;

  static constexpr int kTokenSliceBytes = kTokens * kSwizzleBytes;
  static constexpr int kTokenBytes = kSlices * kTokenSliceBytes, kWeightBytes = kSlices * Weights::kSliceBytes;
  static constexpr int kTileBytes = kTokenBytes + kWeightBytes;
  static constexpr int kStagedBytes = kOutputs * kOutputBytes, kStagingPitch = kStagedBytes + direct::kStagingPad;
  static constexpr int kStagingBytes = kTokens * kStagingPitch;
  static constexpr int kFixedBytes =
      kStagingBytes + sizeof(Groups) + (kCombine ? 8 * kTokens : 0) + (kSwiglu ? 8 * kTokens * kRowBlocks : 0) + (kFp8 ? sizeof(Magnitudes) * kDistances : 0) + 1024 + 256;
  static constexpr int kStagesThatFit = (direct::kSharedBytes / kBlocksPerSm - kReservedBytes - kFixedBytes) / (kTileBytes + 16);
  static constexpr int kStages = kStagesThatFit < kMaxStages ? kStagesThatFit : kMaxStages;

  static_assert(kTokens % 8 == 0 && kTokens <= 256 && kTileK % Weights::kSliceK == 0 && kPackedK % kTileK == 0);
  static_assert(kFp8 || kSlices * kSliceSteps / kSteps % 2 == 0, "a K tile's first fragments go into the same registers each time");
  static_assert(!kFp8 || kSlices == 1, "one factor a row and K tile");
  static_assert(kStages >= 3);

  struct SharedStorage {
    alignas(1024) uint8_t tokens[kStages][kTokenBytes];
    alignas(128) uint8_t weights[kStages][kWeightBytes];
    alignas(16) uint8_t staging[kStagingBytes];
    MoeRowOrigin origins[kCombine ? kTokens : 1];
    int amax[2][kSwiglu ? kTokens * kRowBlocks : 1];  // bits of floats; of the tile before may still be read: they take turns
    Magnitudes magnitudes[kFp8 ? kDistances : 1];
    Tile tiles[kTilesAhead];
    alignas(8) uint64_t full[kStages], empty[kStages];
    uint64_t tile_ready[kTilesAhead], tile_read[kTilesAhead], tile_wanted;
    Groups groups;
  };
  static_assert(sizeof(SharedStorage) <= direct::kSharedBytes / kBlocksPerSm - kReservedBytes);
};

struct Params {
  CUtensorMap tokens;            // bf16 or e4m3 [rows, k], in bytes
  uint8_t const* weights;        // [groups, n/128, k/128] packed blocks, both quotients rounded up
  float const* weight_scales;    // [groups] or null
  float const* bias;             // [groups, n] or null
  MoeTokens encoding;            // of activations, with SwiGLU
  float const *alpha, *beta, *clamp, *multiplier; // [groups] or null, with SwiGLU
  float clamp_limit;
  int gate_row, up_row;          // first of either half of the bias, with SwiGLU
  int32_t const* expert_offsets; // [groups + 1]
  int32_t* tiles_taken;          // as in MoeGemmOperands
  void* output;                  // bf16 [rows, n], with SwiGLU [rows, n/2] as the tokens; [T, n] to combine
  int groups, n, k;
  bool offsets_ready;            // before the predecessor has finished
  int32_t const* topk_ids;       // as the next, in MoeGemmOperands
  int num_slots, first_expert;
  MoeRowOrigin const* row_origins; // [rows], to combine
};

}  // namespace moe::mixed
