#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace mscclpp::ep::cli {

/// Rows of cells, printed in aligned columns: the first `leftColumns` to the left, the others
/// (numbers) to the right.
class TextTable {
 public:
  explicit TextTable(std::vector<std::string> heads, std::size_t leftColumns = 1)
      : leftColumns_(leftColumns) {
    add(std::move(heads));
  }
  void add(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }
  /// Every line starts with `indent` spaces and ends with a newline.
  std::string text(int indent = 2) const;

 private:
  std::size_t leftColumns_;
  std::vector<std::vector<std::string>> rows_;
};

/// 1234567 -> "1,234,567".
std::string grouped(std::int64_t value);
/// Bytes as "117.1 MB" (powers of 1000).
std::string megabytes(double bytes);
/// Milliseconds as "12.3 us", "4.56 ms" or "1.20 s".
std::string duration(double milliseconds);

}  // namespace mscclpp::ep::cli
