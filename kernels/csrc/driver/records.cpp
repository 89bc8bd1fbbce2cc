// kernels.txt: one record a line, its first word says of what. See fssdeploy/kernels/shipping.py, which writes it.
#include <fstream>
#include <sstream>

#include "driver.h"

namespace fssdeploy {
namespace {

constexpr int kSchema = 1;
constexpr std::size_t kAxes = 3;

void require(bool condition, const std::string& path, const std::string& line) {
  if (!condition) throw DriverError(path + ": damaged at \"" + line + "\"; ship the kernels again");
}

bool complete(const KernelRecord& kernel) {
  return kernel.grid.size() == kAxes && !kernel.images.empty() && kernel.num_warps > 0;
}

}  // namespace

std::vector<KernelRecord> read_records(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw DriverError(path + " cannot be read; `python -m fssdeploy.kernels.aot --ship FOLDER` writes it");

  std::string line, word;
  int schema = 0;
  std::getline(file, line);
  std::istringstream first(line);
  first >> word >> schema;
  require(word == "fssdeploy-kernels", path, line);
  if (schema != kSchema) {
    throw DriverError(path + " has version " + std::to_string(schema) + ", this library reads " +
                      std::to_string(kSchema));
  }

  std::vector<KernelRecord> kernels;
  while (std::getline(file, line)) {
    std::istringstream fields(line);
    fields >> word;
    if (word == "kernel") {
      require(kernels.empty() || complete(kernels.back()), path, line);
      KernelRecord kernel;
      fields >> kernel.name >> kernel.entry >> kernel.num_warps;
      kernels.push_back(kernel);
    } else {
      require(!kernels.empty(), path, line);
      KernelRecord& kernel = kernels.back();
      if (word == "grid") {
        kernel.grid.emplace_back();
        fields >> kernel.grid.back();
      } else if (word == "parameter") {
        Parameter parameter;
        fields >> parameter.name >> parameter.type >> parameter.multiple;
        kernel.parameters.push_back(parameter);
      } else if (word == "constant") {
        std::string name;
        fields >> name >> kernel.constants[name];
      } else if (word == "image") {
        Image image;
        fields >> image.target >> image.cc >> image.shared >> image.file;
        kernel.images.push_back(image);
      } else {
        require(false, path, line);
      }
    }
    require(!fields.fail(), path, line);
  }
  require(!kernels.empty() && complete(kernels.back()), path, "the end");
  return kernels;
}

}  // namespace fssdeploy
