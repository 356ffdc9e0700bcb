#include "../kda.h"

namespace kda {
cudaError_t chunk_fwd(const ChunkFwdParams&, const ChunkFwdPlan&, cudaStream_t) { return cudaErrorNotSupported; }
} // namespace kda
