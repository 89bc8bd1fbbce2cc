// What fssdeploy.kernels.correlation computes; the contracts are there.
#pragma once

#include "tiles.h"

namespace fssdeploy::cpu {

// query (Nq, C), support (k, Ns, C), projection (k, Ns, P) -> relu(query support^T) projection, projected (k, Nq, P).
inline void correlation_projection(View query, const float* support, const float* projection, Index shots,
                                   Index support_rows, Index projected_channels, float* projected,
                                   const Parallel& parallel = one_by_one) {
  const Index rows = query.rows(), channels = query.cols();
  for_row_tiles(shots, rows, kQueryTile, parallel, [&](Index shot, Index first, Index count) {
    const View of_shot(support + shot * support_rows * channels, support_rows, channels);
    const View weights(projection + shot * support_rows * projected_channels, support_rows, projected_channels);
    MutableView out(projected + (shot * rows + first) * projected_channels, count, projected_channels);
    out.setZero();
    Matrix positive;
    for_product_tiles(query.middleRows(first, count), of_shot, [&](Index column, const Matrix& products) {
      positive = products.cwiseMax(0.0f);
      out.noalias() += positive * weights.middleRows(column, products.cols());
    });
  });
}

}  // namespace fssdeploy::cpu
