// top_k ids -> rows grouped by local expert: a stable counting sort, then the group metadata that both grouped GEMMs
// read. Stable, so that row order is reproducible. Three sizes:
// - few slots: every block of one kernel sorts all of them for itself and then gathers its share of the tokens, because
//   the sort is shorter than another launch; of few tokens it routes all as well, for the same reason;
// - as few without the gather: one block;
// - more: one cluster, whose blocks add up their counts through distributed shared memory.
#include <cooperative_groups.h>

#include "gather.cuh"
#include "route.cuh"

namespace moe {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kCountsBytes = 34 * 1024; // with the static arrays under the 48 KB that need no opt-in
constexpr int kClusterBlocks = 8;       // the largest portable cluster
constexpr int kSlotsOfEveryBlock = 1024; // and of one block: 4096 take one 12.7 us, and a cluster 9 us with 16384
constexpr int kTokensOfEveryBlock = 16;     // routed by a warp each; more of them delay each other
constexpr int kExpertsOfEveryBlock = 256;   // more would take other registers and memory than the sort's
constexpr int kStepsInFlight = 8;       // loads a lane issues together: one at a time, latency made this stage 10x slower

struct GemmOperands {
  MoeGroupMetadata meta;
  uint8_t const* tokens;
  float const* token_scales;
  uint8_t const* weights;
  float const* weight_scales;
  __nv_bfloat16* output;
  int n, k;
};

struct PermuteParams {
  int32_t const* ids;
  int32_t* permuted_row;
  MoeRowOrigin* row_origins;
  float const* weights; // of slots; null: 1
  int32_t* expert_offsets;
  int32_t *tiles_taken, *activations_done;
  int num_slots, top_k, first_expert, num_experts, counting_warps;
  bool fp8_block; // whose kernels alone read metadata
  GemmOperands gemm1, gemm2;
  uint4* zeros; // where to write them, or null
  int64_t num_zeros;
};

__device__ void write_metadata(GemmOperands const& g, int expert, int first_row, int rows) {
  MoeGroupMetadata const& m = g.meta;
  int const k_blocks = g.k / kBlock, n_blocks = g.n / kBlock;
  m.problem[3 * expert] = rows;
  m.problem[3 * expert + 1] = g.n;
  m.problem[3 * expert + 2] = g.k;
  m.problem_swapped[3 * expert] = g.n;
  m.problem_swapped[3 * expert + 1] = rows;
  m.problem_swapped[3 * expert + 2] = g.k;
  m.tokens[expert] = g.tokens + int64_t(first_row) * g.k;
  m.weights[expert] = g.weights + int64_t(expert) * g.n * g.k;
  m.token_scales[expert] = g.token_scales + int64_t(first_row) * k_blocks;
  m.weight_scales[expert] = g.weight_scales + int64_t(expert) * n_blocks * k_blocks;
  m.output[expert] = g.output + int64_t(first_row) * g.n;
  m.token_stride[expert] = g.k;
  m.weight_stride[expert] = g.k;
  m.output_stride[expert] = g.n;
  m.token_scale_layout[expert] = {rows, k_blocks, 1, k_blocks, rows * k_blocks};
  m.weight_scale_layout[expert] = {n_blocks, k_blocks, 1, k_blocks, n_blocks * k_blocks};
}

// Calls body(slot, local expert or -1) for the slots [first, end), 32 neighbours at a time and in order.
template <class Body>
__device__ __forceinline__ void for_each_slot(PermuteParams const& p, int32_t const* ids, int first, int end, int lane, Body body) {
  for (int base = first; base < end; base += 32 * kStepsInFlight) {
    int expert[kStepsInFlight];
#pragma unroll
    for (int i = 0; i < kStepsInFlight; ++i) {
      int const slot = base + 32 * i + lane;
      expert[i] = slot < end ? ids[slot] - p.first_expert : -1;
    }
#pragma unroll
    for (int i = 0; i < kStepsInFlight; ++i) {
      bool const local = expert[i] >= 0 && expert[i] < p.num_experts;
      if (base + 32 * i < end) body(base + 32 * i + lane, local ? expert[i] : -1);
    }
  }
}

__device__ __forceinline__ int inclusive_scan(int value, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    int const other = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// Writes permuted_row, and row_origins unless they are null, of the slots that are this block's, one of `blocks` that share
// them, and, where `publish` is set, offsets and metadata. Blocks that share slots are one cluster. permuted_row may be ids:
// one thread alone reads a slot's id and then writes its row.
__device__ __forceinline__ void sort_slots(PermuteParams const& p, int32_t const* ids, int block, int blocks, int32_t* permuted_row,
                                           MoeRowOrigin* row_origins, bool publish) {
  extern __shared__ int counts[]; // [counting_warps, num_experts]
  __shared__ int block_rows[kMaxExperts]; // rows of each expert among this block's slots
  __shared__ int first_row[kMaxExperts];  // where those rows start
  __shared__ int warp_totals[kWarps];
  auto cluster = cooperative_groups::this_cluster();
  int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < p.counting_warps * p.num_experts; i += kThreads) counts[i] = 0;
  __syncthreads();

  int const share = ceil_div(ceil_div(p.num_slots, blocks * p.counting_warps), 32) * 32;
  int const first = warp < p.counting_warps ? (block * p.counting_warps + warp) * share : p.num_slots;
  int const end = min(first + share, p.num_slots);
  int* const my_counts = counts + warp * p.num_experts;
  for_each_slot(p, ids, first, end, lane, [&](int, int expert) {
    if (expert >= 0) atomicAdd(&my_counts[expert], 1);
  });
  __syncthreads();

  // One thread an expert: counts become each warp's first place among the block's rows.
  int const expert = threadIdx.x;
  if (expert < p.num_experts) {
    int rows = 0;
    for (int w = 0; w < p.counting_warps; ++w) {
      int const count = counts[w * p.num_experts + expert];
      counts[w * p.num_experts + expert] = rows;
      rows += count;
    }
    block_rows[expert] = rows;
  }
  cluster.sync();
  int rows = 0, rows_of_earlier_blocks = 0;
  if (expert < p.num_experts) {
    for (int b = 0; b < blocks; ++b) {
      if (b == block) rows_of_earlier_blocks = rows;
      rows += *cluster.map_shared_rank(&block_rows[expert], b);
    }
  }
  int const inclusive = inclusive_scan(rows, lane);
  if (lane == 31) warp_totals[warp] = inclusive;
  __syncthreads();
  if (expert < p.num_experts) {
    int before = inclusive - rows;
    for (int w = 0; w < warp; ++w) before += warp_totals[w];
    first_row[expert] = before + rows_of_earlier_blocks;
    if (publish) {
      p.expert_offsets[expert] = before;
      p.activations_done[expert] = 0;
      if (expert == p.num_experts - 1) {
        p.expert_offsets[p.num_experts] = before + rows;
        p.tiles_taken[0] = p.tiles_taken[1] = 0;
      }
      if (p.fp8_block) {
        write_metadata(p.gemm1, expert, before, rows);
        write_metadata(p.gemm2, expert, before, rows);
      }
    }
  }
  __syncthreads();

  for_each_slot(p, ids, first, end, lane, [&](int slot, int local) {
    uint32_t const same = __match_any_sync(0xffffffffu, local);
    int const place = local >= 0 ? my_counts[local] + __popc(same & ((1u << lane) - 1)) : 0;
    int const row = local >= 0 ? first_row[local] + place : -1;
    if (slot < end) permuted_row[slot] = row;
    if (row >= 0 && row_origins) row_origins[row] = {slot / p.top_k, p.weights ? p.weights[slot] : 1.0f};
    __syncwarp();
    if (local >= 0 && lane == __ffs(same) - 1) my_counts[local] += __popc(same);
    __syncwarp();
  });
}

__global__ void __launch_bounds__(kThreads, 1) permute_kernel(__grid_constant__ PermuteParams const p) {
  allow_successor_to_start();
  wait_for_predecessor();
  auto const cluster = cooperative_groups::this_cluster();
  int const sorting_blocks = cluster.num_blocks(), block = blockIdx.x;
  if (block >= sorting_blocks) {
    int64_t const stride = (int64_t(gridDim.x) - sorting_blocks) * kThreads;
    for (int64_t i = (block - sorting_blocks) * kThreads + threadIdx.x; i < p.num_zeros; i += stride) p.zeros[i] = uint4{};
    return;
  }
  sort_slots(p, p.ids, block, sorting_blocks, p.permuted_row, p.row_origins, block == 0);
  cluster.sync(); // a block's shared memory must outlive the others' reads
}

// kRouteItems: experts a lane has to choose from, 0 where the ids are ready.
template <MoeTokens kTokens, int kRouteItems>
__global__ void __launch_bounds__(kThreads, 1) permute_and_gather_kernel(__grid_constant__ RouteParams const r, __grid_constant__ PermuteParams const p,
                                                                         __grid_constant__ GatherParams const g) {
  __shared__ int32_t slots[kSlotsOfEveryBlock]; // expert ids, then rows
  __shared__ float first_weights[kTokensOfEveryBlock];
  int const unit = blockIdx.x * kThreads + threadIdx.x;
  bool const holds_slot = threadIdx.x < p.num_slots, publishes = blockIdx.x == 0;
  float const* input_weights = g.input_weights;
  MoeRowOrigin origin{static_cast<int32_t>(threadIdx.x) / p.top_k, 1.0f};
  int32_t id = -1;
  allow_successor_to_start();
  wait_for_predecessor();
  // All that is known to be read is asked for at once, and tokens are encoded before it is known whether they are local: what
  // memory takes to answer is half of this kernel.
  if constexpr (kRouteItems > 0) {
    extern __shared__ float choice[]; // [num_tokens, num_experts], where the sort will count
    int const lane = threadIdx.x % 32, token = threadIdx.x / 32;
    if (token < r.num_tokens) {
      RoutedSlot const slot = route_token<kRouteItems>(r, token, choice + token * r.num_experts, lane);
      if (lane < r.slots) slots[token * r.slots + lane] = slot.expert;
      if (lane == 0) first_weights[token] = slot.weight;
      if (blockIdx.x == 0) store_slot(r, token, slot, lane);
    }
    if (input_weights) input_weights = first_weights; // top_k is 1, and other blocks' global writes may be late
    __syncthreads();
  } else if (holds_slot) {
    id = p.ids[threadIdx.x];
  }
  if (publishes && holds_slot && p.weights) origin.weight = p.weights[threadIdx.x];
  Piece<kTokens> const piece = encode_unit<kTokens>(g, unit, unit < g.num_tokens * (g.rows.width / kValuesPerThread), input_weights);
  if (kRouteItems == 0 && holds_slot) slots[threadIdx.x] = id;
  __syncthreads();
  sort_slots(p, slots, 0, 1, slots, nullptr, publishes);
  __syncthreads();
  if (publishes && holds_slot) {
    int32_t const row = p.permuted_row[threadIdx.x] = slots[threadIdx.x];
    if (row >= 0) p.row_origins[row] = origin;
  }
  gather_unit<kTokens>(g, unit, slots, [&](bool) { return piece; });
}
static_assert(kSlotsOfEveryBlock <= kThreads && kTokensOfEveryBlock * kMaxTopK <= kSlotsOfEveryBlock);

PermuteParams permute_params(MoeLayer const& layer, Buffers const& b) {
  PermuteParams p{};
  p.ids = layer.topk_ids;
  p.permuted_row = b.permuted_row;
  p.row_origins = b.row_origins;
  p.expert_offsets = b.expert_offsets;
  p.tiles_taken = b.tiles_taken;
  p.activations_done = b.activations_done;
  p.weights = weighs_input(layer) ? nullptr : layer.topk_weights;
  p.top_k = layer.top_k;
  p.num_slots = layer.num_tokens * layer.top_k;
  p.first_expert = layer.local_expert_offset;
  p.num_experts = layer.num_local_experts;
  p.fp8_block = layer.weights == MOE_WEIGHTS_FP8_BLOCK;
  p.counting_warps = min(min(kWarps, ceil_div(p.num_slots, 32)), kCountsBytes / (4 * layer.num_local_experts));
  p.gemm1 = {b.gemm1, b.rows, b.row_scales, static_cast<uint8_t const*>(layer.gemm1_weights), layer.gemm1_weights_scale,
             b.gemm1_output, 2 * layer.intermediate_size, layer.hidden_size};
  p.gemm2 = {b.gemm2, b.activation, b.activation_scales, static_cast<uint8_t const*>(layer.gemm2_weights), layer.gemm2_weights_scale,
             b.gemm2_output, layer.hidden_size, layer.intermediate_size};
  p.zeros = reinterpret_cast<uint4*>(b.zeroed_by_permute);
  p.num_zeros = b.zeroed_by_permute ? int64_t(layer.num_tokens) * layer.hidden_size / 8 : 0;
  return p;
}

int counts_bytes(PermuteParams const& p) { return p.counting_warps * p.num_experts * static_cast<int>(sizeof(int)); }

template <int kRouteItems>
cudaError_t launch_permute_and_gather(MoeLayer const& layer, Buffers const& b) {
  PermuteParams const p = permute_params(layer, b);
  int const choice_bytes = kRouteItems > 0 ? layer.num_tokens * layer.num_experts * static_cast<int>(sizeof(float)) : 0;
  return with_tokens(layer.tokens, [&](auto tokens) {
    return launch(permute_and_gather_kernel<tokens.value, kRouteItems>, ceil_div(gather_units(layer), kThreads), kThreads,
                  max(counts_bytes(p), choice_bytes), layer.stream, route_params(layer), p, gather_params(layer, b));
  });
}
static_assert(kTokensOfEveryBlock * kExpertsOfEveryBlock * sizeof(float) <= kCountsBytes);

}  // namespace

