// Block formats in Python: checks arrays, releases the GIL and calls the active ISA level.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "bindings/stats.h"
#include "dispatch/dispatch.h"

namespace py = pybind11;

namespace ramgguf {
namespace {

// A job is one call of a kernel, in three steps: the constructor checks the arguments (with the
// GIL), run() calls the kernel (without it), finish() raises or returns (with it again).
struct EncodeJob {
    Weights w;
    EncoderId encoder;
    int format;
    uint8_t* out;
    EncodeResult result{};

    EncodeJob(const std::string& dst, const std::string& src_type, const py::array& src,
              const py::array& blocks, const py::object& importance, EncoderId id)
        : w(weights_of("src", src_type, src)), encoder(id), format(find_format(dst)) {
        set_importance(w, importance);
        check_block_size(w, format);
        check_array(blocks, "out", 2, py::dtype::of<uint8_t>());
        check_writeable(blocks, "out");
        const int64_t out_length = row_length_of("out", format, blocks.shape(1));
        if (blocks.shape(0) != src.shape(0) || out_length != w.row_length) {
            fail("out holds " + std::to_string(blocks.shape(0)) + " rows of " +
                 std::to_string(out_length) + " weights, src " + std::to_string(src.shape(0)) +
                 " rows of " + std::to_string(w.row_length));
        }
        out = static_cast<uint8_t*>(const_cast<void*>(blocks.data()));
    }

    void run() { result = codec().encode(w, encoder, format, out); }

    void finish() const {
        if (result.first_nonfinite >= 0) {
            fail("src holds NaN or infinity, first in " + place(w, result.first_nonfinite));
        }
        if (result.first_overflow >= 0) {
            fail("a block of src near " + place(w, result.first_overflow) + " is too large for " +
                 codec().formats[format].name + ": its scale overflows");
        }
    }
};

struct MeasureJob {
    Weights w;
    EncoderId encoder;
    std::vector<int> formats;
    std::vector<ErrorSums> errors;
    RowStats stats;

    MeasureJob(const std::vector<std::string>& names, const std::string& src_type,
               const py::array& src, const py::object& importance, EncoderId id)
        : w(weights_of("src", src_type, src)), encoder(id), errors(names.size()) {
        set_importance(w, importance);
        formats.reserve(names.size());
        for (const auto& name : names) {
            formats.push_back(find_format(name));
            check_block_size(w, formats.back());
        }
        if ((int)formats.size() > codec().n_formats) fail("formats names a format twice");
        stats.n_weights = w.n;
    }

    void run() {
        codec().measure(w, encoder, formats.data(), (int)formats.size(), stats.sums, errors.data());
    }

    RowStats finish() {
        stats.errors.reserve(errors.size());
        for (size_t i = 0; i < errors.size(); ++i) {
            settle(errors[i]);
            stats.errors.push_back({codec().formats[formats[i]].name, errors[i]});
        }
        return std::move(stats);
    }
};

struct CompareJob {
    Weights a, b;
    ErrorSums error{};
    RowStats stats;

    CompareJob(const std::string& type_a, const py::array& rows_a, const std::string& type_b,
               const py::array& rows_b, const py::object& importance)
        : a(weights_of("a", type_a, rows_a)), b(weights_of("b", type_b, rows_b)) {
        set_importance(a, importance);
        if (rows_a.shape(0) != rows_b.shape(0) || a.row_length != b.row_length) {
            fail("a holds " + std::to_string(rows_a.shape(0)) + " rows of " +
                 std::to_string(a.row_length) + " weights, b " + std::to_string(rows_b.shape(0)) +
                 " rows of " + std::to_string(b.row_length));
        }
        stats.n_weights = a.n;
    }

    void run() { codec().compare(a, b, stats.sums, error); }

