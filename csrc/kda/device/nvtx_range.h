// A named range on the timeline of Nsight Systems, for as long as the object lives:
//
//   kda::NvtxRange range("kda.intra_chunk_solve");
//
// Names are `kda.<stage>` in the library and `bench.<step>` in the benchmarks. NVTX is header-only and costs nothing
// when no profiler is attached; KDA_NO_NVTX compiles it out.
#pragma once

#include <cuda_runtime_api.h>

#ifndef KDA_NO_NVTX
#include <nvtx3/nvToolsExt.h>
#endif

namespace kda {

class NvtxRange {
 public:
#ifdef KDA_NO_NVTX
  explicit NvtxRange(const char*) {}
#else
  explicit NvtxRange(const char* name) { nvtxRangePushA(name); }
  ~NvtxRange() { nvtxRangePop(); }
#endif
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;
};

// What `launch` returns, which launches one kernel, under a range.
template <typename Launch>
auto run_stage(const char* name, Launch launch) {
  NvtxRange range(name);
  return launch();
}

// Stages one after the other, up to the first that cannot be launched.
struct StageSequence {
  cudaError_t status = cudaSuccess;

  template <typename Launch>
  void run(const char* name, Launch launch) {
    if (status == cudaSuccess) status = run_stage(name, launch);
  }
};

}  // namespace kda
