// Around the exchange of rows between ranks: whom a token reaches, what each rank is told of the rows that come, and the
// ids and weights of rows that came. See MoeMessages.
#include "ops.cuh"

namespace moe {
namespace {

constexpr int kThreads = 256;

struct ReachParams {
  int32_t const* ids; // [num_tokens, slots], of experts
  int num_tokens, slots, num_ranks, experts_per_rank;
  int32_t* ranks; // [num_tokens, num_ranks]: that of the column if the token has a slot there, else -1
  float* weights; // [num_tokens, num_ranks] of ones: what comes back is added up as it is
};

__global__ void __launch_bounds__(kThreads) reach_kernel(ReachParams p) {
  allow_successor_to_start();
  wait_for_predecessor();
  int const unit = blockIdx.x * kThreads + threadIdx.x, token = unit / p.num_ranks, rank = unit % p.num_ranks;
  if (token >= p.num_tokens) return;
  bool reached = p.experts_per_rank == 0; // all tokens go everywhere
  for (int j = 0; j < p.slots; ++j) {
    int const expert = p.ids[token * p.slots + j] - rank * p.experts_per_rank;
    reached |= expert >= 0 && expert < p.experts_per_rank;
  }
  p.ranks[unit] = reached ? rank : -1;
  p.weights[unit] = 1.0f;
}

struct NoticeParams {
  int32_t const* offsets; // [num_ranks + 1]
  int num_ranks;
  int64_t num_tokens, later;
  int64_t* notice; // [num_ranks, 3]
};

__global__ void notice_kernel(NoticeParams p) {
  allow_successor_to_start();
  wait_for_predecessor();
  if (int const rank = threadIdx.x; rank < p.num_ranks) {
    p.notice[3 * rank] = p.offsets[rank + 1] - p.offsets[rank];
    p.notice[3 * rank + 1] = p.num_tokens;
    p.notice[3 * rank + 2] = p.later;
  }
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(MoeUnpack p) {
  allow_successor_to_start();
  wait_for_predecessor();
  int const unit = blockIdx.x * kThreads + threadIdx.x, row = unit / p.slots, slot = unit % p.slots;
  if (row >= p.num_rows) return;
  bool const came = row < p.num_came;
  auto const* const slots = reinterpret_cast<int32_t const*>(static_cast<uint8_t const*>(p.messages) + row * p.pitch + p.offset);
  p.ids[unit] = came ? slots[slot] : -1;
  p.weights[unit] = came ? __int_as_float(slots[p.slots + slot]) : 0.0f;
}

}  // namespace

cudaError_t reach(MoeLayer const& layer) {
  MoeMessages const& m = layer.messages;
  ReachParams const p{m.ids, layer.num_tokens, m.slots, layer.top_k, m.experts_per_rank, layer.topk_ids, layer.topk_weights};
  return launch(reach_kernel, ceil_div(layer.num_tokens * layer.top_k, kThreads), kThreads, 0, layer.stream, p);
}

cudaError_t notify(MoeLayer const& layer, Buffers const& b) {
  NoticeParams const p{b.expert_offsets, layer.top_k, layer.num_tokens, layer.messages.later, layer.messages.notice};
  return launch(notice_kernel, 1, kMaxTopK, 0, layer.stream, p);
}

}  // namespace moe

extern "C" int32_t moe_unpack(MoeUnpack const* unpack) {
  if (unpack->num_rows * unpack->slots == 0) return 0;
  int const blocks = static_cast<int>(moe::ceil_div(unpack->num_rows * unpack->slots, moe::kThreads));
  return moe::launch(moe::unpack_kernel, blocks, moe::kThreads, 0, unpack->stream, *unpack);
}
