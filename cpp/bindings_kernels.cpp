// Block formats in Python: checks every array's dtype, shape and contiguity, releases the GIL and
// calls the active ISA level.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "dispatch.h"

namespace py = pybind11;

namespace ramgguf {

namespace {

struct FormatError {
    std::string format;
    ErrorSums sums;
};

struct RowStats {
    int64_t n_weights = 0;
    WeightSums sums;
    std::vector<FormatError> errors;
};

const Kernels& kernels() {
    return *active_level().kernels;
}

[[noreturn]] void fail(const std::string& message) {
    throw std::invalid_argument(message);
}

int find_format(const std::string& name) {
    const Kernels& k = kernels();
    std::string known;
    for (int i = 0; i < k.n_formats; ++i) {
        if (name == k.formats[i].name) return i;
        known += (i ? ", " : "") + std::string(k.formats[i].name);
    }
    fail("format '" + name + "' is unknown; known are " + known);
}

EncoderId find_encoder(const std::string& name) {
    if (name == "rtn") return kRtn;
    if (name == "search") return kSearch;
    fail("encoder '" + name + "' is unknown; known are rtn, search");
}

void check_dtype(const py::array& a, const char* what, const py::dtype& dtype) {
    if (!a.dtype().is(dtype) && !a.dtype().equal(dtype)) {
        fail(std::string(what) + " has dtype " +
             py::str(py::object(a.dtype())).cast<std::string>() + ", expected " +
             py::str(py::object(dtype)).cast<std::string>());
    }
}

void check_array(const py::array& a, const char* what, int n_dims, const py::dtype& dtype) {
    check_dtype(a, what, dtype);
    if (a.ndim() != n_dims) {
        fail(std::string(what) + " has " + std::to_string(a.ndim()) + " dimensions, expected " +
             std::to_string(n_dims));
    }
    if (!(a.flags() & py::array::c_style)) {
        fail(std::string(what) + " is not C-contiguous; pass numpy.ascontiguousarray(...)");
    }
}

void check_writeable(const py::array& a, const char* what) {
    if (!a.writeable()) fail(std::string(what) + " is read-only");
}

// Weights per row of bytes.
int64_t row_length_of(const char* what, int format, int64_t row_bytes) {
    const FormatInfo& info = kernels().formats[format];
    if (row_bytes % info.block_bytes != 0) {
        fail(std::string(what) + " has rows of " + std::to_string(row_bytes) +
             " bytes, expected a multiple of the " + std::to_string(info.block_bytes) +
             "-byte block of " + info.name);
    }
    return row_bytes / info.block_bytes * info.block_size;
}

Weights weights_of(const char* what, const std::string& type, const py::array& a) {
    check_array(a, what, 2, py::dtype::of<uint8_t>());
    Weights w{};
    w.format = find_format(type);
    w.bytes = static_cast<const uint8_t*>(a.data());
    w.row_length = row_length_of(what, w.format, a.shape(1));
    w.n = a.shape(0) * w.row_length;
    return w;
}

void set_importance(Weights& w, const py::object& importance) {
    if (importance.is_none()) return;
    if (!py::isinstance<py::array>(importance)) fail("importance is not an array");
    const auto a = importance.cast<py::array>();
    check_array(a, "importance", 1, py::dtype::of<float>());
    if (a.shape(0) != w.row_length) {
        fail("importance has " + std::to_string(a.shape(0)) +
             " entries, expected one for each of " + std::to_string(w.row_length) + " columns");
    }
    w.importance = static_cast<const float*>(a.data());
    for (py::ssize_t i = 0; i < a.shape(0); ++i) {
        if (!(w.importance[i] >= 0.0f) || !std::isfinite(w.importance[i])) {
            fail("importance[" + std::to_string(i) + "] is negative or not finite");
        }
    }
}

std::string place(const Weights& w, int64_t index) {
    return "row " + std::to_string(index / w.row_length) + ", column " +
           std::to_string(index % w.row_length);
}

void check_block_size(const Weights& src, int format) {
    const FormatInfo& info = kernels().formats[format];
    if (src.row_length % info.block_size != 0) {
        fail("rows of " + std::to_string(src.row_length) + " weights are not whole blocks of " +
             std::to_string(info.block_size) + " weights of " + info.name);
    }
}

void encode(const std::string& dst, const std::string& src_type, const py::array& src,
            const py::array& out, const std::string& encoder, const py::object& importance) {
    Weights w = weights_of("src", src_type, src);
    set_importance(w, importance);
    const EncoderId id = find_encoder(encoder);
    const int format = find_format(dst);
    check_block_size(w, format);
    check_array(out, "out", 2, py::dtype::of<uint8_t>());
    check_writeable(out, "out");
    const int64_t out_length = row_length_of("out", format, out.shape(1));
    if (out.shape(0) != src.shape(0) || out_length != w.row_length) {
        fail("out holds " + std::to_string(out.shape(0)) + " rows of " +
             std::to_string(out_length) + " weights, src " + std::to_string(src.shape(0)) +
             " rows of " + std::to_string(w.row_length));
    }
    EncodeResult result;
    auto* bytes = static_cast<uint8_t*>(const_cast<void*>(out.data()));
    {
        const py::gil_scoped_release release;
        result = kernels().encode(w, id, format, bytes);
    }
    if (result.first_nonfinite >= 0) {
        fail("src holds NaN or infinity, first in " + place(w, result.first_nonfinite));
    }
    if (result.first_overflow >= 0) {
        fail("a block of src near " + place(w, result.first_overflow) + " is too large for " + dst +
             ": its scale overflows");
    }
}

void decode(const std::string& src_type, const py::array& src, const py::array& out) {
    const Weights w = weights_of("src", src_type, src);
    check_array(out, "out", 2, py::dtype::of<float>());
    check_writeable(out, "out");
    if (out.shape(0) != src.shape(0) || out.shape(1) != w.row_length) {
        fail("out has shape (" + std::to_string(out.shape(0)) + ", " +
             std::to_string(out.shape(1)) + "), expected (" + std::to_string(src.shape(0)) + ", " +
             std::to_string(w.row_length) + ")");
    }
    auto* floats = static_cast<float*>(const_cast<void*>(out.data()));
    const py::gil_scoped_release release;
    kernels().decode(w, floats);
}

// An error that overflowed is infinite, not NaN.
void settle(ErrorSums& sums) {
    if (!sums.overflow && std::isfinite(sums.squares)) return;
    sums.overflow = true;
    sums.squares = sums.max_square = std::numeric_limits<double>::infinity();
    sums.weighted_squares = std::numeric_limits<double>::infinity();
}

RowStats measure(const std::vector<std::string>& formats, const std::string& src_type,
                 const py::array& src, const std::string& encoder, const py::object& importance) {
    Weights w = weights_of("src", src_type, src);
    set_importance(w, importance);
    const EncoderId id = find_encoder(encoder);
    std::vector<int> indices;
    for (const auto& name : formats) {
        indices.push_back(find_format(name));
        check_block_size(w, indices.back());
    }
    if ((int)indices.size() > kernels().n_formats) fail("formats names a format twice");
    RowStats stats;
    stats.n_weights = w.n;
    std::vector<ErrorSums> errors(formats.size());
    {
        const py::gil_scoped_release release;
        kernels().measure(w, id, indices.data(), (int)indices.size(), stats.sums, errors.data());
    }
    for (size_t i = 0; i < formats.size(); ++i) {
        settle(errors[i]);
        stats.errors.push_back({formats[i], errors[i]});
    }
    return stats;
}

RowStats compare(const std::string& type_a, const py::array& a, const std::string& type_b,
                 const py::array& b, const py::object& importance) {
    Weights wa = weights_of("a", type_a, a);
    const Weights wb = weights_of("b", type_b, b);
    set_importance(wa, importance);
    if (a.shape(0) != b.shape(0) || wa.row_length != wb.row_length) {
        fail("a holds " + std::to_string(a.shape(0)) + " rows of " + std::to_string(wa.row_length) +
             " weights, b " + std::to_string(b.shape(0)) + " rows of " +
             std::to_string(wb.row_length));
    }
    RowStats stats;
    stats.n_weights = wa.n;
    ErrorSums error;
    {
        const py::gil_scoped_release release;
        kernels().compare(wa, wb, stats.sums, error);
    }
    settle(error);
    stats.errors.push_back({type_b, error});
    return stats;
}

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

// The first part's sums with the errors of all parts, and other weighted sums for both.
RowStats joined(const std::vector<RowStats>& parts, double sum_squares,
                const std::vector<double>& errors) {
    if (parts.empty()) fail("there are no parts to join");
    RowStats all = parts.front();
    all.errors.clear();
    all.sums.weighted_squares = sum_squares;
    for (const RowStats& part : parts) {
        all.errors.insert(all.errors.end(), part.errors.begin(), part.errors.end());
    }
    if (errors.size() != all.errors.size()) fail("there must be one error for each format");
    for (size_t i = 0; i < errors.size(); ++i) all.errors[i].sums.weighted_squares = errors[i];
    return all;
}

RowStats merged(const std::vector<RowStats>& parts) {
    if (parts.empty()) fail("there are no parts to merge");
    RowStats all = parts.front();
    for (size_t i = 1; i < parts.size(); ++i) merge(all, parts[i]);
    return all;
}

struct BlockFormat {
    FormatInfo info;
    bool encodable;  // by the kernels
};

std::vector<BlockFormat> formats() {
    const Kernels& k = kernels();
    std::vector<BlockFormat> all;
    all.reserve(static_cast<size_t>(k.n_formats));
    for (int i = 0; i < k.n_formats; ++i) all.push_back({k.formats[i], true});
#define X(name, id)
#define Y(name, id, block_size, block_bytes) \
    all.push_back({{#name, id, block_size, block_bytes}, false});
#include "formats.def"
#undef X
    std::sort(all.begin(), all.end(), [](const BlockFormat& a, const BlockFormat& b) {
        return a.info.type_id < b.info.type_id;
    });
    return all;
}

void bind_formats(py::module_& m) {
    py::class_<BlockFormat>(m, "BlockFormat", "A block format of ggml.")
        .def_property_readonly("name", [](const BlockFormat& f) { return f.info.name; })
        .def_property_readonly("type_id", [](const BlockFormat& f) { return f.info.type_id; })
        .def_property_readonly("block_size", [](const BlockFormat& f) { return f.info.block_size; })
        .def_property_readonly("block_bytes",
                               [](const BlockFormat& f) { return f.info.block_bytes; })
        .def_property_readonly(
            "bpw",
            [](const BlockFormat& f) { return 8.0 * f.info.block_bytes / f.info.block_size; })
        .def_readonly("encodable", &BlockFormat::encodable)
        .def("__repr__",
             [](const BlockFormat& f) { return "<BlockFormat " + std::string(f.info.name) + ">"; });
    m.def("formats", &formats, "All block formats, in the order of ggml's type ids.");
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
        .def_static("joined", &joined, py::arg("parts"), py::arg("sum_squares"), py::arg("errors"),
                    "The first part's sums with the errors of all, and other weighted sums.")
        .def_static("merged", &merged, py::arg("parts"), "The parts' sums, in their order.");
}

}  // namespace

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
    bind_formats(m);
    bind_stats(m);
    m.def("encode", &encode, py::arg("dst"), py::arg("src_type"), py::arg("src"), py::arg("out"),
          py::kw_only(), py::arg("encoder") = "rtn", py::arg("importance") = py::none(),
          "Fill out with the bytes of src in the format dst.");
    m.def("decode", &decode, py::arg("src_type"), py::arg("src"), py::arg("out"),
          "Fill out with the floats that src stands for.");
    m.def("measure", &measure, py::arg("formats"), py::arg("src_type"), py::arg("src"),
          py::kw_only(), py::arg("encoder") = "rtn", py::arg("importance") = py::none(),
          "Statistics of the weights and the error that each format would make, in one pass.");
    m.def("compare", &compare, py::arg("type_a"), py::arg("a"), py::arg("type_b"), py::arg("b"),
          py::kw_only(), py::arg("importance") = py::none(),
          "Statistics of a and the error of b against it, as measure adds them up.");
}

}  // namespace ramgguf
