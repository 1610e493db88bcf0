// Launching a CUTLASS grouped collective from group metadata: what all formats share.
//
// The device adapter is left out: it would query the device, set attributes and memset on every call, and its
// entry point has no griddepcontrol.wait, which programmatic dependent launch needs.
#pragma once
#include <atomic>
#include <cstring>

#include "cutlass/cutlass.h"

#include "abi.h"

namespace moe {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::MaxThreadsPerBlock, Kernel::MinBlocksPerMultiprocessor)
collective_entry(CUTLASS_GRID_CONSTANT typename Kernel::Params const params) {
  extern __shared__ char smem[];
  // As every kernel of a layer (ops.cuh). The collective fills each SM's registers, so blocks of the successor move in
  // only as blocks of this kernel leave.
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  Kernel{}(params, smem);
}

template <class T, class U>
bool same_bytes(T const& a, U const& b) {
  static_assert(sizeof(T) == sizeof(U));
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <class Kernel, bool kSwapAB>
struct CollectiveLaunch {
  using Mainloop = typename Kernel::CollectiveMainloop;
  using Arguments = typename Kernel::Arguments;
  using Problem = typename Kernel::ProblemShape::UnderlyingProblemShape;
  using StrideA = typename Mainloop::InternalStrideA;
  using StrideB = typename Mainloop::InternalStrideB;
  using StrideD = typename Kernel::CollectiveEpilogue::InternalStrideD;
  using LayoutSFA = typename Mainloop::InternalLayoutSFA;
  using LayoutSFB = typename Mainloop::InternalLayoutSFB;

  static_assert(sizeof(Problem) == 3 * sizeof(int32_t));
  static_assert(sizeof(StrideA) == sizeof(int64_t) && sizeof(StrideB) == sizeof(int64_t) && sizeof(StrideD) == sizeof(int64_t));
  static_assert(sizeof(LayoutSFA) == sizeof(MoeScaleLayout) && sizeof(LayoutSFB) == sizeof(MoeScaleLayout));

  static Arguments arguments(MoeGroupMetadata const& meta, int num_groups, int sm_count) {
    Arguments args{};
    args.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    args.problem_shape = {num_groups, reinterpret_cast<Problem*>(kSwapAB ? meta.problem_swapped : meta.problem), nullptr};
    auto& operands = args.mainloop;
    set(operands.ptr_A, kSwapAB ? meta.weights : meta.tokens);
    set(operands.ptr_B, kSwapAB ? meta.tokens : meta.weights);
    set(operands.dA, kSwapAB ? meta.weight_stride : meta.token_stride);
    set(operands.dB, kSwapAB ? meta.token_stride : meta.weight_stride);
    set(operands.ptr_SFA, kSwapAB ? meta.weight_scales : meta.token_scales);
    set(operands.ptr_SFB, kSwapAB ? meta.token_scales : meta.weight_scales);
    set(operands.layout_SFA, kSwapAB ? meta.weight_scale_layout : meta.token_scale_layout);
    set(operands.layout_SFB, kSwapAB ? meta.token_scale_layout : meta.weight_scale_layout);
    set(args.epilogue.ptr_D, meta.output);
    set(args.epilogue.dD, meta.output_stride);
    args.hw_info.sm_count = sm_count;
    return args;
  }

  static int32_t check(Arguments const& args, int sm_count) {
    if (!Kernel::can_implement(args)) return MOE_ERROR_CANNOT_IMPLEMENT;
    bool const fits = Kernel::get_workspace_size(args) <= static_cast<size_t>(MOE_GEMM_WORKSPACE_BYTES(sm_count));
    return fits ? 0 : MOE_ERROR_WORKSPACE_TOO_SMALL;
  }

  static int32_t launch(typename Kernel::Params const& params, void* stream) {
    if (cudaError_t status = raise_shared_memory_limit()) return status;
    using Cluster = typename Mainloop::DispatchPolicy::ClusterShape;
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(cute::size<0>(Cluster{})), static_cast<unsigned>(cute::size<1>(Cluster{})), 1};
    cudaLaunchConfig_t config{};
    config.gridDim = Kernel::get_grid_shape(params);
    config.blockDim = Kernel::get_block_shape();
    config.dynamicSmemBytes = Kernel::SharedStorageSize;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = cute::size(Cluster{}) == 1 ? 1 : 2;
    return cudaLaunchKernelEx(&config, collective_entry<Kernel>, params);
  }

  static bool strides_match() {
    int64_t const stride = 768;
    StrideA a{};
    StrideB b{};
    cute::get<0>(a) = stride;
    cute::get<0>(b) = stride;
    return same_bytes(a, stride) && same_bytes(b, stride);
  }

 private:
  template <class To, class From>
  static void set(To& to, From from) {
    to = reinterpret_cast<To>(from);
  }

  // A property of the function on one device: done once for each.
  static cudaError_t raise_shared_memory_limit() {
    static std::atomic<uint64_t> done{0};
    int device = 0;
    if (cudaError_t status = cudaGetDevice(&device)) return status;
    uint64_t const bit = uint64_t(1) << (device & 63);
    if (done.load(std::memory_order_relaxed) & bit) return cudaSuccess;
    if (cudaError_t status = cudaFuncSetAttribute(collective_entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, Kernel::SharedStorageSize)) return status;
    done.fetch_or(bit);
    return cudaSuccess;
  }
};

}  // namespace moe
