// Binding that names the loops which this machine runs, to the schema that kernels/common/native.py defines.
#include "processor.h"

#include <torch/library.h>

#include <string>
#include <tuple>

namespace ijepa_fast {
namespace {

std::tuple<std::string, std::string> cpu_loops() { return {name_of(processor().kind), processor().complaint}; }

}  // namespace
}  // namespace ijepa_fast

TORCH_LIBRARY_IMPL(ijepa_fast, CompositeExplicitAutograd, library) {
  library.impl("cpu_loops", ijepa_fast::cpu_loops);
}
