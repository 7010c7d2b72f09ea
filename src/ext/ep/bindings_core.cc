// Devices, events and bootstraps for Python.
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/env.hpp>
#include <mscclpp/errors.hpp>
#include <mscclpp/platform.hpp>

#include "bindings.hpp"

#ifndef MSCCLPP_CUDA_ARCHS
#define MSCCLPP_CUDA_ARCHS ""
#endif

namespace mscclpp::ep {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

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

}  // namespace

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

}  // namespace mscclpp::ep
