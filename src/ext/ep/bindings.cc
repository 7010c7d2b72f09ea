// The Python module mscclpp_ep_cpp: the C++ API one to one. mscclpp.ext.ep (python/) gives it
// deep_ep's shape.
#include "bindings.hpp"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/ext/ep/buffer.hpp>
#include <mscclpp/ext/ep/types.hpp>
#include <mscclpp/format.hpp>

namespace mscclpp::ep {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

/// Raises the Python class that belongs to the code; the message is passed on unchanged.
void raise(const Error& error) {
  try {
    nb::dict details;
    if (const auto* peer = dynamic_cast<const PeerError*>(&error)) details["rank"] = peer->rank();
    if (const auto* cuda = dynamic_cast<const CudaError*>(&error)) {
      details["cuda_code"] = cuda->cudaCode();
    }
    if (const auto* call = dynamic_cast<const SystemError*>(&error)) {
      details["errno"] = call->errnoValue();
    }
    const nb::object made = nb::module_::import_("mscclpp.ext.ep.errors")
                                .attr("make_error")(nb::str(toString(error.code()).data()),
                                                    nb::str(error.what()), details);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(made.ptr())), made.ptr());
  } catch (const nb::python_error&) {  // the module is used without the package
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

void translateErrors(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const Error& error) {
    raise(error);
  }
}

std::vector<int> fieldsOf(const Config& c) {
  return {c.numSms, c.numMaxNvlChunkedSendTokens, c.numMaxNvlChunkedRecvTokens,
          c.numMaxRdmaChunkedSendTokens, c.numMaxRdmaChunkedRecvTokens};
}

void bindConfig(nb::module_& m) {
  nb::class_<Config>(m, "Config")
      .def(
          "__init__",
          [](Config* self, int sms, int nvlSend, int nvlRecv, int rdmaSend, int rdmaRecv) {
            const Config config{sms, nvlSend, nvlRecv, rdmaSend, rdmaRecv};
            config.validate();
            new (self) Config(config);
          },
          "num_sms"_a = 20, "num_max_nvl_chunked_send_tokens"_a = 6,
          "num_max_nvl_chunked_recv_tokens"_a = 256, "num_max_rdma_chunked_send_tokens"_a = 6,
          "num_max_rdma_chunked_recv_tokens"_a = 256)
      .def_ro("num_sms", &Config::numSms)
      .def_ro("num_max_nvl_chunked_send_tokens", &Config::numMaxNvlChunkedSendTokens)
      .def_ro("num_max_nvl_chunked_recv_tokens", &Config::numMaxNvlChunkedRecvTokens)
      .def_ro("num_max_rdma_chunked_send_tokens", &Config::numMaxRdmaChunkedSendTokens)
      .def_ro("num_max_rdma_chunked_recv_tokens", &Config::numMaxRdmaChunkedRecvTokens)
      .def("get_nvl_buffer_size_hint", &Config::nvlBufferSizeHint, "hidden_bytes"_a, "num_ranks"_a)
      .def("get_rdma_buffer_size_hint", &Config::rdmaBufferSizeHint, "hidden_bytes"_a,
           "num_ranks"_a)
      .def("__reduce__",
           [](nb::object self) {
             const nb::object fields = nb::cast(fieldsOf(nb::cast<const Config&>(self)));
             return nb::make_tuple(self.type(), nb::tuple(fields));
           })
      .def("__hash__", [](const Config& c) { return nb::hash(nb::tuple(nb::cast(fieldsOf(c)))); })
      .def("__eq__",
           [](const Config& a, nb::handle b) {
             return nb::isinstance<Config>(b) && fieldsOf(a) == fieldsOf(nb::cast<Config&>(b));
           })
      .def("__repr__", [](const Config& c) {
        return fmt::format(
            "Config(num_sms={}, num_max_nvl_chunked_send_tokens={}, "
            "num_max_nvl_chunked_recv_tokens={}, num_max_rdma_chunked_send_tokens={}, "
            "num_max_rdma_chunked_recv_tokens={})",
            c.numSms, c.numMaxNvlChunkedSendTokens, c.numMaxNvlChunkedRecvTokens,
            c.numMaxRdmaChunkedSendTokens, c.numMaxRdmaChunkedRecvTokens);
      });
}

