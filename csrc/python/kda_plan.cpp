// The host-side planner, and the schedule of the CPU forward, as the Python module `kda_plan`, for tests and tools. It
// needs neither torch nor CUDA and is not part of the wheel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../kda/cpu/schedule.h"
#include "../kda/plan.h"

namespace py = pybind11;

PYBIND11_MODULE(kda_plan, m) {
  m.doc() = "Host-side planning of kda::chunk_fwd (csrc/kda/plan.h)";
  m.attr("CHUNK_TOKENS") = kda::kChunkTokens;
  m.attr("STEP_TOKENS") = kda::kStepTokens;

  py::enum_<kda::DataType>(m, "DataType")
      .value("bfloat16", kda::DataType::kBFloat16)
      .value("float16", kda::DataType::kFloat16)
      .value("float32", kda::DataType::kFloat32);

  py::enum_<kda::ChunkFwdPath>(m, "ChunkFwdPath")
      .value("composite", kda::ChunkFwdPath::kComposite)
      .value("staged", kda::ChunkFwdPath::kStaged)
      .value("fused", kda::ChunkFwdPath::kFused)
      .value("stepwise", kda::ChunkFwdPath::kStepwise)
      .value("fused_cut", kda::ChunkFwdPath::kFusedCut);

  const kda::ChunkFwdProblem defaults;
  py::class_<kda::ChunkFwdProblem>(m, "ChunkFwdProblem")
      .def(py::init([](int64_t batch, int64_t tokens, int64_t sequences, bool varlen, int heads, int value_heads,
                       int key_dim, int value_dim, kda::DataType activation_type, bool bounded_gate, bool contractive,
                       bool aligned_inputs, int compute_capability, int sm_count) {
             kda::ChunkFwdProblem p;
             p.batch = batch;
             p.tokens = tokens;
             p.sequences = sequences;
             p.varlen = varlen;
             p.heads = heads;
             p.value_heads = value_heads;
             p.key_dim = key_dim;
             p.value_dim = value_dim;
             p.activation_type = activation_type;
             p.bounded_gate = bounded_gate;
             p.contractive = contractive;
             p.aligned_inputs = aligned_inputs;
             p.compute_capability = compute_capability;
             p.sm_count = sm_count;
             return p;
           }),
           py::kw_only(), py::arg("batch") = defaults.batch, py::arg("tokens") = defaults.tokens,
           py::arg("sequences") = defaults.sequences, py::arg("varlen") = defaults.varlen,
           py::arg("heads") = defaults.heads, py::arg("value_heads") = defaults.value_heads,
           py::arg("key_dim") = defaults.key_dim, py::arg("value_dim") = defaults.value_dim,
           py::arg("activation_type") = defaults.activation_type, py::arg("bounded_gate") = defaults.bounded_gate,
           py::arg("contractive") = defaults.contractive, py::arg("aligned_inputs") = defaults.aligned_inputs,
           py::arg("compute_capability") = defaults.compute_capability, py::arg("sm_count") = defaults.sm_count)
      .def_readwrite("batch", &kda::ChunkFwdProblem::batch)
      .def_readwrite("tokens", &kda::ChunkFwdProblem::tokens)
      .def_readwrite("sequences", &kda::ChunkFwdProblem::sequences)
      .def_readwrite("varlen", &kda::ChunkFwdProblem::varlen)
      .def_readwrite("heads", &kda::ChunkFwdProblem::heads)
      .def_readwrite("value_heads", &kda::ChunkFwdProblem::value_heads)
      .def_readwrite("key_dim", &kda::ChunkFwdProblem::key_dim)
      .def_readwrite("value_dim", &kda::ChunkFwdProblem::value_dim)
      .def_readwrite("activation_type", &kda::ChunkFwdProblem::activation_type)
      .def_readwrite("bounded_gate", &kda::ChunkFwdProblem::bounded_gate)
      .def_readwrite("contractive", &kda::ChunkFwdProblem::contractive)
      .def_readwrite("aligned_inputs", &kda::ChunkFwdProblem::aligned_inputs)
      .def_readwrite("compute_capability", &kda::ChunkFwdProblem::compute_capability)
      .def_readwrite("sm_count", &kda::ChunkFwdProblem::sm_count);

  py::class_<kda::ChunkFwdWorkspace>(m, "ChunkFwdWorkspace")
      .def_readonly("W", &kda::ChunkFwdWorkspace::W)
      .def_readonly("K_decayed", &kda::ChunkFwdWorkspace::K_decayed)
      .def_readonly("Q_gated", &kda::ChunkFwdWorkspace::Q_gated)
      .def_readonly("Aqk", &kda::ChunkFwdWorkspace::Aqk)
      .def_readonly("U", &kda::ChunkFwdWorkspace::U)
      .def_readonly("state", &kda::ChunkFwdWorkspace::state)
      .def_readonly("chunk_decay", &kda::ChunkFwdWorkspace::chunk_decay)
      .def_readonly("handoff_states", &kda::ChunkFwdWorkspace::handoff_states)
      .def_readonly("handoff_flags", &kda::ChunkFwdWorkspace::handoff_flags)
      .def_readonly("left_chains", &kda::ChunkFwdWorkspace::left_chains)
      .def_readonly("step_images", &kda::ChunkFwdWorkspace::step_images)
      .def_readonly("segment_map", &kda::ChunkFwdWorkspace::segment_map)
      .def_readonly("segment_state", &kda::ChunkFwdWorkspace::segment_state)
      .def_readonly("segment_faded", &kda::ChunkFwdWorkspace::segment_faded)
      .def_readonly("total_bytes", &kda::ChunkFwdWorkspace::total_bytes);

  py::class_<kda::ChunkFwdPlan>(m, "ChunkFwdPlan")
      .def_readonly("path", &kda::ChunkFwdPlan::path)
      .def_readonly("reason", &kda::ChunkFwdPlan::reason)
      .def_readonly("chunk_slots", &kda::ChunkFwdPlan::chunk_slots)
      .def_readonly("step_slots", &kda::ChunkFwdPlan::step_slots)
      .def_readonly("value_tile", &kda::ChunkFwdPlan::value_tile)
      .def_readonly("clusters", &kda::ChunkFwdPlan::clusters)
      .def_readonly("segment_chunks", &kda::ChunkFwdPlan::segment_chunks)
      .def_readonly("segment_slots", &kda::ChunkFwdPlan::segment_slots)
      .def_readonly("workspace", &kda::ChunkFwdPlan::workspace);

  py::class_<kda::ChunkIntermediates>(m, "ChunkIntermediates")
      .def_readonly("W", &kda::ChunkIntermediates::W)
      .def_readonly("K_decayed", &kda::ChunkIntermediates::K_decayed)
      .def_readonly("Q_gated", &kda::ChunkIntermediates::Q_gated)
      .def_readonly("Aqk", &kda::ChunkIntermediates::Aqk)
      .def_readonly("U", &kda::ChunkIntermediates::U)
      .def_readonly("state", &kda::ChunkIntermediates::state)
      .def_readonly("chunk_decay", &kda::ChunkIntermediates::chunk_decay)
      .def_readonly("inverse", &kda::ChunkIntermediates::inverse)
      .def_readonly("U_low", &kda::ChunkIntermediates::U_low)
      .def_readonly("Q_gated_low", &kda::ChunkIntermediates::Q_gated_low)
      .def_readonly("total_bytes", &kda::ChunkIntermediates::total_bytes);

  py::class_<kda::SegmentRegions>(m, "SegmentRegions")
      .def_readonly("map", &kda::SegmentRegions::map)
      .def_readonly("transposed_map", &kda::SegmentRegions::transposed_map)
      .def_readonly("state", &kda::SegmentRegions::state)
      .def_readonly("dstate", &kda::SegmentRegions::dstate);

  py::class_<kda::ChunkSavingWorkspace>(m, "ChunkSavingWorkspace")
      .def_readonly("U0", &kda::ChunkSavingWorkspace::U0)
      .def_readonly("beta", &kda::ChunkSavingWorkspace::beta)
      .def_readonly("segments", &kda::ChunkSavingWorkspace::segments)
      .def_readonly("total_bytes", &kda::ChunkSavingWorkspace::total_bytes);

  py::class_<kda::ChunkBwdWorkspace>(m, "ChunkBwdWorkspace")
      .def_readonly("intermediates", &kda::ChunkBwdWorkspace::intermediates)
      .def_readonly("dstate", &kda::ChunkBwdWorkspace::dstate)
      .def_readonly("dU", &kda::ChunkBwdWorkspace::dU)
      .def_readonly("U0", &kda::ChunkBwdWorkspace::U0)
      .def_readonly("beta", &kda::ChunkBwdWorkspace::beta)
      .def_readonly("dstate_low", &kda::ChunkBwdWorkspace::dstate_low)
      .def_readonly("dU_low", &kda::ChunkBwdWorkspace::dU_low)
      .def_readonly("dA_log", &kda::ChunkBwdWorkspace::dA_log)
      .def_readonly("ddt_bias", &kda::ChunkBwdWorkspace::ddt_bias)
      .def_readonly("by_levels", &kda::ChunkBwdWorkspace::by_levels)
      .def_readonly("progress", &kda::ChunkBwdWorkspace::progress)
      .def_readonly("dq", &kda::ChunkBwdWorkspace::dq)
      .def_readonly("dk", &kda::ChunkBwdWorkspace::dk)
      .def_readonly("segments", &kda::ChunkBwdWorkspace::segments)
      .def_readonly("total_bytes", &kda::ChunkBwdWorkspace::total_bytes);

  py::class_<kda::ChunkBwdPlan>(m, "ChunkBwdPlan")
      .def_readonly("path", &kda::ChunkBwdPlan::path)
      .def_readonly("reason", &kda::ChunkBwdPlan::reason)
      .def_readonly("chunk_slots", &kda::ChunkBwdPlan::chunk_slots)
      .def_readonly("value_tile", &kda::ChunkBwdPlan::value_tile)
      .def_readonly("state_tile", &kda::ChunkBwdPlan::state_tile)
      .def_readonly("saved", &kda::ChunkBwdPlan::saved)
      .def_readonly("makes_values", &kda::ChunkBwdPlan::makes_values)
      .def_readonly("side_by_side", &kda::ChunkBwdPlan::side_by_side)
      .def_readonly("gradients_beside", &kda::ChunkBwdPlan::gradients_beside)
      .def_readonly("early_gradients", &kda::ChunkBwdPlan::early_gradients)
      .def_readonly("followed_ctas", &kda::ChunkBwdPlan::followed_ctas)
      .def_readonly("segment_chunks", &kda::ChunkBwdPlan::segment_chunks)
      .def_readonly("segment_slots", &kda::ChunkBwdPlan::segment_slots)
      .def_readonly("intermediates", &kda::ChunkBwdPlan::intermediates)
      .def_readonly("workspace", &kda::ChunkBwdPlan::workspace)
      .def_readonly("saving_workspace", &kda::ChunkBwdPlan::saving_workspace);

  m.def("chunk_slots", &kda::chunk_slots, py::arg("problem"));
  m.def("step_slots", &kda::step_slots, py::arg("problem"));
  m.def("step_image_bytes", &kda::step_image_bytes, py::arg("key_dim"));
  m.def("segment_slots", &kda::segment_slots, py::arg("problem"), py::arg("segment_chunks"));
  m.def(
      "plan_chunk_fwd",
      [](const kda::ChunkFwdProblem& problem, std::optional<kda::ChunkFwdPath> path, std::optional<int> value_tile,
         std::optional<int64_t> clusters, std::optional<int64_t> segment_chunks) {
        return kda::plan_chunk_fwd(problem, {path, value_tile, clusters, segment_chunks});
      },
      py::arg("problem"), py::kw_only(), py::arg("path") = py::none(), py::arg("value_tile") = py::none(),
      py::arg("clusters") = py::none(), py::arg("segment_chunks") = py::none());
  m.def("intermediate_bytes", &kda::intermediate_bytes, py::arg("problem"));
  m.def(
      "plan_chunk_bwd",
      [](const kda::ChunkFwdProblem& problem, bool activated_gate, bool saved, std::optional<int> value_tile,
         std::optional<int64_t> segment_chunks) {
        return kda::plan_chunk_bwd(problem, activated_gate, saved, {value_tile, segment_chunks});
      },
      py::arg("problem"), py::arg("activated_gate"), py::arg("saved") = false, py::kw_only(),
      py::arg("value_tile") = py::none(), py::arg("segment_chunks") = py::none());
  m.def(
      "to_json",
      [](const kda::ChunkFwdProblem& problem, const kda::ChunkFwdPlan& plan) { return kda::to_json(problem, plan); },
      py::arg("problem"), py::arg("plan"));
  m.def("to_json", [](const kda::ChunkBwdPlan& plan) { return kda::to_json(plan); }, py::arg("plan"));
  m.def(
      "shared_items",
      [](const std::vector<int64_t>& steps, int threads) {
        std::vector<kda::cpu::Item> items;
        for (int64_t count : steps) items.push_back({0, 0, count});
        return kda::cpu::shared_items(items, threads);
      },
      py::arg("steps"), py::arg("threads"));
}
