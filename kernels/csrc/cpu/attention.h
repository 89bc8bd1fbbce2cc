// What fssdeploy.kernels.scma.calibrated_attention computes; the contract is there.
#pragma once

#include <utility>

#include "tiles.h"

namespace fssdeploy::cpu {

struct CalibratedAttention {
  Index batch, queries, keys, channels, value_channels;
  Index start, calibrated;  // the calibrated keys are start to start + calibrated
  float strength, scale;
  bool global;  // one range for all queries of a batch entry, or one for each query
};

// Keeps the range of equal logits from dividing by zero.
constexpr float kRangeEps = 1e-7f;

// query (B, N, D), keys (B, S, D), values (B, S, V), calibration (B, calibrated) -> output (B, N, V).
inline void calibrated_attention(const CalibratedAttention& sizes, const float* query, const float* keys,
                                 const float* values, const float* calibration, float* output,
                                 const Parallel& parallel = one_by_one) {
  const auto of_entry = [](const float* array, Index entry, Index rows, Index columns) {
    return View(array + entry * rows * columns, rows, columns);
  };
  const auto scaled = [&](Index entry, Index first, Index count) {
    return Matrix(of_entry(query, entry, sizes.queries, sizes.channels).middleRows(first, count) * sizes.scale);
  };

  // The part of a tile of logits that is calibrated: its first key and one behind its last.
  const auto overlap = [&](Index first_key, const Matrix& logits) {
    return std::pair(std::max(first_key, sizes.start),
                     std::min(first_key + logits.cols(), sizes.start + sizes.calibrated));
  };

  // Must read the same logits as below: where all are equal, norm magnifies any difference ten million times.
  Vector low = Vector::Constant(sizes.batch * sizes.queries, kInfinite), high = -low;
  for_row_tiles(sizes.batch, sizes.queries, kQueryTile, parallel, [&](Index entry, Index first, Index count) {
    auto smallest = low.segment(entry * sizes.queries + first, count);
    auto largest = high.segment(entry * sizes.queries + first, count);
    const auto extend = [&](Index first_key, const Matrix& logits) {
      const auto [from, to] = overlap(first_key, logits);
      const auto calibrated = logits.middleCols(from - first_key, to - from);
      smallest = smallest.min(calibrated.rowwise().minCoeff().array());
      largest = largest.max(calibrated.rowwise().maxCoeff().array());
    };
    const Index end = sizes.calibrated > 0 ? sizes.start + sizes.calibrated : 0;
    for_product_tiles(scaled(entry, first, count), of_entry(keys, entry, sizes.keys, sizes.channels), sizes.start, end,
                      extend);
  });
  if (sizes.global && sizes.queries > 0) {
    for (Index entry = 0; entry < sizes.batch; ++entry) {
      auto smallest = low.segment(entry * sizes.queries, sizes.queries);
      auto largest = high.segment(entry * sizes.queries, sizes.queries);
      smallest.setConstant(smallest.minCoeff());
      largest.setConstant(largest.maxCoeff());
    }
  }

  for_row_tiles(sizes.batch, sizes.queries, kQueryTile, parallel, [&](Index entry, Index first, Index count) {
    const Index row = entry * sizes.queries + first;
    const Vector bottom = low.segment(row, count), slope = (high.segment(row, count) - bottom + kRangeEps).inverse();
    const View mixed = of_entry(values, entry, sizes.keys, sizes.value_channels);
    MutableView out(output + row * sizes.value_channels, count, sizes.value_channels);
    out.setZero();
    Vector top = Vector::Constant(count, -kInfinite), total = Vector::Zero(count);
    Matrix weights;
    const auto attend = [&](Index first_key, const Matrix& logits) {
      weights = logits;
      const auto [from, to] = overlap(first_key, logits);
      for (Index key = from; key < to; ++key) {
        const float target = calibration[entry * sizes.calibrated + key - sizes.start] - 1;
        auto column = weights.col(key - first_key).array();
        column += sizes.strength * ((column - bottom) * slope + target).min(0.0f);
      }
      const Vector higher = top.max(weights.rowwise().maxCoeff().array());
      const Vector shrink = (top - higher).exp();
      top = higher;
      weights.array() = (weights.array().colwise() - top).exp();
      total = total * shrink + weights.rowwise().sum().array();
      out.array().colwise() *= shrink;
      out.noalias() += weights * mixed.middleRows(first_key, logits.cols());
    };
    for_product_tiles(scaled(entry, first, count), of_entry(keys, entry, sizes.keys, sizes.channels), attend);
    out.array().colwise() /= total;
  });
}

}  // namespace fssdeploy::cpu
