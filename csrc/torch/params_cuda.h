// From checked tensors to what the CUDA kernels take, for both passes.
#pragma once

#include "arguments.h"
#include "kda/kda.h"
#include "outputs.h"

namespace kda::binding {

// Copies small arguments that are not packed (A_log, dt_bias, cu_seqlens).
void make_parameters_packed(ChunkFwdArguments& args);

// Everything of the parameters but outputs and workspace. The arguments must outlive their use on the stream.
[[nodiscard]] ChunkFwdParams input_params(const ChunkFwdArguments& args, const ChunkFwdProblem& problem);

// Everything but the workspace. Clears, on the stream, slots of chunk_states that the kernels leave as they are.
[[nodiscard]] ChunkFwdParams forward_params(const ChunkFwdArguments& args, const ChunkFwdProblem& problem,
                                            const Outputs& outputs, cudaStream_t stream);

}  // namespace kda::binding
