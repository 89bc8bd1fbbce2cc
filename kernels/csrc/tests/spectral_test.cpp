#include "spectral.h"

#include <string>

#include "check.h"

using namespace check;
namespace cpu = fssdeploy::cpu;

static double without_negatives(const std::string& rule, double cosine) {
  if (rule == "shift") return (1 + cosine) / 2;
  if (rule == "clip") return std::max(cosine, 0.0);
  return rule == "exp" ? std::exp(cosine - 1) : cosine;
}

static double spread(const std::string& rule, double here, double there) {
  if (rule == "product") return here * there;
  if (rule == "geometric") return std::sqrt(here * there);
  if (rule == "mean") return (here + there) / 2;
  if (rule == "row") return here;
  return rule == "column" ? there : 1;
}

static void spectral_edges(Index height, Index width, const std::string& broadcast, const std::string& negative) {
  const Index cells = height * width, channels = 13, regions = 3;
  const cpu::SpectralEdges graph{height, width, 1.7f, *cpu::broadcast_named(broadcast), *cpu::negative_named(negative)};
  const Floats features = normal(cells * channels, 0.27f), table = normal(regions * regions, 0.5f);
  const Floats evidence = normal(cells, 0.3f);
  Indices labels(cells);
  for (Index i = 0; i < cells; ++i) labels[i] = (i * 7 + i / 5) % regions;
  Floats edges(cells * cells, kPoison), degree(cells, kPoison);
  Doubles expected, sums;
  for (Index i = 0; i < cells; ++i) {
    double sum = 0;
    for (Index j = 0; j < cells; ++j) {
      const double down = i / width - j / width, across = i % width - j % width;
      const double near = std::exp(-(down * down + across * across) / (2 * 1.7 * 1.7));
      const double alike = without_negatives(negative, table[labels[i] * regions + labels[j]]);
      const double cosine = dot(features.data() + i * channels, features.data() + j * channels, channels);
      expected.push_back(without_negatives(negative, cosine) * (near + alike) *
                         spread(broadcast, std::exp(evidence[i]), std::exp(evidence[j])));
      sum += expected.back();
    }
    sums.push_back(sum);
  }
  cpu::spectral_edges(graph, cpu::View(features.data(), cells, channels), labels.data(),
                      cpu::View(table.data(), regions, regions), evidence.data(),
                      cpu::MutableView(edges.data(), cells, cells), degree.data(), backwards);
  close("edges", edges, expected);
  close("degree", degree, sums, 1e-4);
}

int main() {
  for (const char* broadcast : {"product", "geometric", "mean", "row", "column", "none"})
    for (const char* negative : {"shift", "clip", "exp", "keep"}) spectral_edges(19, 17, broadcast, negative);
  spectral_edges(1, 1, "product", "shift");
  spectral_edges(1, 131, "row", "clip");
  spectral_edges(131, 1, "mean", "exp");
  if (cpu::broadcast_named("rows") || cpu::negative_named("")) fail("an unknown name", 0, 1, 0);
}
