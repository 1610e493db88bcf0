// The grouped GEMM on NVFP4 operands: what it needs beyond abi.h.
//
// Operands are packed e2m1, two elements a byte, the lower K index in the low nibble; strides count elements.
// Every 16 elements along K share one e4m3 factor, stored as moe_nvfp4_scale_offset() says.
// The fp32 scales of the two tensors multiply to one number per expert, alpha.
#pragma once
#include "abi.h"

#ifdef __cplusplus
extern "C" {
#endif

// In `group`, tokens and weights are packed e2m1, token_scales and weight_scales e4m3. The members of
// MoeScaleLayout count atoms of 128 rows x 4 factors (rows: ceil(rows / 128), k_blocks: ceil(k / 64)) and
// the strides bytes: 512 bytes an atom, atoms K-fastest. Each group's factors begin with an atom of their own.
typedef struct MoeNvfp4GroupMetadata {
  MoeGroupMetadata group;
  float const** alpha; // [L] pointer to the group's tokens_scale * weights_scale
} MoeNvfp4GroupMetadata;

typedef struct MoeNvfp4GroupedGemm {
  int32_t num_groups, n, k, sm_count;
  MoeNvfp4GroupMetadata metadata;
  void* workspace; // at least MOE_GEMM_WORKSPACE_BYTES(sm_count)
  void* stream;
} MoeNvfp4GroupedGemm;

typedef struct MoeNvfp4Variant {
  char const* name;
  int32_t tile_m, tile_n, tile_k, cluster_m, cluster_n, swap_ab, stages, shared_memory_bytes, threads;
  int32_t (*run)(MoeNvfp4GroupedGemm const*);
  int32_t (*check_abi)(void); // 0 if metadata and moe_nvfp4_scale_offset() match CuTe's types; host only
} MoeNvfp4Variant;

// Byte of the factor of elements [16 * factor, 16 * factor + 16) of `row`; k_blocks as in MoeScaleLayout.
static inline int64_t moe_nvfp4_scale_offset(int64_t row, int64_t factor, int64_t k_blocks) {
  return (row / 128 * k_blocks + factor / 4) * 512 + row % 32 * 16 + row % 128 / 32 * 4 + factor % 4;
}

#ifdef __cplusplus
}
#endif
