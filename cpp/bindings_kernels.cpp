#include <cstdlib>

#include "bindings.h"
#include "dispatch.h"

namespace py = pybind11;

namespace ramgguf {

void bind_kernels(py::module_& m) {
    if (const char* forced = std::getenv("RAMGGUF_ISA")) set_level(forced);
    m.def("isa", [] { return active_level().name; }, "The ISA level that runs.");
    m.def(
        "supported_isas",
        [] {
            py::list names;
            for (const auto& level : supported_levels()) names.append(level.name);
            return names;
        },
        "ISA levels that this CPU runs, best first.");
    m.def("set_isa", &set_level, py::arg("name"),
          "Make a level the active one: a name, 'baseline' for the lowest, '' for the best.");
}

}  // namespace ramgguf
