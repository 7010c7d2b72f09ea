// The Python module mscclpp_ep_cpp: the C++ API one to one, tensors in and out by DLPack. The only
// file that knows Python. mscclpp.ext.ep (python/) gives it deep_ep's shape.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/operators.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/ext/ep/buffer.hpp>
#include <mscclpp/ext/ep/types.hpp>
#include <mscclpp/platform.hpp>

#ifndef MSCCLPP_CUDA_ARCHS
#define MSCCLPP_CUDA_ARCHS ""
#endif

namespace mscclpp::ep {
namespace {

namespace nb = nanobind;
using namespace nb::literals;
using ReleaseGil = nb::call_guard<nb::gil_scoped_release>;

// ---- errors ------------------------------------------------------------------------------------

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

// ---- tensors -----------------------------------------------------------------------------------

nb::dlpack::dtype dlpackType(DType dtype) {
  using Code = nb::dlpack::dtype_code;
  const auto make = [&](Code code) {
    return nb::dlpack::dtype{static_cast<std::uint8_t>(code),
                             static_cast<std::uint8_t>(sizeOf(dtype) * 8), 1};
  };
  switch (dtype) {
    case DType::bf16:
      return make(Code::Bfloat);
    case DType::f32:
      return make(Code::Float);
    case DType::i32:
    case DType::i64:
      return make(Code::Int);
    case DType::e4m3:  // frameworks disagree on the code for float8: it crosses as bytes
    case DType::u8:
      return make(Code::UInt);
  }
  fail(ErrorCode::internal, "no DLPack type for {}", nameOf(dtype));
}

DType dtypeOf(nb::dlpack::dtype type) {
  constexpr auto kBool = static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bool);
  if (type.code == kBool && type.bits == 8) return DType::u8;
  for (const DType dtype : {DType::bf16, DType::f32, DType::i32, DType::i64, DType::u8}) {
    if (type == dlpackType(dtype)) return dtype;
  }
  fail(ErrorCode::invalidArgument,
       "DLPack type (code {}, {} bits, {} lanes) is not supported: use bfloat16, float32, int32, "
       "int64 or uint8 (float8_e4m3fn: pass its bytes and dtype=e4m3)",
       type.code, type.bits, type.lanes);
}

/// `array` stays alive as long as the Tensor. `dtype`: what the bytes mean, when it is not what
/// DLPack says.
Tensor importTensor(nb::ndarray<nb::ro> array, std::optional<DType> dtype) {
  Tensor tensor;
  tensor.present = true;
  tensor.dtype = dtypeOf(array.dtype());
  if (dtype) {
    check(sizeOf(*dtype) == sizeOf(tensor.dtype), ErrorCode::invalidArgument,
          "a tensor of {} cannot be read as {}: the element sizes differ", nameOf(tensor.dtype),
          nameOf(*dtype));
    tensor.dtype = *dtype;
  }
  const int device = array.device_type();
  check(device == nb::device::cpu::value || device == nb::device::cuda::value ||
            device == nb::device::cuda_host::value,
        ErrorCode::invalidArgument, "DLPack device type {} is neither a CPU nor a CUDA device",
        device);
  tensor.platform = device == nb::device::cuda::value ? Platform::cuda : Platform::cpu;
  tensor.deviceIndex = tensor.platform == Platform::cuda ? array.device_id() : 0;
  for (std::size_t i = 0; i < array.ndim(); ++i) {
    tensor.shape.push_back(static_cast<std::int64_t>(array.shape(i)));
    tensor.strides.push_back(array.stride(i));
  }
  tensor.data = const_cast<void*>(static_cast<const void*>(array.data()));
  tensor.owner = std::make_shared<nb::ndarray<nb::ro>>(std::move(array));
  return tensor;
}

/// A DLPack capsule that shares the tensor's memory. No stream is synchronised.
nb::ndarray<> exportTensor(const Tensor& tensor) {
  check(static_cast<bool>(tensor), ErrorCode::invalidArgument, "an absent tensor has no memory");
  const std::vector<std::size_t> shape(tensor.shape.begin(), tensor.shape.end());
  auto owner = std::make_unique<std::shared_ptr<void>>(tensor.owner);
  const nb::capsule capsule(owner.get(), [](void* p) noexcept {
    delete static_cast<std::shared_ptr<void>*>(p);
  });
  owner.release();
  const bool cuda = tensor.platform == Platform::cuda;
  return nb::ndarray<>(tensor.data, shape.size(), shape.data(), capsule,
                       tensor.strides.empty() ? nullptr : tensor.strides.data(),
                       dlpackType(tensor.dtype),
                       cuda ? nb::device::cuda::value : nb::device::cpu::value, tensor.deviceIndex);
}

void bindTensor(nb::module_& m) {
  nb::enum_<DType>(m, "DType")
      .value("bf16", DType::bf16)
      .value("e4m3", DType::e4m3)
      .value("f32", DType::f32)
      .value("i32", DType::i32)
      .value("i64", DType::i64)
      .value("u8", DType::u8);
  nb::class_<Tensor>(m, "Tensor")
      .def(
          "__init__",
          [](Tensor* self, nb::ndarray<nb::ro> array, std::optional<DType> dtype) {
            new (self) Tensor(importTensor(std::move(array), dtype));
          },
          "array"_a, "dtype"_a = nb::none())
      .def("to_dlpack", &exportTensor)
      .def_prop_ro("dtype", [](const Tensor& t) { return t.dtype; })
      .def_prop_ro("shape", [](const Tensor& t) { return nb::tuple(nb::cast(t.shape)); })
      .def_prop_ro("data_ptr",
                   [](const Tensor& t) { return reinterpret_cast<std::uintptr_t>(t.data); })
      .def("__bool__", [](const Tensor& t) { return static_cast<bool>(t); })
      .def("__repr__", [](const Tensor& t) { return "<Tensor " + t.describe() + ">"; });
}

// ---- devices, events, bootstrap ----------------------------------------------------------------

void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

void bindPlatform(nb::module_& m) {
  nb::enum_<Platform>(m, "Platform").value("cpu", Platform::cpu).value("cuda", Platform::cuda);
  nb::class_<Event>(m, "Event")
      .def(nb::init<>())
      .def("__bool__", [](const Event& e) { return static_cast<bool>(e); })
      .def("query", &Event::query)
      .def("synchronize", &Event::synchronize, ReleaseGil())
      .def("elapsed_ms", &Event::elapsedMs, "since"_a);
  nb::class_<Device>(m, "Device")
      .def_static("open", &Device::open, "platform"_a, "index"_a = 0, ReleaseGil())
      .def_static("count", &Device::count, "platform"_a)
      .def_prop_ro("platform", &Device::platform)
      .def_prop_ro("index", &Device::index)
      .def("describe", &Device::describe)
      // The stream is borrowed for the call: a cudaStream_t as an integer; 0 = default / host.
      .def(
          "record",
          [](Device& d, std::uintptr_t stream) {
            return d.borrowStream(pointer(stream)).record(false);
          },
          "stream"_a)
      .def(
          "wait",
          [](Device& d, std::uintptr_t stream, const Event& event) {
            d.borrowStream(pointer(stream)).wait(event);
          },
          "stream"_a, "event"_a, ReleaseGil());
  m.def("env_platform", [] { return env().platform; });
  m.def("has_cuda", [] {
#if MSCCLPP_HAVE_CUDA
    return true;
#else
    return false;
#endif
  });
  m.def("is_sm90_compiled",
        [] { return std::string(MSCCLPP_CUDA_ARCHS).find("90") != std::string::npos; });
}

/// A callable that C++ keeps, calls and drops from threads that do not hold the GIL.
class Callback {
 public:
  explicit Callback(nb::object callable)
      : callable_(new nb::object(std::move(callable)), [](nb::object* p) {
          const nb::gil_scoped_acquire gil;
          delete p;
        }) {}
  template <class F>
  void operator()(F&& use) const {
    const nb::gil_scoped_acquire gil;
    use(*callable_);
  }

