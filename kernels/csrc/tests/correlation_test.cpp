#include "correlation.h"

#include "check.h"

using namespace check;
namespace cpu = fssdeploy::cpu;

static void correlation_projection(Index rows, Index columns, Index shots, Index channels, Index projected) {
  const Floats query = normal(rows * channels), support = normal(shots * columns * channels);
  const Floats projection = normal(shots * columns * projected, 0.1f);
  Floats found(shots * rows * projected, kPoison);
  Doubles expected(found.size(), 0);
  for (Index k = 0; k < shots; ++k)
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < columns; ++j) {
        const float* other = support.data() + (k * columns + j) * channels;
        const double positive = std::max(dot(query.data() + i * channels, other, channels), 0.0);
        for (Index p = 0; p < projected; ++p)
          expected[(k * rows + i) * projected + p] += positive * projection[(k * columns + j) * projected + p];
      }
  cpu::correlation_projection(cpu::View(query.data(), rows, channels), support.data(), projection.data(), shots,
                              columns, projected, found.data(), backwards);
  close("correlation_projection", found, expected);
}

int main() {
  correlation_projection(1, 1, 1, 1, 1);
  correlation_projection(139, 521, 2, 31, 11);
  correlation_projection(3, 7, 5, 64, 128);
}
