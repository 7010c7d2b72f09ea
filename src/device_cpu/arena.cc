#include "device_cpu/arena.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>

#include "device_cpu/sync.hpp"

namespace mscclpp::device {
inline namespace cpu {
namespace detail {
namespace {

constexpr size_t kMinClass = 4;  // 16 bytes
constexpr size_t kClasses = 48;
constexpr size_t kChunkBytes = size_t{4} << 20;

struct FreeBlock {
  FreeBlock* next;
};
uint32_t lockWord = 0;
FreeBlock* freeLists[kClasses] = {};
char* chunk = nullptr;
size_t chunkLeft = 0;

size_t classOf(size_t bytes) {
  return std::max(kMinClass, static_cast<size_t>(std::bit_width(bytes <= 1 ? 1 : bytes - 1)));
}

// AddressSanitizer build: it checks the runtime's own memory too.
void* allocateChecked(size_t bytes, size_t alignment) {
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes) != 0) std::abort();
  return memory;
}

}  // namespace

void* arenaAllocate(size_t bytes) {
  const size_t sizeClass = classOf(bytes);
  const size_t size = size_t{1} << sizeClass;
  if (kAddressSanitizer) return allocateChecked(bytes, std::min(size, size_t{4096}));
  WordLock lock(lockWord);
  if (FreeBlock* block = freeLists[sizeClass]) {
    freeLists[sizeClass] = block->next;
    return block;
  }
  const size_t alignment = std::min(size, size_t{4096});
  const size_t skip = (alignment - reinterpret_cast<uintptr_t>(chunk) % alignment) % alignment;
  if (chunkLeft < size + skip) {
    const size_t take = std::max(size, kChunkBytes);
    void* memory = mmap(nullptr, take, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      std::fprintf(stderr, "mscclpp: no memory for %zu bytes of kernel bookkeeping\n", take);
      std::abort();
    }
    if (take > kChunkBytes) return memory;  // its own mapping; recycled through the free list
    chunk = static_cast<char*>(memory);
    chunkLeft = take;
  } else {
    chunk += skip;
    chunkLeft -= skip;
  }
  char* result = chunk;
  chunk += size;
  chunkLeft -= size;
  return result;
}

void arenaRelease(void* memory, size_t bytes) {
  if (kAddressSanitizer) {
    std::free(memory);
    return;
  }
  const size_t sizeClass = classOf(bytes);
  WordLock lock(lockWord);
  auto* block = static_cast<FreeBlock*>(memory);
  block->next = freeLists[sizeClass];
  freeLists[sizeClass] = block;
}

}  // namespace detail
}  // namespace cpu
}  // namespace mscclpp::device
