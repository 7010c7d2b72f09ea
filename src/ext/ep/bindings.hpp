// What the parts of the Python module share. Only bindings*.cc know Python.
#pragma once

#include <cstdint>

#include <nanobind/nanobind.h>

namespace mscclpp::ep {

/// For calls that may block: other Python threads run meanwhile.
using ReleaseGil = nanobind::call_guard<nanobind::gil_scoped_release>;

/// A stream that crosses as an integer: a cudaStream_t, 0 = the default stream or the host.
inline void* pointer(std::uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

/// DType and Tensor (DLPack in and out).
void bindTensor(nanobind::module_& m);
/// Platform, Event, Device, and what this build can do.
void bindPlatform(nanobind::module_& m);
/// Ways for ranks to find each other.
void bindBootstrap(nanobind::module_& m);

}  // namespace mscclpp::ep
