#include "build_info.h"

#include <algorithm>

#ifdef KDA_CUDA_WITH_KERNELS
#include <cuda_runtime_api.h>
#endif

namespace kda::binding {

namespace {

#ifdef KDA_CUDA_WITH_KERNELS
constexpr bool kHasKernels = true;
constexpr int kCudaVersion = CUDART_VERSION;
#else
constexpr bool kHasKernels = false;
constexpr int kCudaVersion = 0;
#endif

// "90a;100a" -> ["90a", "100a"]
std::string json_list(const std::string& names) {
  std::string list = "[";
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = std::min(names.find(';', begin), names.size());
    if (begin > 0) list += ", ";
    list += "\"" + names.substr(begin, end - begin) + "\"";
    begin = end + 1;
  }
  return list + "]";
}

}  // namespace

std::string build_info_json() {
  std::string json = "{\"version\": \"" KDA_CUDA_VERSION "\"";
  json += ", \"cuda_version\": " + std::to_string(kCudaVersion);
  json += ", \"architectures\": " + json_list(KDA_CUDA_ARCHITECTURES);
  json += ", \"torch_built_with\": \"" KDA_CUDA_TORCH_VERSION "\"";
  json += std::string(", \"cuda_kernels\": ") + (kHasKernels ? "true" : "false");
  return json + "}";
}

}  // namespace kda::binding
