#include <pybind11/numpy.h>

#include <memory>
#include <stdexcept>

#include "bindings/bindings.h"
#include "dispatch/dispatch.h"

namespace py = pybind11;

namespace ramgguf {
namespace {

using Matrix = py::array_t<float, py::array::c_style>;

void add_gram(const Matrix& x, Matrix& gram) {
    if (x.ndim() != 2 || x.shape(1) < 1) {
        throw std::invalid_argument("x must have the shape (rows, columns)");
    }
    if (gram.ndim() != 2 || gram.shape(0) != x.shape(1) || gram.shape(1) != x.shape(1)) {
        throw std::invalid_argument("gram must have the shape (columns, columns), columns " +
                                    std::to_string(x.shape(1)));
    }
    const auto n_rows = static_cast<size_t>(x.shape(0)), n = static_cast<size_t>(x.shape(1));
    const float* rows = x.data();
    float* out = gram.mutable_data();
    py::gil_scoped_release release;
    const size_t columns = (n + Gram::kScratchColumns - 1) / Gram::kScratchColumns;
    const std::unique_ptr<float[]> scratch(
        new float[Gram::kScratchRows * columns * Gram::kScratchColumns]);
    active_level().gram->add(rows, n_rows, n, scratch.get(), out);
}

}  // namespace

void bind_gram(py::module_& m) {
    m.def("add_gram", &add_gram, py::arg("x").noconvert(), py::arg("gram").noconvert(),
          "Add x^T x to gram, both float32 and contiguous.");
}

}  // namespace ramgguf
