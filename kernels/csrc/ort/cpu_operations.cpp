// The kernels of ../cpu as operators.
#include "affinity.h"
#include "attention.h"
#include "correlation.h"
#include "operator.h"
#include "spectral.h"

namespace fssdeploy::ort {
namespace {

class UnitRows : public Kernel {
 public:
  explicit UnitRows(const Attributes& attributes) : eps_(attributes.number("eps")) {}

  void compute(const Run& run) override {
    const Floats rows = run.floats(0, -1);
    Output<float> unit(run, 0, rows.shape());
    cpu::unit_rows(rows.rows(), eps_, cpu::MutableView(unit.data(), rows.rows().rows(), rows.rows().cols()),
                   run.parallel());
    unit.store();
  }

 private:
  float eps_;
};

// query (Nq, C) and support (k, Ns, C).
void require_pair(const Floats& query, const Floats& support) {
  require(query.size(1) == support.size(2), "query and support differ in channels");
  require(query.size(0) > 0 && support.size(1) > 0, "there are no rows");
}

class MaskedMax : public Kernel {
 public:
  explicit MaskedMax(const Attributes& attributes) : exclude_(attributes.integer("exclude") != 0) {}

  void compute(const Run& run) override {
    const Floats query = run.floats(0, 2), support = run.floats(1, 3), weights = run.floats(2, 3);
    require_pair(query, support);
    require(weights.size(0) == support.size(0) && weights.size(2) == support.size(1),
            "weights and support differ in shots or rows");
    const Shape shape{weights.size(0), weights.size(1), query.size(0)};
    Output<float> values(run, 0, shape);
    Output<std::int64_t> indices(run, 1, shape);
    cpu::masked_max(query.rows(), support.data(), weights.data(), shape[0], shape[1], support.size(1), exclude_,
                    values.data(), indices.data(), run.parallel());
    values.store();
  }

 private:
  bool exclude_;
};

class MutualArgmax : public Kernel {
 public:
  explicit MutualArgmax(const Attributes&) {}

  void compute(const Run& run) override {
    const Floats query = run.floats(0, 2), support = run.floats(1, 3);
    require_pair(query, support);
    const std::int64_t shots = support.size(0), rows = query.size(0), columns = support.size(1);
    Output<float> row_values(run, 0, {shots, rows});
    Output<std::int64_t> row_indices(run, 1, {shots, rows});
    Output<float> column_values(run, 2, {shots, columns});
    Output<std::int64_t> column_indices(run, 3, {shots, columns});
    cpu::mutual_argmax(query.rows(), support.data(), shots, columns, row_values.data(), row_indices.data(),
                       column_values.data(), column_indices.data(), run.parallel());
  }
};

class CorrelationProjection : public Kernel {
 public:
  explicit CorrelationProjection(const Attributes&) {}

  void compute(const Run& run) override {
    const Floats query = run.floats(0, 2), support = run.floats(1, 3), projection = run.floats(2, 3);
    require_pair(query, support);
    require(projection.size(0) == support.size(0) && projection.size(1) == support.size(1),
            "projection and support differ in shots or rows");
    Output<float> projected(run, 0, {support.size(0), query.size(0), projection.size(2)});
    cpu::correlation_projection(query.rows(), support.data(), projection.data(), support.size(0), support.size(1),
                                projection.size(2), projected.data(), run.parallel());
    projected.store();
  }
};

class CalibratedAttention : public Kernel {
 public:
  explicit CalibratedAttention(const Attributes& attributes)
      : start_(attributes.integer("start")),
        strength_(attributes.number("strength")),
        scale_(attributes.number("scale")) {
    const std::string span = attributes.text("span");
    require(span == "row" || span == "global", "span is row or global");
    global_ = span == "global";
  }

  void compute(const Run& run) override {
    const Floats query = run.floats(0, 3), keys = run.floats(1, 3), values = run.floats(2, 3);
    const Floats calibration = run.floats(3, 2);
    const cpu::CalibratedAttention sizes{query.size(0),  query.size(1),       keys.size(1),
                                         query.size(2),  values.size(2),      start_,
                                         calibration.size(1), strength_, scale_, global_};
    require(keys.size(0) == sizes.batch && values.size(0) == sizes.batch && calibration.size(0) == sizes.batch,
            "the inputs differ in batch entries");
    require(keys.size(2) == sizes.channels, "query and keys differ in channels");
    require(values.size(1) == sizes.keys && sizes.keys > 0, "keys and values differ in rows, or there are none");
    require(start_ >= 0 && start_ + sizes.calibrated <= sizes.keys, "the calibrated keys are not all there");
    Output<float> output(run, 0, {sizes.batch, sizes.queries, sizes.value_channels});
    cpu::calibrated_attention(sizes, query.data(), keys.data(), values.data(), calibration.data(), output.data(),
                              run.parallel());
    output.store();
  }

 private:
  std::int64_t start_;
  float strength_, scale_;
  bool global_;
};

class SpectralEdges : public Kernel {
 public:
  explicit SpectralEdges(const Attributes& attributes) {
    const auto broadcast = cpu::broadcast_named(attributes.text("broadcast"));
    const auto negative = cpu::negative_named(attributes.text("negative"));
    require(broadcast.has_value(), "broadcast has no such mode");
    require(negative.has_value(), "negative has no such mode");
    graph_ = {attributes.integer("height"), attributes.integer("width"), attributes.number("sigma"), *broadcast,
              *negative};
  }

  void compute(const Run& run) override {
    const Floats features = run.floats(0, 2), table = run.floats(2, 2), evidence = run.floats(3, 1);
    const std::int64_t cells = features.size(0);
    std::int64_t labelled = 0;
    const std::int64_t* labels = run.integers(1, labelled);
    require(cells == graph_.height * graph_.width, "features are not height * width rows");
    require(labelled == cells && evidence.size(0) == cells, "features, labels and evidence differ in cells");
    require(table.size(0) == table.size(1), "the table is not square");
    const auto known = [&](std::int64_t label) { return label >= 0 && label < table.size(0); };
    require(std::all_of(labels, labels + cells, known), "there are labels outside of the table");
    Output<float> edges(run, 0, {cells, cells}), degree(run, 1, {cells});
    cpu::spectral_edges(graph_, features.rows(), labels, table.rows(), evidence.data(),
                        cpu::MutableView(edges.data(), cells, cells), degree.data(), run.parallel());
    edges.store();
  }

 private:
  cpu::SpectralEdges graph_;
};

}  // namespace

const std::vector<Operation>& cpu_operations() {
  using Places = std::vector<Place>;
  static const Places best{Place::float32, Place::int64};
  static const std::vector<Operation> operations{
      {"UnitRows", {Place::same}, {Place::half_or_same}, create<UnitRows>},
      {"MaskedMax", Places(3, Place::same), best, create<MaskedMax>},
      {"MutualArgmax",
       Places(2, Place::same),
       {Place::float32, Place::int64, Place::float32, Place::int64},
       create<MutualArgmax>},
      {"CorrelationProjection", Places(3, Place::same), {Place::same}, create<CorrelationProjection>},
      {"CalibratedAttention",
       {Place::same, Place::same, Place::same, Place::floating},
       {Place::same},
       create<CalibratedAttention>},
      {"SpectralEdges",
       {Place::same, Place::int64, Place::floating, Place::floating},
       {Place::same, Place::float32},
       create<SpectralEdges>},
  };
  return operations;
}

}  // namespace fssdeploy::ort
