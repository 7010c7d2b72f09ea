#include "progress.hpp"

#include <cstdio>
#include <utility>

#include <mscclpp/format.hpp>

namespace mscclpp::ep::cli {
namespace {
constexpr std::chrono::seconds kOften{1}, kSeldom{5}, kSwitch{10};
}  // namespace

Progress::Progress(bool active) {
  if (active) watcher_ = std::thread([this] { watch(); });
}

Progress::~Progress() {
  if (!watcher_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    over_ = true;
  }
  changed_.notify_all();
  watcher_.join();
}

void Progress::step(std::string what) {
  const std::lock_guard lock(mutex_);
  step_ = std::move(what);
}

void Progress::watch() {
  std::unique_lock lock(mutex_);
  auto next = started_ + kOften;
  while (!changed_.wait_until(lock, next, [this] { return over_; })) {
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(
        std::chrono::steady_clock::now() - started_);
    if (!step_.empty()) {
      std::fputs(fmt::format("[{:3} s] {}\n", seconds.count(), step_).c_str(), stderr);
    }
    next += seconds < kSwitch ? kOften : kSeldom;
  }
}

}  // namespace mscclpp::ep::cli