void bindRequests(nb::module_& m) {
  nb::class_<StreamOrder>(m, "StreamOrder")
      .def(
          "__init__",
          [](StreamOrder* self, std::uintptr_t stream, const Event& previous, bool async,
             bool allocateOnComm) {
            new (self) StreamOrder{pointer(stream), previous, async, allocateOnComm};
          },
          "compute_stream"_a = 0, "previous_event"_a = Event(), "async_finish"_a = false,
          "allocate_on_comm_stream"_a = false);
  nb::class_<ExpertMap>(m, "ExpertMap");
  nb::class_<DispatchHandle>(m, "DispatchHandle")
      .def_prop_ro("num_tokens", &DispatchHandle::numTokens)
      .def_prop_ro("num_recv_tokens", &DispatchHandle::numRecvTokens)
      .def("recv_source_tokens", &DispatchHandle::recvSourceTokens)
      .def("rank_offsets", &DispatchHandle::rankOffsets);

  nb::class_<LayoutRequest>(m, "LayoutRequest")
      .def(nb::init<>())
      .def_rw("topk_idx", &LayoutRequest::topkIdx)
      .def_rw("num_experts", &LayoutRequest::numExperts)
      .def_rw("expert_map", &LayoutRequest::expertMap)
      .def_rw("order", &LayoutRequest::order);
  nb::class_<LayoutResult>(m, "LayoutResult")
      .def_ro("num_tokens_per_rank", &LayoutResult::numTokensPerRank)
      .def_ro("num_tokens_per_rdma_rank", &LayoutResult::numTokensPerRdmaRank)
      .def_ro("num_tokens_per_expert", &LayoutResult::numTokensPerExpert)
      .def_ro("is_token_in_rank", &LayoutResult::isTokenInRank)
      .def_ro("event", &LayoutResult::event, kOnItsOwn);
  nb::class_<DispatchRequest>(m, "DispatchRequest")
      .def(nb::init<>())
      .def_rw("x", &DispatchRequest::x)
      .def_rw("x_scales", &DispatchRequest::xScales)
      .def_rw("handle", &DispatchRequest::handle)
      .def_rw("is_token_in_rank", &DispatchRequest::isTokenInRank)
      .def_rw("num_tokens_per_rank", &DispatchRequest::numTokensPerRank)
      .def_rw("num_tokens_per_rdma_rank", &DispatchRequest::numTokensPerRdmaRank)
      .def_rw("num_tokens_per_expert", &DispatchRequest::numTokensPerExpert)
      .def_rw("topk_idx", &DispatchRequest::topkIdx)
      .def_rw("topk_weights", &DispatchRequest::topkWeights)
      .def_rw("expert_map", &DispatchRequest::expertMap)
      .def_rw("expert_alignment", &DispatchRequest::expertAlignment)
      .def_rw("num_worst_tokens", &DispatchRequest::numWorstTokens)
      .def_rw("config", &DispatchRequest::config)
      .def_rw("order", &DispatchRequest::order);
  nb::class_<DispatchResult>(m, "DispatchResult")
      .def_ro("recv_x", &DispatchResult::recvX)
      .def_ro("recv_x_scales", &DispatchResult::recvXScales)
      .def_ro("recv_topk_idx", &DispatchResult::recvTopkIdx)
      .def_ro("recv_topk_weights", &DispatchResult::recvTopkWeights)
      .def_ro("num_recv_tokens_per_expert", &DispatchResult::numRecvTokensPerExpert)
      .def_ro("recv_tokens_per_expert", &DispatchResult::recvTokensPerExpert)
      .def_ro("handle", &DispatchResult::handle, kOnItsOwn)
      .def_ro("event", &DispatchResult::event, kOnItsOwn);
  nb::class_<CombineRequest>(m, "CombineRequest")
      .def(nb::init<>())
      .def_rw("x", &CombineRequest::x)
      .def_rw("handle", &CombineRequest::handle)
      .def_rw("topk_weights", &CombineRequest::topkWeights)
      .def_rw("bias_0", &CombineRequest::bias0)
      .def_rw("bias_1", &CombineRequest::bias1)
      .def_rw("config", &CombineRequest::config)
      .def_rw("order", &CombineRequest::order);
  nb::class_<CombineResult>(m, "CombineResult")
      .def_ro("x", &CombineResult::x)
      .def_ro("topk_weights", &CombineResult::topkWeights)
      .def_ro("event", &CombineResult::event, kOnItsOwn);
}

