// Programmatic dependent launch: how the kernels of a layer follow each other without gaps.
#pragma once
#include <cuda_runtime.h>

namespace moe {

// Every kernel of a layer lets its successor start early, so that the successor's launch hides behind it. A thread waits
// for the predecessor before it touches what that reads or writes, and no kernel ends without having waited: so "my
// predecessor has finished" implies that everything before it has, which makes early starts safe along the whole chain.
__device__ __forceinline__ void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void allow_successor_to_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

template <class... Params, class... Args>
cudaError_t launch_in_clusters(void (*kernel)(Params...), int grid, int cluster, int threads, int shared_bytes, void* stream, Args const&... args) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), int grid, int threads, int shared_bytes, void* stream, Args const&... args) {
  return launch_in_clusters(kernel, grid, 1, threads, shared_bytes, stream, args...);
}

}  // namespace moe
