// The schema of the operators: the one place that states their names, arguments, defaults and returns.
#pragma once

namespace kda::binding {

// What all variants of the forward take. The order is that of ChunkFwdArguments and of the Python implementations.
#define KDA_CHUNK_FWD_ARGUMENTS                                                                               \
  "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log=None, Tensor? dt_bias=None, "           \
  "Tensor? initial_state=None, Tensor? cu_seqlens=None, float? scale=None, float? lower_bound=None, "         \
  "bool use_qk_l2norm=False, bool use_gate=False, bool use_beta_sigmoid=False, bool allow_neg_eigval=False, " \
  "bool output_final_state=False, bool state_v_first=False, bool output_chunk_states=False, "                 \
  "bool check_cu_seqlens=False"

// What all variants of the backward take and return. The order is that of ChunkBwdArguments.
#define KDA_CHUNK_BWD_ARGUMENTS                                                                                \
  "Tensor do, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log=None, " \
  "Tensor? dt_bias=None, Tensor? initial_state=None, Tensor? cu_seqlens=None, float? scale=None, "             \
  "float? lower_bound=None, bool use_qk_l2norm=False, bool use_gate=False, bool use_beta_sigmoid=False, "      \
  "bool allow_neg_eigval=False, bool state_v_first=False, Tensor? intermediates=None"
#define KDA_CHUNK_BWD_RETURNS                                                                   \
  "(Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dA_log, Tensor ddt_bias, " \
  "Tensor dinitial_state)"

inline constexpr const char* kSchemas[] = {
    // The forward: by kernels where they cover the call, on CUDA and on the CPU, else by the composite implementation.
    "chunk_fwd(" KDA_CHUNK_FWD_ARGUMENTS ") -> (Tensor o, Tensor final_state, Tensor chunk_states)",

    // The forward where no gradient is wanted: the same kernels, nothing of this project at the Autograd keys.
    "inference_chunk_fwd(" KDA_CHUNK_FWD_ARGUMENTS ") -> (Tensor o, Tensor final_state, Tensor chunk_states)",

    // The forward that also returns what chunk_bwd would compute again, as bytes: only for it, with the same inputs. None
    // ([0]) where no CUDA kernel could have it: on other devices, and for types that kernels do not take.
    "chunk_fwd_saving(" KDA_CHUNK_FWD_ARGUMENTS
    ") -> (Tensor o, Tensor final_state, Tensor chunk_states, Tensor intermediates)",

    // The forward by CUDA kernels and nothing else, as planned with what is fixed here; for tests and measurements.
    // path: stepwise, fused_cut, fused or staged; empty: as chunk_fwd. segment_chunks: chunks of a segment of the first two,
    // 0: no cut; the others have none. value_tile: V columns of a CTA of the recurrence of the staged path. clusters: at most
    // so many in the grid of the fused kernel, cut or not. What the path cannot do is refused.
    "chunk_fwd_planned(" KDA_CHUNK_FWD_ARGUMENTS
    ", str path=\"\", int? segment_chunks=None, int? value_tile=None, int? clusters=None) -> "
    "(Tensor o, Tensor final_state, Tensor chunk_states)",

    // The composite implementation of the forward: on the CPU that of chunk_fwd, elsewhere PyTorch operators.
    "chunk_fwd_composite(" KDA_CHUNK_FWD_ARGUMENTS ") -> (Tensor o, Tensor final_state, Tensor chunk_states)",

    // The forward on the CPU in C++, which chunk_fwd takes there for all but float64. cu_seqlens may end before T:
    // tokens behind it get o = 0. instruction_set: baseline, avx2 or avx512; empty: the best that this machine has.
    "chunk_fwd_cpu(" KDA_CHUNK_FWD_ARGUMENTS
    ", str instruction_set=\"\") -> "
    "(Tensor o, Tensor final_state, Tensor chunk_states)",

    // Refuses arguments that chunk_fwd must refuse; does nothing else.
    "check_chunk_fwd(" KDA_CHUNK_FWD_ARGUMENTS ") -> ()",

    // Why no kernel covers a call whose arguments are right, as a clause; empty if one does, and on the CPU.
    "composite_reason(" KDA_CHUNK_FWD_ARGUMENTS ") -> str",

    // Refuses cu_seqlens on the host that do not cut `tokens` tokens into sequences.
    "check_cu_seqlens(Tensor cu_seqlens, SymInt tokens) -> ()",

    // The gradients of chunk_fwd, by kernels where they cover the call, else by the composite implementation. Those of
    // absent inputs are empty, of shape [0]. intermediates: those of chunk_fwd_saving; what is not given is computed.
    "chunk_bwd(" KDA_CHUNK_BWD_ARGUMENTS ") -> " KDA_CHUNK_BWD_RETURNS,

    // The gradients by CUDA kernels and nothing else, as planned with what is fixed here; for tests and measurements.
    // segment_chunks: chunks of a segment of the recurrences, 0: no cut. value_tile: V columns of a CTA of uncut ones.
    "chunk_bwd_planned(" KDA_CHUNK_BWD_ARGUMENTS
    ", int? segment_chunks=None, int? value_tile=None) -> " KDA_CHUNK_BWD_RETURNS,

    // The gradients by PyTorch operators, on every device.
    "chunk_bwd_composite(" KDA_CHUNK_BWD_ARGUMENTS ") -> " KDA_CHUNK_BWD_RETURNS,

    // Refuses arguments that chunk_bwd must refuse; does nothing else.
    "check_chunk_bwd(" KDA_CHUNK_BWD_ARGUMENTS ") -> ()",

    // The path and the cut that the planner chooses, as JSON, for inputs that are aligned. With varlen `lengths` are those
    // of the sequences, else it is the one length of all `batch` sequences. compute_capability is major * 10 + minor, 0
    // without a CUDA device. bounded_gate: with use_gate and lower_bound. contractive: with use_qk_l2norm and
    // use_beta_sigmoid.
    "plan_chunk_fwd(int[] lengths, int batch, int heads, int value_heads, int key_dim, int value_dim, "
    "str activation_dtype, bool varlen, int compute_capability, int sm_count, bool bounded_gate=True, "
    "bool contractive=True) -> str",

    // The same of chunk_bwd. activated_gate: with use_gate. saved: with the intermediates of chunk_fwd_saving.
    "plan_chunk_bwd(int[] lengths, int batch, int heads, int value_heads, int key_dim, int value_dim, "
    "str activation_dtype, bool varlen, int compute_capability, int sm_count, bool activated_gate=True, "
    "bool saved=False) -> str",

    // How the library was built, as JSON.
    "build_info() -> str",
};

}  // namespace kda::binding