bool permutes_by_cluster(MoeLayer const& layer) { return layer.num_tokens * layer.top_k > kSlotsOfEveryBlock; }

cudaError_t permute(MoeLayer const& layer, Buffers const& b) {
  PermuteParams const p = permute_params(layer, b);
  int const cluster = permutes_by_cluster(layer) ? kClusterBlocks : 1;
  int const blocks = p.zeros ? max(layer.sm_count / cluster, 2) * cluster : cluster;
  return launch_in_clusters(permute_kernel, blocks, cluster, kThreads, counts_bytes(p), layer.stream, p);
}

cudaError_t permute_and_gather(MoeLayer const& layer, Buffers const& b) {
  if (!permutes_by_cluster(layer)) return launch_permute_and_gather<0>(layer, b);
  cudaError_t const status = permute(layer, b);
  return status == cudaSuccess ? gather(layer, b) : status;
}

cudaError_t route_permute_and_gather(MoeLayer const& layer, Buffers const& b) {
  if (layer.num_tokens <= kTokensOfEveryBlock && layer.num_experts <= kExpertsOfEveryBlock) {
    return layer.num_experts <= 128 ? launch_permute_and_gather<4>(layer, b) : launch_permute_and_gather<8>(layer, b);
  }
  cudaError_t const status = route(layer);
  return status == cudaSuccess ? permute_and_gather(layer, b) : status;
}

}  // namespace moe
