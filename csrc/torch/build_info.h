// How the library was built.
#pragma once

#include <string>

namespace kda::binding {

// {"version": "0.1.0", "cuda_version": 13000, "architectures": ["90a"], "torch_built_with": "2.13.0", "cuda_kernels":
// true} cuda_version is that of the CUDA runtime inside the library, major * 1000 + minor * 10; 0 without kernels.
[[nodiscard]] std::string build_info_json();

}  // namespace kda::binding