 private:
  std::shared_ptr<nb::object> callable_;
};

std::vector<nb::bytes> gatherBytes(Bootstrap& bootstrap, const nb::bytes& mine) {
  const std::size_t each = mine.size(), ranks = static_cast<std::size_t>(bootstrap.size());
  std::vector<char> all(each * ranks);
  std::memcpy(all.data() + each * static_cast<std::size_t>(bootstrap.rank()), mine.c_str(), each);
  {
    const nb::gil_scoped_release release;
    bootstrap.allGather(all.data(), each);
  }
  std::vector<nb::bytes> pieces;
  for (std::size_t r = 0; r < ranks; ++r) pieces.emplace_back(all.data() + r * each, each);
  return pieces;
}

std::shared_ptr<Bootstrap> makeCallbackBootstrap(int rank, int size, nb::object allGather) {
  auto gather = [call = Callback(std::move(allGather)), rank, size](void* data, std::size_t each) {
    call([&](const nb::object& callable) {
      char* all = static_cast<char*>(data);
      const auto pieces = nb::cast<std::vector<nb::bytes>>(
          callable(nb::bytes(all + each * static_cast<std::size_t>(rank), each)));
      check(pieces.size() == static_cast<std::size_t>(size), ErrorCode::invalidArgument,
            "all_gather returned {} pieces for {} ranks", pieces.size(), size);
      for (std::size_t r = 0; r < pieces.size(); ++r) {
        check(pieces[r].size() == each, ErrorCode::invalidArgument,
              "all_gather returned {} bytes from rank {}: {} were expected", pieces[r].size(), r,
              each);
        std::memcpy(all + r * each, pieces[r].c_str(), each);
      }
    });
  };
  return std::make_shared<CallbackBootstrap>(rank, size, std::move(gather));
}

void bindBootstrap(nb::module_& m) {
  m.def(
      "create_unique_id",
      [](const std::string& interface) {
        return TcpBootstrap::createUniqueId(interface).toString();
      },
      "interface"_a = "", ReleaseGil());
  nb::class_<Bootstrap>(m, "Bootstrap")
      .def_prop_ro("rank", &Bootstrap::rank)
      .def_prop_ro("size", &Bootstrap::size)
      .def("all_gather", &gatherBytes, "data"_a)
      .def("barrier", &Bootstrap::barrier, ReleaseGil());
  m.def(
      "tcp_bootstrap",
      [](int rank, int size, const std::string& id, double timeout) {
        const std::chrono::milliseconds limit(static_cast<std::int64_t>(timeout * 1e3));
        return std::static_pointer_cast<Bootstrap>(
            std::make_shared<TcpBootstrap>(rank, size, UniqueId::fromString(id), limit));
      },
      "rank"_a, "size"_a, "unique_id"_a, "timeout"_a = 100.0, ReleaseGil());
  m.def("callback_bootstrap", &makeCallbackBootstrap, "rank"_a, "size"_a, "all_gather"_a);
}

// ---- Config, Buffer ----------------------------------------------------------------------------

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
      .def("__hash__",
           [](const Config& c) { return nb::hash(nb::tuple(nb::cast(fieldsOf(c)))); })
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
      .def_ro("num_tokens_per_expert", &LayoutResult::numTokensPerExpert)
      .def_ro("is_token_in_rank", &LayoutResult::isTokenInRank)
      .def_ro("event", &LayoutResult::event);
  nb::class_<DispatchRequest>(m, "DispatchRequest")
      .def(nb::init<>())
      .def_rw("x", &DispatchRequest::x)
      .def_rw("x_scales", &DispatchRequest::xScales)
      .def_rw("handle", &DispatchRequest::handle)
      .def_rw("is_token_in_rank", &DispatchRequest::isTokenInRank)
      .def_rw("num_tokens_per_rank", &DispatchRequest::numTokensPerRank)
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
      .def_ro("handle", &DispatchResult::handle)
      .def_ro("event", &DispatchResult::event);
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
      .def_ro("event", &CombineResult::event);
}

