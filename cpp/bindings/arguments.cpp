#include "bindings/arguments.h"

#include <cmath>
#include <stdexcept>

namespace py = pybind11;

namespace ramgguf {
namespace {

void check_dtype(const py::array& a, const char* what, const py::dtype& dtype) {
    if (!a.dtype().is(dtype) && !a.dtype().equal(dtype)) {
        fail(std::string(what) + " has dtype " +
             py::str(py::object(a.dtype())).cast<std::string>() + ", expected " +
             py::str(py::object(dtype)).cast<std::string>());
    }
}

}  // namespace

const Codec& codec() {
    return *active_level().codec;
}

void fail(const std::string& message) {
    throw std::invalid_argument(message);
}

int find_format(const std::string& name) {
    const Codec& c = codec();
    for (int i = 0; i < c.n_formats; ++i) {
        if (name == c.formats[i].name) return i;
    }
    std::string known;
    for (int i = 0; i < c.n_formats; ++i) {
        known += (i ? ", " : "") + std::string(c.formats[i].name);
    }
    fail("format '" + name + "' is unknown; known are " + known);
}

EncoderId find_encoder(const std::string& name) {
    if (name == "rtn") return kRtn;
    if (name == "search") return kSearch;
    fail("encoder '" + name + "' is unknown; known are rtn, search");
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

int64_t row_length_of(const char* what, int format, int64_t row_bytes) {
    const FormatInfo& info = codec().formats[format];
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
    const FormatInfo& info = codec().formats[format];
    if (src.row_length % info.block_size != 0) {
        fail("rows of " + std::to_string(src.row_length) + " weights are not whole blocks of " +
             std::to_string(info.block_size) + " weights of " + info.name);
    }
}

}  // namespace ramgguf
