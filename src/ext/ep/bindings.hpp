// What the parts of the Python module share. Only bindings*.cc know Python.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include <nanobind/nanobind.h>

#include <mscclpp/bootstrap.hpp>
#include <mscclpp/ext/ep/buffer.hpp>

namespace mscclpp::ep {

/// For calls that may block: other Python threads run meanwhile.
using ReleaseGil = nanobind::call_guard<nanobind::gil_scoped_release>;

/// For members of a result: without it their Python objects would hold the whole result, and with
/// it tensors that the caller has dropped.
inline constexpr auto kOnItsOwn = nanobind::rv_policy::copy;

/// A stream that crosses as an integer: a cudaStream_t, 0 = the default stream or the host.
inline void* pointer(std::uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

/// A Buffer whose destructor, which waits for enqueued work, does not hold the GIL: that work may
/// need another thread of this process.
struct PythonBuffer {
  PythonBuffer(std::shared_ptr<Bootstrap> bootstrap, const BufferOptions& options)
      : buffer(std::make_unique<Buffer>(std::move(bootstrap), options)) {}
  ~PythonBuffer() {
    const nanobind::gil_scoped_release release;
    buffer.reset();
  }
  std::unique_ptr<Buffer> buffer;
};

/// DType and Tensor (DLPack in and out).
void bindTensor(nanobind::module_& m);
/// Platform, Event, Device, and what this build can do.
void bindPlatform(nanobind::module_& m);
/// Ways for ranks to find each other.
void bindBootstrap(nanobind::module_& m);
/// Requests and results of the low-latency calls.
void bindLowLatency(nanobind::module_& m);
/// The low-latency calls themselves.
void bindLowLatencyCalls(nanobind::class_<PythonBuffer>& buffer);

}  // namespace mscclpp::ep