/// A Buffer whose destructor, which waits for enqueued work, does not hold the GIL: that work may
/// need another thread of this process.
struct PythonBuffer {
  PythonBuffer(std::shared_ptr<Bootstrap> bootstrap, const BufferOptions& options)
      : buffer(std::make_unique<Buffer>(std::move(bootstrap), options)) {}
  ~PythonBuffer() {
    const nb::gil_scoped_release release;
    buffer.reset();
  }
  std::unique_ptr<Buffer> buffer;
};

void bindBuffer(nb::module_& m) {
  nb::class_<BufferOptions>(m, "BufferOptions")
      .def(nb::init<>())
      .def_rw("platform", &BufferOptions::platform)
      .def_rw("device_index", &BufferOptions::deviceIndex)
      .def_rw("num_nvl_bytes", &BufferOptions::numNvlBytes)
      .def_rw("num_rdma_bytes", &BufferOptions::numRdmaBytes)
      .def_rw("staging_bytes", &BufferOptions::stagingBytes)
      .def_rw("max_experts_per_rank", &BufferOptions::maxExpertsPerRank)
      .def_rw("timeout_seconds", &BufferOptions::timeoutSeconds)
      .def_rw("first_epoch", &BufferOptions::firstEpoch);
  using Self = const PythonBuffer&;
  nb::class_<PythonBuffer>(m, "Buffer")
      .def(nb::init<std::shared_ptr<Bootstrap>, const BufferOptions&>(), "bootstrap"_a, "options"_a,
           ReleaseGil())
      .def("destroy", [](Self b) { b.buffer->destroy(); }, ReleaseGil())
      .def("get_dispatch_layout",
           [](Self b, const LayoutRequest& r) { return b.buffer->getDispatchLayout(r); },
           "request"_a, ReleaseGil())
      .def("dispatch", [](Self b, const DispatchRequest& r) { return b.buffer->dispatch(r); },
           "request"_a, ReleaseGil())
      .def("combine", [](Self b, const CombineRequest& r) { return b.buffer->combine(r); },
           "request"_a, ReleaseGil())
      .def("create_tensor",
           [](Self b, DType dtype, std::vector<std::int64_t> shape, std::uintptr_t stream) {
             return b.buffer->createTensor(dtype, std::move(shape), pointer(stream));
           },
           "dtype"_a, "shape"_a, "compute_stream"_a = 0, ReleaseGil())
      .def("in_pool", [](Self b, const Tensor& t) { return b.buffer->inPool(t); }, "tensor"_a)
      .def("pool_bytes_free", [](Self b) { return b.buffer->poolBytesFree(); })
      .def("create_expert_map",
           [](Self b, const std::vector<int>& hosts) { return b.buffer->createExpertMap(hosts); },
           "rank_of_expert"_a, ReleaseGil())
      .def("comm_stream",
           [](Self b) { return reinterpret_cast<std::uintptr_t>(b.buffer->commStream()); })
      .def("check_health", [](Self b) { b.buffer->checkHealth(); }, ReleaseGil());
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
  bindBuffer(m);
}

}  // namespace
}  // namespace mscclpp::ep
