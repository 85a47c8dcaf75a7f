#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "dispatch/dispatch.h"

namespace py = pybind11;

namespace ramgguf {
namespace {

constexpr py::ssize_t kUnit = 256;
using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

std::vector<std::string> gptq_formats() {
    std::vector<std::string> names;
    for (int i = 0; i < codec().n_formats; ++i) {
        if (active_level().gptq->supports(i)) names.emplace_back(codec().formats[i].name);
    }
    return names;
}

int find(const std::string& name) {
    const int format = find_format(name);
    if (active_level().gptq->supports(format)) return format;
    std::string known;
    for (const std::string& other : gptq_formats()) known += (known.empty() ? "" : ", ") + other;
    fail("format '" + name + "' has no error feedback; known are " + known);
}

int64_t block_bytes(int format, py::ssize_t n_columns) {
    const FormatInfo& info = codec().formats[format];
    if (n_columns % info.block_size) {
        fail(std::to_string(n_columns) + " columns are no whole blocks of " + info.name);
    }
    return n_columns / info.block_size * info.block_bytes;
}

void check(bool sound, const std::string& message) {
    if (!sound) fail(message);
}

// The distance of x's rows in floats. x may be a slice of columns of a C-contiguous matrix.
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
    const int64_t n_bytes = block_bytes(number, n);
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

py::array_t<double> descend(const std::string& format, const Floats& w, const Floats& hessian,
                            Bytes& blocks, int n_sweeps) {
    const int number = find(format);
    check(w.ndim() == 2 && w.shape(1) >= 1, "w must have the shape (rows, columns)");
    const py::ssize_t n_rows = w.shape(0), n = w.shape(1);
    check(hessian.ndim() == 2 && hessian.shape(0) == n && hessian.shape(1) == n,
          "hessian must have the shape (" + std::to_string(n) + ", " + std::to_string(n) + ")");
    const int64_t n_bytes = block_bytes(number, n);
    check(blocks.ndim() == 2 && blocks.shape(0) == n_rows && blocks.shape(1) == n_bytes,
          "blocks must have the shape (" + std::to_string(n_rows) + ", " + std::to_string(n_bytes) +
              ")");
    check(n_sweeps >= 1, "n_sweeps must be at least 1");
    const Descent& descent = *active_level().descent;
    py::array_t<double> errors({n_rows, (py::ssize_t)2});
    const DescentRows rows = {w.data(), n_rows, n, hessian.data(), n_sweeps};
    uint8_t* bytes = blocks.mutable_data();
    double* found = errors.mutable_data();
    {
        const py::gil_scoped_release release;
        const std::unique_ptr<float[]> scratch(new float[descent.n_scratch(n)]);
        descent.descend(number, rows, bytes, scratch.get(), found);
    }
    return errors;
}

void round_points(py::array_t<float>& x, const Floats& factor, const Floats& scales,
                  const Floats& magnitudes, bool even_signs, py::array_t<uint16_t>& points,
                  Bytes& signs, Floats& errors) {
    const py::ssize_t stride = row_stride(x), n_rows = x.shape(0);
    check(x.shape(1) == kUnit, "x must have 256 columns");
    check(factor.ndim() == 2 && factor.shape(0) == kUnit && factor.shape(1) == kUnit,
          "factor must have the shape (256, 256)");
    check(magnitudes.ndim() == 2 && (magnitudes.shape(0) == 4 || magnitudes.shape(0) == 8),
          "magnitudes must have the shape (4 or 8, points)");
    const py::ssize_t group = magnitudes.shape(0), n_points = magnitudes.shape(1);
    check(n_points >= 16 && n_points % 16 == 0 && n_points <= 65536,
          "the number of points must be a multiple of 16, at most 65536");
    check(scales.ndim() == 2 && scales.shape(0) == n_rows &&
              (scales.shape(1) == 8 || scales.shape(1) == 16 || scales.shape(1) == 32),
          "scales must have the shape (rows, 8, 16 or 32)");
    check(points.ndim() == 2 && points.shape(0) == n_rows && points.shape(1) == kUnit / group,
          "points must have the shape (rows, " + std::to_string(kUnit / group) + ")");
    check(signs.ndim() == 2 && signs.shape(0) == n_rows && signs.shape(1) == kUnit / 8,
          "signs must have the shape (rows, 32)");
    check(errors.ndim() == 2 && errors.shape(0) == n_rows && errors.shape(1) == kUnit,
          "errors must have the shape (rows, 256)");
    const Codebook book = {magnitudes.data(), (int)n_points, (int)group, even_signs};
    const PointRows rows = {x.mutable_data(), n_rows,        stride,
                            factor.data(),    scales.data(), (int)(kUnit / scales.shape(1))};
    uint16_t* numbers = points.mutable_data();
    uint8_t* negative = signs.mutable_data();
    float* found = errors.mutable_data();
    const py::gil_scoped_release release;
    active_level().points->round(book, rows, numbers, negative, found);
}

}  // namespace

void bind_gptq(py::module_& m) {
    m.def("round_unit", &round_unit, py::arg("format"), py::arg("x").noconvert(),
          py::arg("factor").noconvert(), py::arg("importance").noconvert(),
          py::arg("out").noconvert(), py::arg("errors").noconvert(),
          "Round a unit of columns one by one, with error feedback, into blocks of a format.");
    m.def("descend", &descend, py::arg("format"), py::arg("w").noconvert(),
          py::arg("hessian").noconvert(), py::arg("blocks").noconvert(), py::arg("n_sweeps"),
          "Lower the error of the output of encoded rows by changing codes and scales.");
    m.def("round_points", &round_points, py::arg("x").noconvert(), py::arg("factor").noconvert(),
          py::arg("scales").noconvert(), py::arg("magnitudes").noconvert(), py::arg("even_signs"),
          py::arg("points").noconvert(), py::arg("signs").noconvert(),
          py::arg("errors").noconvert(),
          "Round a unit of columns to points of a codebook, with error feedback.");
    m.def("gptq_formats", &gptq_formats, "The formats that round_unit supports.");
}

}  // namespace ramgguf
