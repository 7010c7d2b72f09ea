// One exception family for the whole library. Every message carries the value, the limit and what
// to do. Header only (apart from reportError) so that the device layer, which sits below core, can
// throw too.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <mscclpp/format.hpp>

namespace mscclpp {

/// What went wrong, for callers that decide by kind rather than by text. docs/errors.md lists them.
enum class ErrorCode {
  invalidArgument,  ///< a value that the caller passed is outside what the function accepts
  invalidState,     ///< right call, wrong moment: after destroy(), inside a capture, before a join
  timeout,          ///< something did not happen within the time limit
  peerFailure,      ///< another rank died, left or reported an error
  outOfMemory,      ///< host, shared or device memory could not be had
  unsupported,      ///< this build or this machine cannot do it
  system,           ///< a system call failed
  cuda,             ///< a CUDA call failed
  internal          ///< a bug in this library
};

/// The name of `code` as written in docs/errors.md.
constexpr std::string_view toString(ErrorCode code) noexcept {
  switch (code) {
    case ErrorCode::invalidArgument:
      return "invalidArgument";
    case ErrorCode::invalidState:
      return "invalidState";
    case ErrorCode::timeout:
      return "timeout";
    case ErrorCode::peerFailure:
      return "peerFailure";
    case ErrorCode::outOfMemory:
      return "outOfMemory";
    case ErrorCode::unsupported:
      return "unsupported";
    case ErrorCode::system:
      return "system";
    case ErrorCode::cuda:
      return "cuda";
    case ErrorCode::internal:
      return "internal";
  }
  return "unknown";
}

/// Base of every exception that this library throws.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

/// A failed CUDA call. `cudaCode()` is the cudaError_t as an integer (no CUDA header needed here).
class CudaError : public Error {
 public:
  CudaError(int cudaCode, const std::string& message)
      : Error(ErrorCode::cuda, message), cudaCode_(cudaCode) {}
  int cudaCode() const noexcept { return cudaCode_; }

 private:
  int cudaCode_;
};

/// A failed system call. The text of `errnoValue` is appended to the message.
class SystemError : public Error {
 public:
  SystemError(int errnoValue, const std::string& message)
      : Error(ErrorCode::system,
              fmt::format("{}: {} (errno {})", message, errnoText(errnoValue), errnoValue)),
        errnoValue_(errnoValue) {}
  int errnoValue() const noexcept { return errnoValue_; }

 private:
  static std::string errnoText(int value) {
    return std::error_code(value, std::generic_category()).message();
  }
  int errnoValue_;
};

/// Something did not happen in time.
class TimeoutError : public Error {
 public:
  explicit TimeoutError(const std::string& message) : Error(ErrorCode::timeout, message) {}
};

/// Another rank died, left or failed. `rank()` says which one.
class PeerError : public Error {
 public:
  PeerError(int rank, const std::string& message)
      : Error(ErrorCode::peerFailure, message), rank_(rank) {}
  int rank() const noexcept { return rank_; }

 private:
  int rank_;
};

/// Throws the class that belongs to `code`: TimeoutError for `timeout`, Error for all others.
/// (CudaError, SystemError and PeerError carry a value more: throw them by name.)
[[noreturn]] inline void throwError(ErrorCode code, const std::string& message) {
  if (code == ErrorCode::timeout) throw TimeoutError(message);
  throw Error(code, message);
}

/// Throws Error(code) with a formatted message.
template <class... A>
[[noreturn]] void fail(ErrorCode code, fmt::format_string<A...> format, A&&... args) {
  throwError(code, fmt::format(format, std::forward<A>(args)...));
}

/// Throws like fail() unless `condition` holds. Arguments are formatted only on failure.
template <class... A>
void check(bool condition, ErrorCode code, fmt::format_string<A...> format, A&&... args) {
  if (!condition) [[unlikely]] {
    throwError(code, fmt::format(format, std::forward<A>(args)...));
  }
}

/// Writes `message` to the log as an error; never throws (core library, log.cc).
void reportError(std::string_view message) noexcept;

/// For destructors: runs `action`, logs whatever it throws with `what` in front, and returns
/// whether it went through. Never throws.
template <class F>
bool runNoThrow(std::string_view what, F&& action) noexcept {
  try {
    std::forward<F>(action)();
    return true;
  } catch (const std::exception& error) {
    try {
      reportError(fmt::format("{}: {}", what, error.what()));
    } catch (...) {
      reportError(what);
    }
  } catch (...) {
    reportError(what);
  }
  return false;
}

/// For destructors: like check(), but a failed condition is logged, not thrown. Returns
/// `condition`.
template <class... A>
bool checkNoThrow(bool condition, fmt::format_string<A...> format, A&&... args) noexcept {
  if (condition) [[likely]]
    return true;
  runNoThrow("check failed", [&] { reportError(fmt::format(format, std::forward<A>(args)...)); });
  return false;
}

}  // namespace mscclpp
