// What fssdeploy.kernels.affinity computes; the contracts are there.
#pragma once

#include <vector>

#include "tiles.h"

namespace fssdeploy::cpu {

// unit[i] = rows[i] / max(|rows[i]|, eps); both (count, channels).
inline void unit_rows(View rows, float eps, MutableView unit, const Parallel& parallel = one_by_one) {
  for_row_tiles(1, rows.rows(), kQueryTile, parallel, [&](Index, Index first, Index count) {
    const Vector norm = rows.middleRows(first, count).rowwise().norm().array().max(eps);
    unit.middleRows(first, count).array() = rows.middleRows(first, count).array().colwise() / norm;
  });
}

// The first place of the largest of `candidates`, where that is larger than `best`.
template <typename Candidates>
void keep_best(const Candidates& candidates, Index first, float& best, std::int64_t& place) {
  const float largest = candidates.maxCoeff();
  if (!(largest > best)) return;
  best = largest;
  place = first + (std::find(candidates.data(), candidates.data() + candidates.size(), largest) - candidates.data());
}

// query (Nq, C), support (k, Ns, C), weights (k, M, Ns) -> values, indices (k, M, Nq).
inline void masked_max(View query, const float* support, const float* weights, Index shots, Index masks,
                       Index support_rows, bool exclude, float* values, std::int64_t* indices,
                       const Parallel& parallel = one_by_one) {
  const Index rows = query.rows(), channels = query.cols();
  std::fill_n(values, shots * masks * rows, -kInfinite);
  std::fill_n(indices, shots * masks * rows, exclude ? -1 : 0);
  for_row_tiles(shots, rows, kQueryTile, parallel, [&](Index shot, Index first, Index count) {
    const View of_shot(support + shot * support_rows * channels, support_rows, channels);
    Vector weighted, penalty;
    for_product_tiles(query.middleRows(first, count), of_shot, [&](Index column, const Matrix& products) {
      for (Index mask = 0; mask < masks; ++mask) {
        const Index group = shot * masks + mask;
        const Eigen::Map<const Vector> weight(weights + group * support_rows + column, products.cols());
        penalty = Vector::Zero(weight.size());
        if (exclude) penalty = (weight == 0).select(-kInfinite, penalty);
        for (Index row = 0; row < count; ++row) {
          const Index out = group * rows + first + row;
          weighted = products.row(row).transpose().array() * weight + penalty;
          keep_best(weighted, column, values[out], indices[out]);
        }
      }
    });
  });
}

// query (Nq, C), support (k, Ns, C) -> row_values, row_indices (k, Nq), column_values, column_indices (k, Ns).
inline void mutual_argmax(View query, const float* support, Index shots, Index support_rows, float* row_values,
                          std::int64_t* row_indices, float* column_values, std::int64_t* column_indices,
                          const Parallel& parallel = one_by_one) {
  const Index rows = query.rows(), channels = query.cols(), row_tiles = tiles(rows, kQueryTile);
  std::fill_n(row_values, shots * rows, -kInfinite);
  std::fill_n(row_indices, shots * rows, 0);
  // The best of every column within each tile of rows: tiles run side by side.
  std::vector<float> best(shots * row_tiles * support_rows, -kInfinite);
  std::vector<std::int32_t> place(best.size(), 0);
  for_row_tiles(shots, rows, kQueryTile, parallel, [&](Index shot, Index first, Index count) {
    const View of_shot(support + shot * support_rows * channels, support_rows, channels);
    const Index slot = (shot * row_tiles + first / kQueryTile) * support_rows;
    for_product_tiles(query.middleRows(first, count), of_shot, [&](Index column, const Matrix& products) {
      float* best_here = best.data() + slot + column;
      std::int32_t* place_here = place.data() + slot + column;
      for (Index row = 0; row < count; ++row) {
        const Index out = shot * rows + first + row;
        keep_best(products.row(row), column, row_values[out], row_indices[out]);
        for (Index j = 0; j < products.cols(); ++j) {
          const bool better = products(row, j) > best_here[j];
          best_here[j] = better ? products(row, j) : best_here[j];
          place_here[j] = better ? static_cast<std::int32_t>(first + row) : place_here[j];
        }
      }
    });
  });
  for_row_tiles(shots, support_rows, kSupportTile, parallel, [&](Index shot, Index first, Index count) {
    for (Index column = first; column < first + count; ++column) {
      float value = -kInfinite;
      std::int32_t index = 0;
      for (Index tile = 0; tile < row_tiles; ++tile) {
        const Index slot = (shot * row_tiles + tile) * support_rows + column;
        if (best[slot] > value) value = best[slot], index = place[slot];
      }
      column_values[shot * support_rows + column] = value;
      column_indices[shot * support_rows + column] = index;
    }
  });
}

}  // namespace fssdeploy::cpu
