// Launching a direct grouped GEMM: its tensor maps, and the run of a MoeVariant.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstring>
#include <unordered_map>

#include "abi.h"
#include "direct/kernel.cuh"

namespace moe::direct {

using TensorMapEncoder = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, found at run time: a library that links the driver does not load on a machine without one.
inline TensorMapEncoder tensor_map_encoder() {
  static TensorMapEncoder const encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaError_t const status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<TensorMapEncoder>(function) : nullptr;
  }();
  return encode;
}

// e4m3 [groups, rows, k], K-major, read in boxes of box_rows x 128.
inline bool encode(CUtensorMap& map, void const* base, int64_t groups, int64_t rows, int64_t k, int box_rows) {
  auto const encoder = tensor_map_encoder();
  if (!encoder) return false;
  cuuint64_t const extents[3] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(groups)};
  cuuint64_t const strides[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows * k)};
  cuuint32_t const box[3] = {kTileK, static_cast<cuuint32_t>(box_rows), 1}, steps[3] = {1, 1, 1};
  return encoder(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(base), extents, strides, box, steps,
                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class C>
int32_t make_params(MoeGroupedGemm const& gemm, Params& p) {
  MoeGemmOperands const& o = gemm.operands;
  if (gemm.num_groups > kMaxGroups || gemm.n % C::kWeights || gemm.k % kTileK) return MOE_ERROR_CANNOT_IMPLEMENT;
  if (!encode(p.tokens, o.tokens, 1, o.max_rows, gemm.k, C::kGather ? 1 : C::kTokens / C::kTokenLoads)) return MOE_ERROR_BAD_ARGUMENT;
  if (!encode(p.weights, o.weights, gemm.num_groups, gemm.n, gemm.k, C::kWeights / C::kWeightLoads)) return MOE_ERROR_BAD_ARGUMENT;
  p.token_scales = o.token_scales;
  p.weight_scales = o.weight_scales;
  p.expert_offsets = o.expert_offsets;
  p.tiles_taken = o.tiles_taken;
  p.output_done = o.output_done;
  p.tokens_done = o.tokens_done;
  p.output = o.output;
  p.output_scales = o.output_scales;
  p.groups = gemm.num_groups;
  p.n = gemm.n;
  p.k = gemm.k;
  p.gate_row = o.gate_first ? 0 : gemm.n / 2;
  p.up_row = o.gate_first ? gemm.n / 2 : 0;
  p.clamp_limit = o.clamp_limit;
  p.offsets_ready = o.offsets_ready != 0;
  p.topk_ids = o.topk_ids;
  p.num_slots = static_cast<int>(o.max_rows);
  p.first_expert = o.local_expert_offset;
  p.row_origins = o.row_origins;
  return 0;
}

// make_params: what a launch of the kernel takes, or a MoeError.
template <class C, class Params = Params, void (*kKernel)(Params) = grouped_gemm<C>, int32_t (*kMakeParams)(MoeGroupedGemm const&, Params&) = make_params<C>>
struct Launch {
  // Encoding costs the host about as much as a launch. A server repeats its arguments, layer by layer: each thread keeps
  // the last ones of every layer, by its weights.
  static int32_t run(MoeGroupedGemm const* gemm) {
    static_assert(offsetof(MoeGroupedGemm, stream) + sizeof(void*) == sizeof(MoeGroupedGemm));
    thread_local std::unordered_map<void const*, Prepared> prepared;
    if (prepared.size() > kMaxPrepared) prepared.clear();
    Prepared& last = prepared[gemm->operands.weights];
    // These may be the caller's, which differ from call to call, and no tensor map is of them.
    last.gemm.operands.output = last.params.output = gemm->operands.output;
    last.gemm.operands.topk_ids = last.params.topk_ids = gemm->operands.topk_ids;
    if (std::memcmp(&last.gemm, gemm, offsetof(MoeGroupedGemm, stream)) != 0) {
      last.gemm = {};
      if (cudaError_t status = raise_shared_memory_limit()) return status;  // the same weights are on the same device
      if (int32_t status = kMakeParams(*gemm, last.params)) return status;
      last.gemm = *gemm;
    }
    return launch(kKernel, gemm->sm_count * C::kBlocksPerSm, C::kThreads, sizeof(typename C::SharedStorage), gemm->stream, last.params);
  }

  static int32_t check_abi() { return 0; }  // takes plain pointers: no layout of CUTLASS' own

 private:
  struct Prepared {
    MoeGroupedGemm gemm{};
    Params params;
  };
  static constexpr std::size_t kMaxPrepared = 1024;

  // A property of the function on one device: done once for each.
  static cudaError_t raise_shared_memory_limit() {
    static std::atomic<uint64_t> done{0};
    int device = 0;
    if (cudaError_t status = cudaGetDevice(&device)) return status;
    uint64_t const bit = uint64_t(1) << (device & 63);
    if (done.load(std::memory_order_relaxed) & bit) return cudaSuccess;
    cudaError_t const status = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(typename C::SharedStorage));
    if (status == cudaSuccess) done.fetch_or(bit);
    return status;
  }
};

}  // namespace moe::direct
