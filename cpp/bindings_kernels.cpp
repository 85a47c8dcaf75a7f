// Block formats in Python: takes arrays apart, releases the GIL and calls the active ISA level.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "bindings.h"
#include "bindings_arguments.h"
#include "bindings_stats.h"
#include "dispatch.h"

namespace py = pybind11;

namespace ramgguf {
namespace {

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
