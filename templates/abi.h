// The C interface between the generated library of one architecture and moe_runtime.
//
// Every function takes one pointer to a plain struct and returns 0, a cudaError_t (> 0) or a MoeError (< 0).
// Neither torch nor Python is included anywhere below templates/, so one library serves every version of both.
// moe_runtime/kernels.py mirrors these structs with ctypes; tests/test_abi.py compares the two.
#pragma once
#include <stdint.h>

#define MOE_ABI_VERSION 9

#ifdef __cplusplus
extern "C" {
#endif

enum MoeError {
  MOE_ERROR_BAD_VARIANT = -1,         // no such variant in this library, or one that reads other weights
  MOE_ERROR_WORKSPACE_TOO_SMALL = -2, // workspace_bytes < moe_layer_workspace()
  MOE_ERROR_CANNOT_IMPLEMENT = -3,    // the kernel refuses the shape
  MOE_ERROR_BAD_ARGUMENT = -4,        // a combination that no kernel serves
};

// One layer is a sequence of stages; a call runs those whose bit is set.
enum MoeStage {
  MOE_STAGE_ROUTE = 1,      // router logits -> topk_ids, topk_weights
  MOE_STAGE_PERMUTE = 2,    // topk_ids -> rows grouped by local expert, and the GEMMs' group metadata
  MOE_STAGE_GATHER = 4,     // hidden_states -> rows grouped by expert, in the layer's token encoding
  MOE_STAGE_GEMM1 = 8,      // rows x gemm1_weights
  MOE_STAGE_ACTIVATION = 16,// SwiGLU or relu^2, then the token encoding
  MOE_STAGE_GEMM2 = 32,     // rows x down
  MOE_STAGE_COMBINE = 64,   // sum over top_k of weight * row -> output
};

enum MoeRouting {
  MOE_ROUTING_DEFAULT = 0,
  MOE_ROUTING_RENORMALIZE = 1,
  MOE_ROUTING_DEEPSEEK_V3 = 2,
  MOE_ROUTING_LLAMA4 = 3,
  MOE_ROUTING_RENORMALIZE_NAIVE = 4,
  MOE_ROUTING_SIGMOID_RENORM = 6,
  MOE_ROUTING_MINIMAX2 = 7,
};
enum MoeDtype { MOE_DTYPE_BF16 = 0, MOE_DTYPE_F32 = 1, MOE_DTYPE_E4M3 = 2, MOE_DTYPE_E2M1 = 3 }; // e2m1: two a byte, low nibble first
enum MoeActivation { MOE_ACTIVATION_SWIGLU = 0, MOE_ACTIVATION_RELU2 = 1 };

// How weights lie, each served by kernels of its own. Those of fp8_mxfp4 are mxfp4's, packed for fp8 tokens, whose e4m3 they
// multiply; all others of 4 bits, and bf16, multiply bf16 rows.
enum MoeWeights { MOE_WEIGHTS_FP8_BLOCK = 0, MOE_WEIGHTS_MXFP4 = 1, MOE_WEIGHTS_NVFP4 = 2, MOE_WEIGHTS_BF16 = 3, MOE_WEIGHTS_FP8_MXFP4 = 4 };

// Encodings of tokens and activations. fp8_block rows are e4m3 with one fp32 scale per 1x128. All others are stored as
// the bf16 that their codes and block factors stand for, which is exact, but fp8 beside fp8_mxfp4's weights as its e4m3; see
// ops/token_formats.cuh.
enum MoeTokens { MOE_TOKENS_FP8_BLOCK = 0, MOE_TOKENS_BF16 = 1, MOE_TOKENS_FP8 = 2, MOE_TOKENS_MXFP8 = 3, MOE_TOKENS_NVFP4 = 4 };

// Scale layout of one group as CUTLASS' K-major Sm90BlockwiseScaleConfig stores it:
// five of the layout's integers are dynamic. Held to CuTe by a static_assert and moe_variant.check_abi().
typedef struct MoeScaleLayout {
  int32_t rows, k_blocks, batches, row_stride, batch_stride;
} MoeScaleLayout;

// Group metadata of one grouped GEMM, in device memory, written by the permute stage. It does not depend on
// the variant: swapped kernels read weights as operand A and take problem_swapped, the others problem.
typedef struct MoeGroupMetadata {
  int32_t* problem;          // [L, 3] rows, n, k
  int32_t* problem_swapped;  // [L, 3] n, rows, k
  void const** tokens;       // [L] e4m3 [rows, k]
  void const** weights;      // [L] e4m3 [n, k]
  void const** token_scales; // [L] f32 [rows, k/128]
  void const** weight_scales;// [L] f32 [n/128, k/128]
  void** output;             // [L] bf16 [rows, n]
  int64_t* token_stride;     // [L] k
  int64_t* weight_stride;    // [L] k
  int64_t* output_stride;    // [L] n
  MoeScaleLayout* token_scale_layout;  // [L]
  MoeScaleLayout* weight_scale_layout; // [L]
} MoeGroupMetadata;

// Whose slot a row is, and what its result weighs in that token's output.
typedef struct MoeRowOrigin {
  int32_t token;
  float weight;
} MoeRowOrigin;

// The same operands as whole arrays, which is all that other kernels than CUTLASS' need.
typedef struct MoeGemmOperands {
  void const* tokens;        // grouped by local expert: e4m3 [max_rows, k], or bf16, by the weights: see MoeWeights
  float const* token_scales; // [max_rows, k/128], or null
  void const* weights;       // e4m3 [L, n, k], or packed as the variant reads them
  float const* weight_scales;// [L, n/128, k/128]; where weights are not fp8_block [L], null: 1
  int32_t const* expert_offsets; // [L + 1], first row of each group
  int32_t* tiles_taken;      // [1]: 0, and 0 again after the launch
  int32_t* output_done;      // [L] or null: pieces of 64 activations that are in memory, by group, to be added to
  int32_t const* tokens_done;// [L] or null: the same of the kernel launched before, which need not have finished
  void* output;              // bf16 [max_rows, n]; where the variant fuses SwiGLU, [max_rows, n/2] as the tokens
  float* output_scales;      // [max_rows, n/2/128] with SwiGLU
  int64_t max_rows;
  int32_t gate_first;        // as in MoeLayer
  float clamp_limit;
  int32_t offsets_ready;     // expert_offsets are older than the kernel launched before this one
  int32_t local_expert_offset; // as in MoeLayer; of topk_ids
  int32_t const* topk_ids;   // [max_rows] or null: older than the kernel launched before this one, and counted instead of reading expert_offsets
  float const* bias;         // [L, n] or null; only where weights are not fp8_block
  int32_t encoding;          // MoeTokens of activations, for variants that fuse SwiGLU; as the next in MoeLayer
  float const *alpha, *beta, *clamp, *activation_multiplier; // [L] or null; only where weights are not fp8_block
  MoeRowOrigin const* row_origins; // [max_rows]; only for variants that gather or combine
} MoeGemmOperands;

typedef struct MoeGroupedGemm {
  int32_t num_groups, n, k, sm_count;
  MoeGemmOperands operands;
  MoeGroupMetadata metadata;
  void* workspace; // at least MOE_GEMM_WORKSPACE_BYTES(sm_count)
  void* stream;
} MoeGroupedGemm;

// Tensormaps for A, B and D, one set an SM, each rounded up by CUTLASS; checked against the kernel's own answer.
#define MOE_GEMM_WORKSPACE_BYTES(sm_count) ((int64_t)(sm_count)*1024 + 4096)

typedef struct MoeVariant {
  char const* name;
  int32_t tile_m, tile_n, tile_k, cluster_m, cluster_n, swap_ab, stages, shared_memory_bytes, threads;
  int32_t (*run)(MoeGroupedGemm const*);
  int32_t (*check_abi)(void); // 0 if MoeScaleLayout and the strides match CuTe's types; host only
  int32_t swiglu; // 1: GEMM1 only, with the activation in its epilogue; the layer then skips MOE_STAGE_ACTIVATION
  int32_t weights; // MoeWeights that the kernel reads
  int32_t gathers; // 1: GEMM1 only, and `tokens` are in the order in which they came in
  int32_t combines;// 1: GEMM2 only, adds weighted rows to `output`, bf16 [T, n] of zeros, in no fixed order
} MoeVariant;

// For rows that leave this GPU: a layer whose experts are the ranks, of which a token may reach all, so top_k of them.
// PERMUTE then finds out itself whom each token reaches, and GATHER writes here in place of the workspace: one message a
// row, so that one exchange moves all of it. A message is the row's values, its fp32 scales if it has any, and what its
// token brought: its ids, and as many weights. No GEMM runs in such a call.
typedef struct MoeMessages {
  void* rows;        // [T*top_k, pitch] bytes, of permuted rows; null: none
  int64_t pitch;     // a multiple of 16
  int32_t slots;     // of a token
  int32_t experts_per_rank; // 0: all tokens go to all ranks
  int32_t const* ids;    // [T, slots]
  float const* weights;  // [T, slots]
  int64_t* notice;   // [top_k, 3], what each rank is told: its rows, T, later; null: none
  int64_t later;     // tokens that are still to come
} MoeMessages;

// Ids and weights of messages that came.
typedef struct MoeUnpack {
  void const* messages;
  int64_t pitch, offset; // of messages, and in them; bytes
  int32_t num_rows, num_came; // those from num_came on are absent: ids of -1
  int32_t slots;
  int32_t* ids;      // [num_rows, slots]
  float* weights;    // [num_rows, slots]
  void* stream;
} MoeUnpack;

typedef struct MoeLayer {
  int32_t num_tokens, hidden_size, intermediate_size, num_experts, top_k;
  int32_t local_expert_offset, num_local_experts;
  int32_t stages;              // MoeStage bits
  int32_t gemm1_variant, gemm2_variant; // indices into moe_variant()
  int32_t weights, tokens;     // MoeWeights, MoeTokens: fp8_block both or neither; of fp8_mxfp4 the tokens are fp8
  int32_t routing_method, n_group, topk_group;
  int32_t num_fused_shared_experts; // the last of num_experts, which every token has in the last of its top_k slots
  float routed_scaling_factor;
  int32_t activation;          // MoeActivation; relu^2 not with fp8_block
  float clamp_limit;           // <= 0: none
  int32_t gate_first;          // 1: gemm1_weights rows are [gate; up], 0: [up; gate]
  int32_t hidden_states_dtype; // MoeDtype: bf16; e4m3, of nvfp4 tokens e2m1, where they are quantised already
  float input_scale_inverse;   // bf16 hidden_states are multiplied by it before they are encoded; 1 for fp8_block
  int32_t routing_logits_dtype, routing_bias_dtype; // bf16 or f32
  int32_t sm_count;
  int64_t hidden_states_stride; // of a token, in values; H except of bf16 and fp8_block
  int64_t scale_token_stride, scale_block_stride; // of fp8_block's hidden_states_scale, in floats
  int64_t workspace_bytes;
  void const* routing_logits;  // [T, E], of the E experts that are not shared
  void const* routing_bias;    // [E] or null
  int32_t* topk_ids;           // [T, top_k]; written by ROUTE, read by PERMUTE; null: in the workspace
  float* topk_weights;         // [T, top_k]; written by ROUTE, read by COMBINE, under Llama4 by GATHER; null: in the workspace
  void const* hidden_states;   // [T, H], of e2m1 [T, H/2] bytes
  MoeMessages messages;
  void const* hidden_states_scale; // of quantised ones: f32, see the strides; mxfp8 ue8m0 [T, H/32]; nvfp4 e4m3 [T, H/16]; else null
  void const* gemm1_weights;   // e4m3 [L, N, H] with N = 2I, of relu^2 I; or packed as the variant reads them
  float const* gemm1_weights_scale; // fp8_block: [L, 2I/128, H/128]; else null
  void const* gemm2_weights;   // e4m3 [L, H, I], or packed
  float const* gemm2_weights_scale; // fp8_block: [L, H/128, I/128]; else null
  // One value a local expert, [L], and biases [L, N] and [L, H]; null: neutral. All null for fp8_block.
  float const* gemm1_scale;    // of the rows' products with gemm1_weights
  float const* gemm1_bias;
  float const* alpha;          // SwiGLU is gate * sigmoid(alpha * gate) * (up + beta)
  float const* beta;
  float const* clamp;          // in place of clamp_limit
  float const* activation_multiplier; // of the activation, before it is encoded
  float const* gemm2_scale;
  float const* gemm2_bias;
  void* output;                // bf16 [T, H]
  void* workspace;             // 256-byte aligned
  void* stream;
} MoeLayer;

// Byte offsets into the workspace. Where tokens are not fp8_block, rows and activation have no scales, and are bf16 unless the
// weights are fp8_mxfp4's.
typedef struct MoeWorkspace {
  int64_t topk_ids;         // int32 [T, top_k], where the caller gave none
  int64_t topk_weights;     // f32 [T, top_k], likewise
  int64_t expert_offsets;   // int32 [L + 1], first row of each local expert
  int64_t permuted_row;     // int32 [T, top_k], row of a slot, -1 where the expert is remote
  int64_t row_origins;      // MoeRowOrigin [T*top_k]
  int64_t rows;             // e4m3 [T*top_k, H]; [T, H] where GEMM1's variant gathers
  int64_t row_scales;       // f32 [T*top_k, H/128]
  int64_t gemm1_output;     // bf16 [T*top_k, N]
  int64_t activation;       // e4m3 [T*top_k, I]
  int64_t activation_scales;// f32 [T*top_k, I/128]
  int64_t gemm2_output;     // bf16 [T*top_k, H]
  int64_t metadata;         // two GEMMs' MoeGroupMetadata arrays
  int64_t gemm_workspace;   // tensormaps
  int64_t total_bytes;
} MoeWorkspace;

int32_t moe_abi_version(void);
char const* moe_library_hash(void);
int32_t moe_variant_count(void);
MoeVariant const* moe_variant(int32_t index);
int32_t moe_layer_workspace(MoeLayer const* layer, MoeWorkspace* workspace);
int32_t moe_layer(MoeLayer const* layer);
int32_t moe_unpack(MoeUnpack const* unpack);
char const* moe_error_string(int32_t code);

#ifdef __cplusplus
}
#endif