    RowStats finish() {
        settle(error);
        stats.errors.push_back({codec().formats[b.format].name, error});
        return std::move(stats);
    }
};

template <class Job>
void run_all(std::vector<Job>& jobs) {
    const py::gil_scoped_release release;
    for (Job& job : jobs) job.run();
}

template <class Job>
std::vector<RowStats> stats_of(std::vector<Job> jobs) {
    run_all(jobs);
    std::vector<RowStats> stats;
    stats.reserve(jobs.size());
    for (Job& job : jobs) stats.push_back(job.finish());
    return stats;
}

using EncodeArguments = std::tuple<std::string, std::string, py::array, py::array, py::object>;
using MeasureArguments = std::tuple<std::vector<std::string>, std::string, py::array, py::object>;
using CompareArguments = std::tuple<std::string, py::array, std::string, py::array, py::object>;

void encode_many(const std::vector<EncodeArguments>& all, const std::string& encoder) {
    const EncoderId id = find_encoder(encoder);
    std::vector<EncodeJob> jobs;
    jobs.reserve(all.size());
    for (const auto& [dst, src_type, src, out, importance] : all) {
        jobs.emplace_back(dst, src_type, src, out, importance, id);
    }
    run_all(jobs);
    for (const EncodeJob& job : jobs) job.finish();
}

void encode(const std::string& dst, const std::string& src_type, const py::array& src,
            const py::array& out, const std::string& encoder, const py::object& importance) {
    encode_many({{dst, src_type, src, out, importance}}, encoder);
}

std::vector<RowStats> measure_many(const std::vector<MeasureArguments>& all,
                                   const std::string& encoder) {
    const EncoderId id = find_encoder(encoder);
    std::vector<MeasureJob> jobs;
    jobs.reserve(all.size());
    for (const auto& [formats, src_type, src, importance] : all) {
        jobs.emplace_back(formats, src_type, src, importance, id);
    }
    return stats_of(std::move(jobs));
}

RowStats measure(const std::vector<std::string>& formats, const std::string& src_type,
                 const py::array& src, const std::string& encoder, const py::object& importance) {
    return measure_many({{formats, src_type, src, importance}}, encoder).front();
}

std::vector<RowStats> compare_many(const std::vector<CompareArguments>& all) {
    std::vector<CompareJob> jobs;
    jobs.reserve(all.size());
    for (const auto& [type_a, a, type_b, b, importance] : all) {
        jobs.emplace_back(type_a, a, type_b, b, importance);
    }
    return stats_of(std::move(jobs));
}

RowStats compare(const std::string& type_a, const py::array& a, const std::string& type_b,
                 const py::array& b, const py::object& importance) {
    return compare_many({{type_a, a, type_b, b, importance}}).front();
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
    codec().decode(w, floats);
}

struct BlockFormat {
    FormatInfo info;
    bool encodable;  // by the kernels
};

std::vector<BlockFormat> formats() {
    const Codec& c = codec();
    std::vector<BlockFormat> all;
    all.reserve(static_cast<size_t>(c.n_formats));
    for (int i = 0; i < c.n_formats; ++i) all.push_back({c.formats[i], true});
#define X(name, id, block_size, block_bytes)
#define Y(name, id, block_size, block_bytes) \
    all.push_back({{#name, id, block_size, block_bytes}, false});
#include "formats/formats.def"
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

void bind_codec(py::module_& m) {
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
    m.def("encode_many", &encode_many, py::arg("jobs"), py::kw_only(), py::arg("encoder") = "rtn",
          "encode for each (dst, src_type, src, out, importance); the GIL is released once for "
          "all.");
    m.def("decode", &decode, py::arg("src_type"), py::arg("src"), py::arg("out"),
          "Fill out with the weights of src as floats.");
    m.def("measure", &measure, py::arg("formats"), py::arg("src_type"), py::arg("src"),
          py::kw_only(), py::arg("encoder") = "rtn", py::arg("importance") = py::none(),
          "Statistics of the weights and the error of each format, in one pass.");
    m.def("measure_many", &measure_many, py::arg("jobs"), py::kw_only(), py::arg("encoder") = "rtn",
          "measure for each (formats, src_type, src, importance); the GIL is released once for "
          "all.");
    m.def("compare", &compare, py::arg("type_a"), py::arg("a"), py::arg("type_b"), py::arg("b"),
          py::kw_only(), py::arg("importance") = py::none(),
          "Statistics of a and the error of b against it, added up in the order of measure.");
    m.def("compare_many", &compare_many, py::arg("jobs"),
          "compare for each (type_a, a, type_b, b, importance); the GIL is released once for "
          "all.");
}

}  // namespace ramgguf
