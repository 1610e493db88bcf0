// What the bandwidth-bound stages of a layer share, and one function a stage.
#pragma once
#include <cuda_bf16.h>
#include <stdint.h>

#include "abi.h"
#include "dependent_launch.cuh"
#include "numerics.cuh"
#include "token_formats.cuh"

extern "C" bool const moe_metadata_is_read; // see the registry

namespace moe {

constexpr int kMaxTopK = 32;
constexpr int kMaxExperts = 1024;

struct Buffers {
  int32_t* expert_offsets;
  int32_t *tiles_taken, *activations_done; // [2], one a GEMM; [num_local_experts]: MoeGemmOperands::output_done
  int32_t* permuted_row;
  MoeRowOrigin* row_origins;
  uint8_t* rows;
  float* row_scales;
  __nv_bfloat16* gemm1_output;
  uint8_t* activation;
  float* activation_scales;
  __nv_bfloat16* gemm2_output;
  MoeGroupMetadata gemm1, gemm2;
  void* gemm_workspace;
  bool rows_by_token;          // GEMM1 gathers
  __nv_bfloat16 *zeroed_by_permute, *zeroed_by_gather; // the output, where GEMM2 adds to it; else null
};

// Whether topk_weights multiply what experts read, not what they give.
inline bool weighs_input(MoeLayer const& layer) { return layer.routing_method == MOE_ROUTING_LLAMA4; }

// Columns of gemm1_output.
inline int gemm1_width(MoeLayer const& layer) { return (layer.activation == MOE_ACTIVATION_RELU2 ? 1 : 2) * layer.intermediate_size; }

cudaError_t route(MoeLayer const& layer);
bool permutes_by_cluster(MoeLayer const& layer);
bool routes_while_permuting(MoeLayer const& layer);
cudaError_t permute(MoeLayer const& layer, Buffers const& buffers);
cudaError_t gather(MoeLayer const& layer, Buffers const& buffers);
cudaError_t activate(MoeLayer const& layer, Buffers const& buffers);
cudaError_t combine(MoeLayer const& layer, Buffers const& buffers);

// Before and after a permutation by rank.
cudaError_t reach(MoeLayer const& layer);
cudaError_t notify(MoeLayer const& layer, Buffers const& buffers);

// Several stages, in one launch where that is faster.
cudaError_t permute_and_gather(MoeLayer const& layer, Buffers const& buffers);
cudaError_t route_permute_and_gather(MoeLayer const& layer, Buffers const& buffers);

}  // namespace moe
