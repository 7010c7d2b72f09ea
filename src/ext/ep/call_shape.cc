#include "call_shape.hpp"

#include <mscclpp/format.hpp>

namespace mscclpp::ep {
namespace {

struct Field {
  int shift, bits;
  constexpr std::uint64_t put(std::uint64_t value) const {
    return (value & ((std::uint64_t{1} << bits) - 1)) << shift;
  }
  constexpr std::uint64_t get(std::uint64_t word) const {
    return (word >> shift) & ((std::uint64_t{1} << bits) - 1);
  }
};
constexpr Field kOperation{0, 2}, kHidden{2, 22}, kDtype{24, 3}, kScales{27, 2}, kTopk{29, 6},
    kExperts{35, 17}, kOther{52, 12};

/// 12 bits of a 64-bit mix (splitmix64's finaliser), so that small differences show.
std::uint64_t shortHash(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return (x ^ (x >> 31)) & 0xfff;
}

}  // namespace

std::uint64_t CallShape::pack() const {
  return kOperation.put(static_cast<std::uint64_t>(operation)) |
         kHidden.put(static_cast<std::uint64_t>(hidden)) |
         kDtype.put(static_cast<std::uint64_t>(dtype)) |
         kScales.put(static_cast<std::uint64_t>(scales)) |
         kTopk.put(static_cast<std::uint64_t>(topk)) |
         kExperts.put(static_cast<std::uint64_t>(experts)) | kOther.put(shortHash(other));
}

std::string CallShape::describe(std::uint64_t signature) {
  static constexpr const char* kOperations[] = {"no call", "dispatch", "cached dispatch",
                                                "combine"};
  static constexpr const char* kScaleKinds[] = {"no", "f32", "i32", "unknown"};
  return fmt::format("{}(hidden={}, dtype={}, {} scales, topk={}, experts={}, options #{:03x})",
                     kOperations[kOperation.get(signature)], kHidden.get(signature),
                     nameOf(static_cast<DType>(kDtype.get(signature))),
                     kScaleKinds[kScales.get(signature)], kTopk.get(signature),
                     kExperts.get(signature), kOther.get(signature));
}

}  // namespace mscclpp::ep
