// Grid formulas, such as cdiv(rows, BLOCK) * shots, by recursive descent.
#include <algorithm>
#include <cctype>

#include "driver.h"

namespace fssdeploy {
namespace {

class Formula {
 public:
  Formula(const std::string& text, const std::map<std::string, std::int64_t>& values) : text_(text), values_(values) {}

  std::int64_t value() {
    const std::int64_t result = sum();
    if (peek() != '\0') fail("unexpected '" + std::string(1, peek()) + "'");
    return result;
  }

 private:
  std::int64_t sum() {
    std::int64_t result = product();
    while (true) {
      if (accept('+')) {
        result += product();
      } else if (accept('-')) {
        result -= product();
      } else {
        return result;
      }
    }
  }

  std::int64_t product() {
    std::int64_t result = operand();
    while (true) {
      if (accept('*')) {
        result *= operand();
      } else if (accept('/')) {
        result /= nonzero(operand());
      } else {
        return result;
      }
    }
  }

  std::int64_t operand() {
    if (accept('-')) return -operand();
    if (accept('(')) {
      const std::int64_t result = sum();
      expect(')');
      return result;
    }
    const std::string word = name_or_number();
    if (std::isdigit(static_cast<unsigned char>(word[0]))) return std::stoll(word);
    if (!accept('(')) {
      const auto found = values_.find(word);
      if (found == values_.end()) fail("nothing is called " + word);
      return found->second;
    }
    const std::int64_t a = sum();
    expect(',');
    const std::int64_t b = sum();
    expect(')');
    if (word == "cdiv") return (a + nonzero(b) - 1) / b;
    if (word == "min") return std::min(a, b);
    if (word == "max") return std::max(a, b);
    fail("there is no function " + word);
  }

  std::string name_or_number() {
    peek();
    std::string word;
    while (at_ < text_.size() && (std::isalnum(static_cast<unsigned char>(text_[at_])) || text_[at_] == '_')) {
      word += text_[at_++];
    }
    if (word.empty()) fail("a name or a number is missing");
    return word;
  }

  std::int64_t nonzero(std::int64_t divisor) const {
    if (divisor == 0) fail("division by zero");
    return divisor;
  }

  char peek() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  bool accept(char symbol) {
    if (peek() != symbol) return false;
    ++at_;
    return true;
  }

  void expect(char symbol) {
    if (!accept(symbol)) fail("'" + std::string(1, symbol) + "' is missing");
  }

  [[noreturn]] void fail(const std::string& why) const {
    throw DriverError("the grid formula \"" + text_ + "\" cannot be computed: " + why);
  }

  const std::string& text_;
  const std::map<std::string, std::int64_t>& values_;
  std::size_t at_ = 0;
};

}  // namespace

std::int64_t evaluate(const std::string& formula, const std::map<std::string, std::int64_t>& values) {
  return Formula(formula, values).value();
}

}  // namespace fssdeploy
