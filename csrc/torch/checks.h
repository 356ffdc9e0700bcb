// Argument checks of the operators. A violation throws std::runtime_error, which Python sees as RuntimeError, with the
// message
//   kda::chunk_fwd: argument `beta`: expected shape [B, T, HV] = [2, 64, 4], got [2, 64, 8]
#pragma once

#include "arguments.h"

namespace kda::binding {

// Everything that is wrong whatever computes the call. Reads the contents of cu_seqlens where that costs nothing (on
// the CPU) or where check_cu_seqlens asks for it; reads no other contents. With padding_allowed they may end before T.
void check_chunk_fwd(const ChunkFwdArguments& args, bool padding_allowed = false);

// The same for the gradients of the outputs, and for the call that they belong to.
void check_chunk_bwd(const ChunkBwdArguments& args);

// A cu_seqlens by itself: one row of int32 or int64 whose first value is 0, none smaller than the one before, the last
// `tokens`. If it is not on the host it is copied there, which waits for the device.
void check_cu_seqlens(const Tensor& cu_seqlens, int64_t tokens);

}  // namespace kda::binding
