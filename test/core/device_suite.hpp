// The conformance suite of Device, Stream and Event: one suite, instantiated for each platform.
#pragma once

#include <cstring>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include <mscclpp/platform.hpp>

namespace mscclpp::test {

/// Opens device 0 of the platform; skips when there is none.
class PlatformTest : public testing::TestWithParam<Platform> {
 protected:
  void SetUp() override {
    if (Device::count(GetParam()) == 0) {
      GTEST_SKIP() << "no device of platform " << toString(GetParam()) << " is visible here";
    }
    device_ = Device::open(GetParam());
  }

  /// `bytes` bytes of device memory, read through the stream.
  std::vector<unsigned char> read(const void* memory, size_t bytes, Stream& stream) {
    const auto host = device_->allocatePinned(bytes);
    device_->copy(host.get(), memory, bytes, stream);
    stream.synchronize();
    const auto* begin = static_cast<const unsigned char*>(host.get());
    return {begin, begin + bytes};
  }

  std::shared_ptr<Device> device_;
};

class DeviceSuite : public PlatformTest {};

/// Holds a stream until open() is called (or the gate goes).
class Gate {
 public:
  explicit Gate(Stream& stream) {
    stream.runOnHost([opened = opened_.get_future().share()] { opened.wait(); });
  }
  ~Gate() { open(); }
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;
  void open() {
    if (!std::exchange(done_, true)) opened_.set_value();
  }

 private:
  std::promise<void> opened_;
  bool done_ = false;
};

/// "cpu" or "cuda" as the name of an instance.
inline std::string platformName(const testing::TestParamInfo<Platform>& info) {
  return std::string(toString(info.param));
}

template <class T>
std::string toHex(const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::string text;
  const auto* bytes = reinterpret_cast<const unsigned char*>(&value);
  for (size_t i = 0; i < sizeof(T); ++i) {
    text += "0123456789abcdef"[bytes[i] >> 4];
    text += "0123456789abcdef"[bytes[i] & 15];
  }
  return text;
}

template <class T>
T fromHex(const std::string& text) {
  T value{};
  auto* bytes = reinterpret_cast<unsigned char*>(&value);
  for (size_t i = 0; i < sizeof(T); ++i) {
    bytes[i] = static_cast<unsigned char>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  }
  return value;
}

}  // namespace mscclpp::test
