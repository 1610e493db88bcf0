// The grouped GEMM on Blackwell's block-scaled operands: what it needs beyond abi.h.
//
// | variant's weights x tokens | elements, K-major                | factors                 | k is a multiple of |
// |----------------------------|----------------------------------|-------------------------|--------------------|
// | NVFP4 x NVFP4              | e2m1 both                        | e4m3, one per 16 of K   | 32                 |
// | MXFP4 x MXFP8              | weights e2m1, tokens e4m3        | ue8m0, one per 32 of K  | 128                |
//
// e2m1 is packed two elements a byte, the lower K index in the low nibble; strides count elements. Beside 8-bit tokens
// TMA unpacks e2m1 from 64 bytes at a time, hence the 128. Factors lie as moe_scale_factor_offset() says.
// fp32 scales of whole tensors multiply to one number per expert, alpha.
//
// fp8 tokens, which have no factors, are MXFP8 tokens whose factors are all 2^0 (the byte 127).
#pragma once
#include "abi.h"

#ifdef __cplusplus
extern "C" {
#endif

// In `group`, tokens, weights and their scales are as above. The members of MoeScaleLayout count atoms of
// 128 rows x 4 factors (rows: ceil(rows / 128), k_blocks: the factors along K / 4, rounded up) and the strides bytes:
// 512 bytes an atom, atoms K-fastest. Each group's factors begin with an atom of their own.
typedef struct MoeBlockScaledGroupMetadata {
  MoeGroupMetadata group;
  float const** alpha; // [L] pointer to the group's tokens_scale * weights_scale; null: 1
} MoeBlockScaledGroupMetadata;

typedef struct MoeBlockScaledGroupedGemm {
  int32_t num_groups, n, k, sm_count;
  MoeBlockScaledGroupMetadata metadata;
  void* workspace; // at least MOE_GEMM_WORKSPACE_BYTES(sm_count)
  void* stream;
} MoeBlockScaledGroupedGemm;

typedef struct MoeBlockScaledVariant {
  char const* name;
  int32_t tile_m, tile_n, tile_k, cluster_m, cluster_n, swap_ab, stages, shared_memory_bytes, threads;
  int32_t (*run)(MoeBlockScaledGroupedGemm const*);
  int32_t (*check_abi)(void); // 0 if metadata and moe_scale_factor_offset() match CuTe's types; host only
  int32_t weights, tokens;    // MoeWeights, MoeTokens
} MoeBlockScaledVariant;

// Byte of a row's factor number `factor` along K; k_blocks as in MoeScaleLayout.
static inline int64_t moe_scale_factor_offset(int64_t row, int64_t factor, int64_t k_blocks) {
  return (row / 128 * k_blocks + factor / 4) * 512 + row % 32 * 16 + row % 128 / 32 * 4 + factor % 4;
}

#ifdef __cplusplus
}
#endif
