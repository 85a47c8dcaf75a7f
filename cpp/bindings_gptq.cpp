#include <pybind11/numpy.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "dispatch.h"

namespace py = pybind11;

namespace ramgguf {
namespace {

constexpr py::ssize_t kUnit = 256;
using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

int find(const std::string& name) {
    const Gptq& gptq = *active_level().gptq;
    std::string known;
    for (int i = 0; i < gptq.n_formats; ++i) {
        if (name == gptq.formats[i]) return i;
        known += (i ? ", " : "") + std::string(gptq.formats[i]);
    }
    throw std::invalid_argument("format '" + name + "' has no error feedback; known are " + known);
}

int64_t block_bytes(const std::string& name, py::ssize_t n_columns) {
    const Kernels& kernels = *active_level().kernels;
    for (int i = 0; i < kernels.n_formats; ++i) {
        const FormatInfo& format = kernels.formats[i];
        if (name != format.name) continue;
        if (n_columns % format.block_size) {
            throw std::invalid_argument(std::to_string(n_columns) +
                                        " columns are no whole blocks of " + name);
        }
        return n_columns / format.block_size * format.block_bytes;
    }
    throw std::invalid_argument("format '" + name + "' is unknown");
}

void check(bool sound, const std::string& message) {
    if (!sound) throw std::invalid_argument(message);
}

// x is a slice of columns of a C-contiguous matrix, so only its rows may lie apart.
py::ssize_t row_stride(const py::array_t<float>& x) {
    check(x.ndim() == 2 && x.shape(1) >= 1 && x.shape(1) <= kUnit,
          "x must have the shape (rows, up to 256 columns)");
    check(x.shape(1) == 1 || x.strides(1) == (py::ssize_t)sizeof(float),
          "the columns of x must lie side by side");
    check(x.strides(0) % (py::ssize_t)sizeof(float) == 0 && x.strides(0) > 0,
          "the rows of x must lie in order");
    return x.strides(0) / (py::ssize_t)sizeof(float);
}

void round_unit(const std::string& format, py::array_t<float>& x, const Floats& factor,
                const Floats& importance, Bytes& out, Floats& errors) {
    const int number = find(format);
    const py::ssize_t stride = row_stride(x), n_rows = x.shape(0), n = x.shape(1);
    check(factor.ndim() == 2 && factor.shape(0) == kUnit && factor.shape(1) == kUnit,
          "factor must have the shape (256, 256)");
    check(importance.ndim() == 1 && importance.shape(0) == kUnit,
          "importance must have 256 entries");
    const int64_t n_bytes = block_bytes(format, n);
    check(out.ndim() == 2 && out.shape(0) == n_rows && out.shape(1) == n_bytes,
          "out must have the shape (rows, " + std::to_string(n_bytes) + ")");
    check(errors.ndim() == 2 && errors.shape(0) == n_rows && errors.shape(1) == n,
          "errors must have the shape of x");
    const GptqRows rows = {x.mutable_data(), n_rows,        stride,
                           (int)n,           factor.data(), importance.data()};
    uint8_t* bytes = out.mutable_data();
    float* found = errors.mutable_data();
    int64_t overflow = -1;
    {
        py::gil_scoped_release release;
        overflow = active_level().gptq->round(number, rows, bytes, n_bytes, found);
    }
    check(overflow < 0,
          "a scale of row " + std::to_string(overflow) + " would overflow F16 in " + format);
}

py::list gptq_formats() {
    py::list names;
    const Gptq& gptq = *active_level().gptq;
    for (int i = 0; i < gptq.n_formats; ++i) names.append(gptq.formats[i]);
    return names;
}

}  // namespace

void bind_gptq(py::module_& m) {
    m.def("round_unit", &round_unit, py::arg("format"), py::arg("x").noconvert(),
          py::arg("factor").noconvert(), py::arg("importance").noconvert(),
          py::arg("out").noconvert(), py::arg("errors").noconvert(),
          "Round a unit of columns one by one, with error feedback, into blocks of a format.");
    m.def("gptq_formats", &gptq_formats, "The formats that round_unit knows.");
}

}  // namespace ramgguf
