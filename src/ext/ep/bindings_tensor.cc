// Tensors in and out of Python by DLPack.
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <mscclpp/errors.hpp>
#include <mscclpp/ext/ep/types.hpp>

#include "bindings.hpp"

namespace mscclpp::ep {
namespace {

namespace nb = nanobind;
using namespace nb::literals;

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
  const nb::capsule capsule(
      owner.get(), [](void* p) noexcept { delete static_cast<std::shared_ptr<void>*>(p); });
  owner.release();
  const bool cuda = tensor.platform == Platform::cuda;
  return nb::ndarray<>(tensor.data, shape.size(), shape.data(), capsule,
                       tensor.strides.empty() ? nullptr : tensor.strides.data(),
                       dlpackType(tensor.dtype),
                       cuda ? nb::device::cuda::value : nb::device::cpu::value, tensor.deviceIndex);
}

}  // namespace

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

}  // namespace mscclpp::ep
