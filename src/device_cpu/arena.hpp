#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "device_cpu/sanitizer.hpp"

/// Memory the sanitizers do not know: what kernel threads allocate and free through the runtime
/// must not run malloc in their race-detector context.
namespace mscclpp::device {
inline namespace cpu {
namespace detail {

/// Power-of-two sizes, aligned to the size up to a page. Never returns memory to the system.
void* arenaAllocate(size_t bytes);
void arenaRelease(void* memory, size_t bytes);

template <class T>
struct ArenaAllocator {
  using value_type = T;  // NOLINT: the name allocators must have
  ArenaAllocator() = default;
  template <class U>
  ArenaAllocator(const ArenaAllocator<U>&) {}  // NOLINT: conversion is what allocators do
  T* allocate(size_t count) { return static_cast<T*>(arenaAllocate(count * sizeof(T))); }
  void deallocate(T* memory, size_t count) { arenaRelease(memory, count * sizeof(T)); }
  bool operator==(const ArenaAllocator&) const { return true; }
};
using ArenaString = std::basic_string<char, std::char_traits<char>, ArenaAllocator<char>>;

/// Base of what one thread makes and another frees.
struct ArenaObject {
  static void* operator new(size_t bytes) { return arenaAllocate(bytes); }
  static void operator delete(void* memory, size_t bytes) { arenaRelease(memory, bytes); }
};

/// A growable array of plain values in the arena.
template <class T>
class ArenaArray {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  ArenaArray() = default;
  ~ArenaArray() {
    if (data_ != nullptr) arenaRelease(data_, capacity_ * sizeof(T));
  }
  ArenaArray(const ArenaArray&) = delete;
  ArenaArray& operator=(const ArenaArray&) = delete;

  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T& operator[](size_t index) { return data_[index]; }
  T& back() { return data_[size_ - 1]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  void clear() { size_ = 0; }
  void popBack() { --size_; }
  void pushBack(T value) {
    if (size_ == capacity_) grow();
    data_[size_++] = value;
  }

 private:
  void grow() {
    const size_t capacity = capacity_ == 0 ? 64 : 2 * capacity_;
    T* data = static_cast<T*>(arenaAllocate(capacity * sizeof(T)));
    if (data_ != nullptr) {
      rawCopy(data, data_, size_ * sizeof(T));
      arenaRelease(data_, capacity_ * sizeof(T));
    }
    data_ = data;
    capacity_ = capacity;
  }
  T* data_ = nullptr;
  size_t size_ = 0;
  size_t capacity_ = 0;
};

/// A queue with access by position, for round robin and for random choice.
template <class T>
class ArenaRing {
 public:
  ArenaRing() = default;
  ~ArenaRing() {
    if (data_ != nullptr) arenaRelease(data_, capacity_ * sizeof(T));
  }
  ArenaRing(const ArenaRing&) = delete;
  ArenaRing& operator=(const ArenaRing&) = delete;

  size_t size() const { return tail_ - head_; }
  bool empty() const { return head_ == tail_; }
  T& operator[](size_t index) { return data_[(head_ + index) & (capacity_ - 1)]; }
  void clear() { head_ = tail_ = 0; }
  T popFront() { return data_[head_++ & (capacity_ - 1)]; }
  void pushBack(T value) {
    if (size() == capacity_) grow();
    data_[tail_++ & (capacity_ - 1)] = value;
  }

 private:
  void grow() {
    const size_t capacity = capacity_ == 0 ? 256 : 2 * capacity_;
    T* data = static_cast<T*>(arenaAllocate(capacity * sizeof(T)));
    const size_t count = size();
    for (size_t i = 0; i < count; ++i) data[i] = (*this)[i];
    if (data_ != nullptr) arenaRelease(data_, capacity_ * sizeof(T));
    data_ = data;
    capacity_ = capacity;
    head_ = 0;
    tail_ = count;
  }
  T* data_ = nullptr;
  size_t capacity_ = 0;
  size_t head_ = 0;
  size_t tail_ = 0;
};

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
