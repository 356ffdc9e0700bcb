// Argument checks of the operators. A violation throws std::runtime_error, which Python sees as RuntimeError, with the
// message
//   kda::chunk_fwd: argument `beta`: expected shape [B, T, HV] = [2, 64, 4], got [2, 64, 8]
#pragma once

#include "arguments.h"

namespace kda::binding {

// Everything that is wrong whatever computes the call. Reads the contents of cu_seqlens where that costs nothing (on
// the CPU) or where check_cu_seqlens asks for it; reads no other contents.
void check_chunk_fwd(const ChunkFwdArguments& args);

// Values of cu_seqlens: the first is 0, none is smaller than the one before, the last is `tokens`. Copies them to the
// host if they are elsewhere, which waits for the device.
void check_cu_seqlens_values(const Tensor& cu_seqlens, int64_t tokens);

}  // namespace kda::binding
