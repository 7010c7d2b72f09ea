// The low-latency calls for Python, one to one; python/mscclpp/ext/ep/low_latency.py gives them
// deep_ep's shape.
#include <cstdint>

#include <mscclpp/errors.hpp>
#include <mscclpp/ext/ep/buffer.hpp>
#include <mscclpp/ext/ep/low_latency.hpp>

#include "bindings.hpp"

namespace mscclpp::ep {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

using DispatchOutputs = LowLatencyDispatchRequest::Outputs;

/// The receive half. Drops what it holds, the caller's tensors too, with its Python object.
template <class Result>
void receive(const Result& result, std::uintptr_t computeStream) {
  check(static_cast<bool>(result.hook), ErrorCode::invalidState,
        "the call was made without return_recv_hook: there is no receive half to call");
  result.hook(pointer(computeStream));
}

void bindDispatch(nb::module_& m) {
  nb::class_<DispatchOutputs>(m, "LowLatencyDispatchOutputs")
      .def(nb::init<>())
      .def_rw("recv_x", &DispatchOutputs::recvX)
      .def_rw("recv_x_scales", &DispatchOutputs::recvXScales)
      .def_rw("recv_count", &DispatchOutputs::recvCount)
      .def_rw("source_info", &DispatchOutputs::sourceInfo)
      .def_rw("layout_range", &DispatchOutputs::layoutRange)
      .def_rw("slots", &DispatchOutputs::slots)
      .def_rw("source_tokens", &DispatchOutputs::sourceTokens)
      .def_rw("row_table", &DispatchOutputs::rowTable);
  nb::class_<LowLatencyDispatchRequest>(m, "LowLatencyDispatchRequest")
      .def(nb::init<>())
      .def_rw("x", &LowLatencyDispatchRequest::x)
      .def_rw("topk_idx", &LowLatencyDispatchRequest::topkIdx)
      .def_rw("max_tokens", &LowLatencyDispatchRequest::maxTokens)
      .def_rw("experts", &LowLatencyDispatchRequest::experts)
      .def_rw("use_fp8", &LowLatencyDispatchRequest::useFp8)
      .def_rw("round_scale", &LowLatencyDispatchRequest::roundScale)
      .def_rw("use_ue8m0", &LowLatencyDispatchRequest::useUe8m0)
      .def_rw("return_recv_hook", &LowLatencyDispatchRequest::returnRecvHook)
      .def_rw("expert_totals", &LowLatencyDispatchRequest::expertTotals)
      .def_rw("wait_totals", &LowLatencyDispatchRequest::waitTotals)
      .def_rw("num_sms", &LowLatencyDispatchRequest::numSms)
      .def_rw("outputs", &LowLatencyDispatchRequest::outputs)
      .def_rw("order", &LowLatencyDispatchRequest::order);
  nb::class_<LowLatencyDispatchResult>(m, "LowLatencyDispatchResult")
      .def_ro("recv_x", &LowLatencyDispatchResult::recvX)
      .def_ro("recv_x_scales", &LowLatencyDispatchResult::recvXScales)
      .def_ro("recv_count", &LowLatencyDispatchResult::recvCount)
      .def_ro("handle", &LowLatencyDispatchResult::handle, kOnItsOwn)
      .def_ro("event", &LowLatencyDispatchResult::event, kOnItsOwn)
      .def("receive", &receive<LowLatencyDispatchResult>, "compute_stream"_a = 0, ReleaseGil());
}

void bindCombine(nb::module_& m) {
  nb::enum_<LowLatencyReduce>(m, "LowLatencyReduce")
      .value("rank", LowLatencyReduce::rank)
      .value("source", LowLatencyReduce::source);
  nb::class_<LowLatencyCombineRequest>(m, "LowLatencyCombineRequest")
      .def(nb::init<>())
      .def_rw("x", &LowLatencyCombineRequest::x)
      .def_rw("topk_idx", &LowLatencyCombineRequest::topkIdx)
      .def_rw("topk_weights", &LowLatencyCombineRequest::topkWeights)
      .def_rw("handle", &LowLatencyCombineRequest::handle)
      .def_rw("use_logfmt", &LowLatencyCombineRequest::useLogfmt)
      .def_rw("reduce", &LowLatencyCombineRequest::reduce)
      .def_rw("return_recv_hook", &LowLatencyCombineRequest::returnRecvHook)
      .def_rw("wait_totals", &LowLatencyCombineRequest::waitTotals)
      .def_rw("num_sms", &LowLatencyCombineRequest::numSms)
      .def_rw("out", &LowLatencyCombineRequest::out)
      .def_rw("order", &LowLatencyCombineRequest::order);
  nb::class_<LowLatencyCombineResult>(m, "LowLatencyCombineResult")
      .def_ro("x", &LowLatencyCombineResult::x)
      .def_ro("event", &LowLatencyCombineResult::event, kOnItsOwn)
      .def("receive", &receive<LowLatencyCombineResult>, "compute_stream"_a = 0, ReleaseGil());
}

}  // namespace

void bindLowLatency(nb::module_& m) {
  nb::class_<LowLatencyHandle>(m, "LowLatencyHandle");
  bindDispatch(m);
  bindCombine(m);
  m.def(
      "low_latency_size_hint",
      [](int maxTokens, int hidden, int ranks, int experts, LowLatencyReduce reduce, int topk,
         bool spansNodes) {
        return lowLatencySizeHint(maxTokens, hidden, ranks, experts,
                                  {.reduce = reduce, .topk = topk, .spansNodes = spansNodes});
      },
      "max_tokens"_a, "hidden"_a, "ranks"_a, "experts"_a, "reduce"_a, "topk"_a, "spans_nodes"_a);
}

void bindLowLatencyCalls(nb::class_<PythonBuffer>& buffer) {
  using Self = const PythonBuffer&;
  buffer
      .def(
          "low_latency_dispatch",
          [](Self b, const LowLatencyDispatchRequest& r) {
            return b.buffer->lowLatencyDispatch(r);
          },
          "request"_a, ReleaseGil())
      .def(
          "low_latency_combine",
          [](Self b, const LowLatencyCombineRequest& r) { return b.buffer->lowLatencyCombine(r); },
          "request"_a, ReleaseGil())
      .def(
          "update_low_latency_mask",
          [](Self b, int rank, bool masked) { b.buffer->updateLowLatencyMask(rank, masked); },
          "rank"_a, "masked"_a, ReleaseGil())
      .def(
          "clean_low_latency_mask", [](Self b) { b.buffer->cleanLowLatencyMask(); }, ReleaseGil())
      .def(
          "query_low_latency_mask",
          [](Self b, const Tensor& mask, const StreamOrder& order) {
            b.buffer->queryLowLatencyMask(mask, order);
          },
          "mask"_a, "order"_a, ReleaseGil());
}

}  // namespace mscclpp::ep
