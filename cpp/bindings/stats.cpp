#include "bindings/stats.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "bindings/arguments.h"

namespace py = pybind11;

namespace ramgguf {
namespace {

void merge(RowStats& into, const RowStats& part) {
    WeightSums& s = into.sums;
    const WeightSums& p = part.sums;
    if (s.first_nonfinite < 0 && p.first_nonfinite >= 0) {
        s.first_nonfinite = into.n_weights + p.first_nonfinite;
    }
    into.n_weights += part.n_weights;
    s.sum += p.sum;
    s.squares += p.squares;
    s.cubes += p.cubes;
    s.fourths += p.fourths;
    s.weighted_squares += p.weighted_squares;
    s.max_abs = std::max(s.max_abs, p.max_abs);
    if (into.errors.size() != part.errors.size()) fail("parts have different formats");
    for (size_t i = 0; i < into.errors.size(); ++i) {
        if (into.errors[i].format != part.errors[i].format) fail("parts have different formats");
        ErrorSums& e = into.errors[i].sums;
        const ErrorSums& f = part.errors[i].sums;
        e.squares += f.squares;
        e.weighted_squares += f.weighted_squares;
        e.max_square = std::max(e.max_square, f.max_square);
        e.overflow |= f.overflow;
    }
}

// The first part's sums and the errors of all parts, with these weighted sums and names of formats
// instead of theirs.
RowStats joined(const std::vector<RowStats>& parts, double sum_squares,
                const std::vector<double>& errors, const std::vector<std::string>& formats) {
    if (parts.empty()) fail("there are no parts to join");
    RowStats all = parts.front();
    all.errors.clear();
    all.sums.weighted_squares = sum_squares;
    for (const RowStats& part : parts) {
        all.errors.insert(all.errors.end(), part.errors.begin(), part.errors.end());
    }
    if (errors.size() != all.errors.size() || formats.size() != errors.size()) {
        fail("there must be one error and one name for each format");
    }
    for (size_t i = 0; i < errors.size(); ++i) {
        all.errors[i].sums.weighted_squares = errors[i];
        all.errors[i].format = formats[i];
    }
    return all;
}

using ErrorRow = std::tuple<py::str, double, double, double, bool>;

// The interned Python string of a name, so that all tensors share one.
py::str interned(const std::string& name) {
    return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name.c_str()));
}

std::vector<ErrorRow> error_rows(const RowStats& stats) {
    std::vector<ErrorRow> rows;
    rows.reserve(stats.errors.size());
    for (const FormatError& e : stats.errors) {
        rows.emplace_back(interned(e.format), e.sums.squares, e.sums.weighted_squares,
                          std::sqrt(e.sums.max_square), e.sums.overflow);
    }
    return rows;
}

RowStats merged(const std::vector<RowStats>& parts) {
    if (parts.empty()) fail("there are no parts to merge");
    RowStats all = parts.front();
    for (size_t i = 1; i < parts.size(); ++i) merge(all, parts[i]);
    return all;
}

}  // namespace

void settle(ErrorSums& sums) {
    if (!sums.overflow && std::isfinite(sums.squares)) return;
    sums.overflow = true;
    sums.squares = sums.max_square = std::numeric_limits<double>::infinity();
    sums.weighted_squares = std::numeric_limits<double>::infinity();
}

void bind_stats(py::module_& m) {
    py::class_<FormatError>(m, "FormatError_", "Errors x - q of one format.")
        .def_readonly("format", &FormatError::format)
        .def_property_readonly("sum_squared_error",
                               [](const FormatError& e) { return e.sums.squares; })
        .def_property_readonly("weighted_squared_error",
                               [](const FormatError& e) { return e.sums.weighted_squares; })
        .def_property_readonly("max_error",
                               [](const FormatError& e) { return std::sqrt(e.sums.max_square); })
        .def_property_readonly("scale_overflow",
                               [](const FormatError& e) { return e.sums.overflow; });
    py::class_<RowStats>(m, "RowStats", "Sums over rows of weights, and errors per format.")
        .def_readonly("n_weights", &RowStats::n_weights)
        .def_property_readonly("sum", [](const RowStats& s) { return s.sums.sum; })
        .def_property_readonly("sum_squares", [](const RowStats& s) { return s.sums.squares; })
        .def_property_readonly("sum_cubes", [](const RowStats& s) { return s.sums.cubes; })
        .def_property_readonly("sum_fourths", [](const RowStats& s) { return s.sums.fourths; })
        .def_property_readonly("max_abs", [](const RowStats& s) { return s.sums.max_abs; })
        .def_property_readonly("weighted_sum_squares",
                               [](const RowStats& s) { return s.sums.weighted_squares; })
        .def_property_readonly("first_nonfinite",
                               [](const RowStats& s) { return s.sums.first_nonfinite; })
        .def_readonly("errors", &RowStats::errors)
        .def("error_rows", &error_rows,
             "(format, squared error, weighted squared error, max error, overflow) of each format.")
        .def_static(
            "joined", &joined, py::arg("parts"), py::arg("sum_squares"), py::arg("errors"),
            py::arg("formats"),
            "The first part's sums and the errors of all, with these weighted sums instead.")
        .def_static("merged", &merged, py::arg("parts"), "The parts' sums, in their order.");
}

}  // namespace ramgguf