void bindBuffer(nb::module_& m) {
  nb::class_<BufferOptions>(m, "BufferOptions")
      .def(nb::init<>())
      .def_rw("platform", &BufferOptions::platform)
      .def_rw("device_index", &BufferOptions::deviceIndex)
      .def_rw("num_nvl_bytes", &BufferOptions::numNvlBytes)
      .def_rw("num_rdma_bytes", &BufferOptions::numRdmaBytes)
      .def_rw("low_latency_mode", &BufferOptions::lowLatencyMode)
      .def_rw("enable_shrink", &BufferOptions::enableShrink)
      .def_rw("staging_bytes", &BufferOptions::stagingBytes)
      .def_rw("max_experts_per_rank", &BufferOptions::maxExpertsPerRank)
      .def_rw("timeout_seconds", &BufferOptions::timeoutSeconds)
      .def_rw("first_epoch", &BufferOptions::firstEpoch)
      .def_prop_rw(
          "ranks_per_node", [](const BufferOptions& o) { return o.topology.ranksPerNode; },
          [](BufferOptions& o, std::optional<int> n) { o.topology.ranksPerNode = n; },
          nb::for_setter(nb::arg().none()))
      .def_prop_rw(
          "transport",
          [](const BufferOptions& o) {
            return o.topology.transport
                       ? std::optional(std::string(toString(*o.topology.transport)))
                       : std::nullopt;
          },
          [](BufferOptions& o, const std::optional<std::string>& name) {
            o.topology.transport = name ? std::optional(parseTransport(*name)) : std::nullopt;
          },
          nb::for_setter(nb::arg().none()));
  using Self = const PythonBuffer&;
  nb::class_<PythonBuffer> buffer(m, "Buffer");
  bindLowLatencyCalls(buffer);
  buffer
      .def(nb::init<std::shared_ptr<Bootstrap>, const BufferOptions&>(), "bootstrap"_a, "options"_a,
           ReleaseGil())
      .def(
          "destroy", [](Self b) { b.buffer->destroy(); }, ReleaseGil())
      .def(
          "get_dispatch_layout",
          [](Self b, const LayoutRequest& r) { return b.buffer->getDispatchLayout(r); },
          "request"_a, ReleaseGil())
      .def(
          "dispatch", [](Self b, const DispatchRequest& r) { return b.buffer->dispatch(r); },
          "request"_a, ReleaseGil())
      .def(
          "combine", [](Self b, const CombineRequest& r) { return b.buffer->combine(r); },
          "request"_a, ReleaseGil())
      .def(
          "create_tensor",
          [](Self b, DType dtype, std::vector<std::int64_t> shape, std::uintptr_t stream) {
            return b.buffer->createTensor(dtype, std::move(shape), pointer(stream));
          },
          "dtype"_a, "shape"_a, "compute_stream"_a = 0, ReleaseGil())
      .def(
          "in_pool", [](Self b, const Tensor& t) { return b.buffer->inPool(t); }, "tensor"_a)
      .def("pool_bytes_free", [](Self b) { return b.buffer->poolBytesFree(); })
      .def(
          "create_expert_map",
          [](Self b, const std::vector<int>& hosts) { return b.buffer->createExpertMap(hosts); },
          "rank_of_expert"_a, ReleaseGil())
      .def("comm_stream",
           [](Self b) { return reinterpret_cast<std::uintptr_t>(b.buffer->commStream()); })
      .def(
          "check_health", [](Self b) { b.buffer->checkHealth(); }, ReleaseGil());
}

NB_MODULE(mscclpp_ep_cpp, m) {
  m.doc() = "C++ part of mscclpp.ext.ep: expert-parallel dispatch and combine";
  // At interpreter exit Python keeps what globals refer to; that is no leak of this module.
  nb::set_leak_warnings(false);
  nb::register_exception_translator(translateErrors);
  bindTensor(m);
  bindPlatform(m);
  bindBootstrap(m);
  bindConfig(m);
  bindRequests(m);
  bindLowLatency(m);
  bindBuffer(m);
}

}  // namespace
}  // namespace mscclpp::ep
