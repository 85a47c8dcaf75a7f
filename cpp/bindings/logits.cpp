#include <pybind11/numpy.h>

#include <string>

#include "bindings/bindings.h"
#include "dispatch/dispatch.h"

namespace py = pybind11;

namespace ramgguf {
namespace {

using Rows = py::array_t<float, py::array::c_style>;
using Targets = py::array_t<int32_t, py::array::c_style>;

struct Shape {
    size_t n_rows;
    size_t n_vocab;
};

Shape check(const Rows& logits, const Targets& targets) {
    if (logits.ndim() != 2 || logits.shape(1) < 1) {
        throw std::invalid_argument("logits must have the shape (rows, vocabulary)");
    }
    if (targets.ndim() != 1 || targets.shape(0) != logits.shape(0)) {
        throw std::invalid_argument("targets must have one entry for each of the " +
                                    std::to_string(logits.shape(0)) + " rows of logits");
    }
    const auto n_vocab = logits.shape(1);
    const auto* target = targets.data();
    for (py::ssize_t i = 0; i < targets.shape(0); ++i) {
        if (target[i] < 0 || target[i] >= n_vocab) {
            throw std::invalid_argument("target " + std::to_string(target[i]) + " of row " +
                                        std::to_string(i) + " is outside the vocabulary of " +
                                        std::to_string(n_vocab));
        }
    }
    return {static_cast<size_t>(logits.shape(0)), static_cast<size_t>(n_vocab)};
}

py::array_t<RowScore> score(const Rows& logits, const Targets& targets) {
    const Shape shape = check(logits, targets);
    py::array_t<RowScore> out(logits.shape(0));
    const float* rows = logits.data();
    const int32_t* wanted = targets.data();
    RowScore* scores = out.mutable_data();
    py::gil_scoped_release release;
    active_level().logits->score(rows, wanted, shape.n_rows, shape.n_vocab, scores);
    return out;
}

py::array_t<RowDivergence> compare(const Rows& reference, const Rows& candidate,
                                   const Targets& targets) {
    const Shape shape = check(reference, targets);
    if (candidate.ndim() != 2 || candidate.shape(0) != reference.shape(0) ||
        candidate.shape(1) != reference.shape(1)) {
        throw std::invalid_argument("reference and candidate must have the same shape");
    }
    py::array_t<RowDivergence> out(reference.shape(0));
    const float* a = reference.data();
    const float* b = candidate.data();
    const int32_t* wanted = targets.data();
    RowDivergence* found = out.mutable_data();
    py::gil_scoped_release release;
    active_level().logits->compare(a, b, wanted, shape.n_rows, shape.n_vocab, found);
    return out;
}

py::array_t<float> exp_nonpositive(const py::array_t<float, py::array::c_style>& x) {
    if (x.ndim() != 1) throw std::invalid_argument("x must be one-dimensional");
    py::array_t<float> out(x.shape(0));
    active_level().logits->exp_nonpositive(x.data(), static_cast<size_t>(x.shape(0)),
                                           out.mutable_data());
    return out;
}

}  // namespace

void bind_logits(py::module_& m) {
    PYBIND11_NUMPY_DTYPE(RowScore, log_sum_exp, nll, target_p, top, broken);
    PYBIND11_NUMPY_DTYPE(RowDivergence, reference, candidate, kld, delta_p, same_top, broken);
    m.def("score_logits", &score, py::arg("logits").noconvert(), py::arg("targets").noconvert(),
          "Score each row of logits for its target token: a structured array, one record per row.");
    m.def("compare_logits", &compare, py::arg("reference").noconvert(),
          py::arg("candidate").noconvert(), py::arg("targets").noconvert(),
          "Compare rows of logits with a reference's: a structured array, one record per row.");
    m.def("exp_nonpositive", &exp_nonpositive, py::arg("x").noconvert(),
          "e^x for x <= 0, as the logits pass computes it (for tests).");
}

}  // namespace ramgguf
