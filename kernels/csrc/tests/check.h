// Random inputs, comparison with a tolerance, and work done in the worst order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "tiles.h"

namespace check {

using fssdeploy::cpu::Index;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Indices = std::vector<std::int64_t>;

constexpr double kInfinite = std::numeric_limits<double>::infinity();
constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();
constexpr std::int64_t kNoIndex = -77;

inline std::mt19937& generator() {
  static std::mt19937 state(5);
  return state;
}

inline Floats normal(Index count, float spread = 1) {
  std::normal_distribution<float> numbers(0, spread);
  Floats values(count);
  for (float& value : values) value = numbers(generator());
  return values;
}

// Numbers in [0, 1), a share of them exactly zero.
inline Floats weights(Index count, float zeros) {
  std::uniform_real_distribution<float> numbers(0, 1);
  Floats values(count);
  for (float& value : values) value = numbers(generator()) < zeros ? 0 : numbers(generator());
  return values;
}

inline double dot(const float* a, const float* b, Index count) {
  double sum = 0;
  for (Index i = 0; i < count; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

[[noreturn]] inline void fail(const char* what, std::size_t at, double found, double expected) {
  std::fprintf(stderr, "%s[%zu]: found %.9g, expected %.9g\n", what, at, found, expected);
  std::exit(1);
}

inline void close(const char* what, const Floats& found, const Doubles& expected, double tolerance = 2e-5) {
  if (found.size() != expected.size()) fail(what, 0, found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double allowed = tolerance * (1 + std::abs(expected[i]));
    const bool same = std::isinf(expected[i]) ? found[i] == expected[i] : std::abs(found[i] - expected[i]) <= allowed;
    if (!same) fail(what, i, found[i], expected[i]);
  }
}

inline void equal(const char* what, const Indices& found, const Indices& expected) {
  if (found.size() != expected.size()) fail(what, 0, found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i)
    if (found[i] != expected[i]) fail(what, i, static_cast<double>(found[i]), static_cast<double>(expected[i]));
}

inline void backwards(Index count, const std::function<void(Index)>& body) {
  for (Index i = count; i-- > 0;) body(i);
}

}  // namespace check
