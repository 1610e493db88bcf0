// top_k ids -> rows grouped by local expert: a stable counting sort, then the group metadata that both grouped GEMMs
// read. Stable, so that row order is reproducible. Three sizes:
// - few slots: one kernel that also gathers, in which every block counts for itself where its tokens' slots go, because
//   that is shorter than another launch; of few tokens it routes all as well, for the same reason;
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
  bool metadata; // whether to write it, which fp8_block's kernels alone read
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

__device__ __forceinline__ void publish_row(PermuteParams const& p, int slot, int row, float weight) {
  p.permuted_row[slot] = row;
  if (row >= 0) p.row_origins[row] = {slot / p.top_k, weight};
}

// What GEMMs read of an expert, and count by.
__device__ __forceinline__ void publish_group(PermuteParams const& p, int expert, int first_row, int rows) {
  p.expert_offsets[expert] = first_row;
  p.activations_done[expert] = 0;
  if (expert == p.num_experts - 1) {
    p.expert_offsets[p.num_experts] = first_row + rows;
    p.tiles_taken[0] = p.tiles_taken[1] = 0;
  }
  if (p.metadata) {
    write_metadata(p.gemm1, expert, first_row, rows);
    write_metadata(p.gemm2, expert, first_row, rows);
  }
}

// Calls body(slot, local expert or -1) for the slots [first, end), 32 neighbours at a time and in order.
template <class Body>
__device__ __forceinline__ void for_each_slot(PermuteParams const& p, int first, int end, int lane, Body body) {
  for (int base = first; base < end; base += 32 * kStepsInFlight) {
    int expert[kStepsInFlight];
#pragma unroll
    for (int i = 0; i < kStepsInFlight; ++i) {
      int const slot = base + 32 * i + lane;
      expert[i] = slot < end ? p.ids[slot] - p.first_expert : -1;
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

// Writes rows and their origins of the slots that are this block's, one of the `blocks` of a cluster that share them, and
// the first block the groups.
__device__ __forceinline__ void sort_slots(PermuteParams const& p, int block, int blocks) {
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
  for_each_slot(p, first, end, lane, [&](int, int expert) {
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
    if (block == 0) publish_group(p, expert, before, rows);
  }
  __syncthreads();

  for_each_slot(p, first, end, lane, [&](int slot, int local) {
    uint32_t const same = __match_any_sync(0xffffffffu, local);
    int const place = local >= 0 ? my_counts[local] + __popc(same & ((1u << lane) - 1)) : 0;
    int const row = local >= 0 ? first_row[local] + place : -1;
    if (slot < end) publish_row(p, slot, row, p.weights ? p.weights[slot] : 1.0f);
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
  sort_slots(p, block, sorting_blocks);
  cluster.sync(); // a block's shared memory must outlive the others' reads
}

// Few slots in shared memory, those that are none behind them.
struct FewSlots {
  alignas(16) int32_t experts[kFewSlots]; // local ones
  int32_t rows[kFewSlots];
  float weights[kFewSlots];
};
constexpr int kRemote = kMaxExperts; // sorts behind all experts

// A slot's row is how many slots sort before it. By a warp.
__device__ __forceinline__ int count_before(FewSlots const& few, int num_slots, int slot, int lane) {
  int const expert = few.experts[slot];
  int before = 0;
  for (int at = 4 * lane; at < num_slots; at += 4 * 32) {
    int4 const four = *reinterpret_cast<int4 const*>(few.experts + at);
    int const others[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) before += others[i] < expert || (others[i] == expert && at + i < slot);
  }
  return expert == kRemote ? -1 : __reduce_add_sync(kAllLanes, before);
}

// By one block of kBlockThreads.
template <int kBlockThreads>
__device__ __forceinline__ void publish_groups(PermuteParams const& p, FewSlots const& few) {
  constexpr int kExperts = kMaxExperts / kBlockThreads; // of a thread
  __shared__ int rows[kMaxExperts], rows_of_warp[kBlockThreads / 32];
  int const self = threadIdx.x, lane = self % 32, warp = self / 32;
  for (int expert = self; expert < kMaxExperts; expert += kBlockThreads) rows[expert] = 0;
  __syncthreads();
  for (int slot = self; slot < kFewSlots; slot += kBlockThreads) {
    if (few.experts[slot] != kRemote) atomicAdd(&rows[few.experts[slot]], 1);
  }
  __syncthreads();
  int rows_of_thread = 0;
#pragma unroll
  for (int i = 0; i < kExperts; ++i) rows_of_thread += rows[self * kExperts + i];
  int const inclusive = inclusive_scan(rows_of_thread, lane);
  if (lane == 31) rows_of_warp[warp] = inclusive;
  __syncthreads();
  int first_row = inclusive - rows_of_thread;
  for (int w = 0; w < warp; ++w) first_row += rows_of_warp[w];
#pragma unroll
  for (int i = 0; i < kExperts; ++i) {
    int const expert = self * kExperts + i;
    if (expert < p.num_experts) publish_group(p, expert, first_row, rows[expert]);
    first_row += rows[expert];
  }
}

// Small blocks, so that rows are written by many SMs: of 8 tokens of bf16, four blocks of 1024 took 14 us. To route, a
// warp a token.
constexpr int gather_threads(int route_items) { return route_items > 0 ? 1024 : 256; }

// One block publishes the groups, each other gathers as many units as it has threads. kRouteItems: experts a lane has to choose
// from, 0 where the ids are ready.
template <MoeTokens kTokens, int kRouteItems>
__global__ void __launch_bounds__(gather_threads(kRouteItems), 1)
    permute_and_gather_kernel(__grid_constant__ RouteParams const r, __grid_constant__ PermuteParams const p, __grid_constant__ GatherParams const g) {
  constexpr int kBlockThreads = gather_threads(kRouteItems), kSlots = kFewSlots / kBlockThreads; // of a thread
  __shared__ FewSlots few;
  int const self = threadIdx.x, lane = self % 32, warp = self / 32;
  int const first_unit = blockIdx.x * kBlockThreads, unit = first_unit + self, units_of_token = g.rows.width / kValuesPerThread;
  int const first_slot = first_unit / units_of_token * p.top_k;
  int const end_slot = min(((first_unit + kBlockThreads - 1) / units_of_token + 1) * p.top_k, p.num_slots);
  float const* input_weights = g.input_weights;
  wait_for_predecessor();
  allow_successor_to_start(); // not before: GEMM1 may read the ids without waiting
  // All that is known to be read is asked for at once, and tokens are encoded before it is known whether they are local: what
  // memory takes to answer is half of this kernel.
  if constexpr (kRouteItems > 0) {
    extern __shared__ float choice[]; // [num_tokens, num_experts]
    if (warp < r.num_tokens) {
      RoutedSlot const slot = route_token<kRouteItems>(r, warp, choice + warp * r.num_experts, lane);
      if (lane < r.slots) few.experts[warp * r.slots + lane] = slot.expert, few.weights[warp * r.slots + lane] = slot.weight;
      if (blockIdx.x == 0) store_slot(r, warp, slot, lane);
    }
    if (input_weights) input_weights = few.weights; // top_k is 1, and other blocks' global writes may be late
    __syncthreads();
  }
  int id[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    int const slot = i * kBlockThreads + self;
    id[i] = slot >= p.num_slots ? -1 : kRouteItems > 0 ? few.experts[slot] : p.ids[slot];
  }
  if (kRouteItems == 0 && p.weights) {
    for (int slot = first_slot + self; slot < end_slot; slot += kBlockThreads) few.weights[slot] = p.weights[slot];
  }
  Piece<kTokens> const piece = encode_unit<kTokens>(g, unit, unit < g.num_tokens * units_of_token, input_weights);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    bool const local = id[i] >= p.first_expert && id[i] < p.first_expert + p.num_experts;
    few.experts[i * kBlockThreads + self] = local ? id[i] - p.first_expert : kRemote;
  }
  __syncthreads();
  if (blockIdx.x == gridDim.x - 1) return publish_groups<kBlockThreads>(p, few);
  for (int slot = first_slot + warp; slot < end_slot; slot += kBlockThreads / 32) {
    int const row = count_before(few, p.num_slots, slot, lane);
    if (lane > 0) continue;
    few.rows[slot] = row;
    if (slot / p.top_k * units_of_token >= first_unit) publish_row(p, slot, row, p.weights ? few.weights[slot] : 1.0f); // else another block has
  }
  __syncthreads();
  gather_unit<kTokens>(g, unit, few.rows, [&](bool) { return piece; });
}
static_assert(kTokensOfEveryBlock * kMaxTopK <= kFewSlots);

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
  p.metadata = layer.weights == MOE_WEIGHTS_FP8_BLOCK && moe_metadata_is_read;
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
  return with_tokens(layer, [&](auto tokens) {
    constexpr int kBlockThreads = gather_threads(kRouteItems);
    return launch(permute_and_gather_kernel<tokens.value, kRouteItems>, ceil_div(gather_units(layer), kBlockThreads) + 1, kBlockThreads,
                  choice_bytes, layer.stream, route_params(layer), p, gather_params(layer, b));
  });
}
static_assert(kTokensOfEveryBlock * kExpertsOfEveryBlock * sizeof(float) <= kCountsBytes);

}  // namespace

bool permutes_by_cluster(MoeLayer const& layer) { return layer.num_tokens * layer.top_k > kFewSlots; }

bool routes_while_permuting(MoeLayer const& layer) {
  int32_t const stages = MOE_STAGE_ROUTE | MOE_STAGE_PERMUTE | MOE_STAGE_GATHER;
  return (layer.stages & stages) == stages && layer.num_tokens <= kTokensOfEveryBlock && layer.num_experts <= kExpertsOfEveryBlock;
}

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
  if (routes_while_permuting(layer)) {
    return layer.num_experts <= 128 ? launch_permute_and_gather<4>(layer, b) : launch_permute_and_gather<8>(layer, b);
  }
  cudaError_t const status = route(layer);
  return status == cudaSuccess ? permute_and_gather(layer, b) : status;
}

}  // namespace moe
