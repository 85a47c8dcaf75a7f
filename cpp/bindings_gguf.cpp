// GGUF header scanner: takes a buffer, returns spans.
#include "bindings.h"
#include "gguf_header.h"

#include <pybind11/stl.h>

#include <optional>
#include <tuple>

namespace py = pybind11;

namespace ramgguf {
namespace {

using TypeRow = std::tuple<uint32_t, uint32_t, uint32_t>;

std::optional<Header> scan(const py::buffer& buffer, uint64_t n_file,
                           const std::vector<TypeRow>& rows) {
    const py::buffer_info info = buffer.request();
    if (info.ndim != 1 || info.itemsize != 1 || info.strides[0] != 1) {
        throw py::value_error("the header must be a contiguous buffer of bytes");
    }
    std::vector<BlockType> types;
    for (const auto& [id, block_weights, block_bytes] : rows) {
        if (block_weights == 0 || block_bytes == 0) throw py::value_error("a type without size");
        types.push_back({id, block_weights, block_bytes});
    }
    const py::gil_scoped_release unlocked;
    try {
        return scan_header(static_cast<const uint8_t*>(info.ptr), static_cast<uint64_t>(info.size),
                           n_file, types);
    } catch (const NeedMoreBytes&) {
        return std::nullopt;
    }
}

}  // namespace

void bind_gguf(py::module_& m) {
    py::register_exception<HeaderError>(m, "HeaderError", PyExc_ValueError);
    py::class_<KeySpan>(m, "KeySpan")
        .def_readonly("key", &KeySpan::key)
        .def_readonly("type", &KeySpan::type)
        .def_readonly("item_type", &KeySpan::item_type)
        .def_readonly("n_items", &KeySpan::n_items)
        .def_readonly("begin", &KeySpan::begin)
        .def_readonly("value_begin", &KeySpan::value_begin)
        .def_readonly("end", &KeySpan::end);
    py::class_<TensorSpan>(m, "TensorSpan")
        .def_readonly("name", &TensorSpan::name)
        .def_property_readonly("shape",
                               [](const TensorSpan& t) { return py::tuple(py::cast(t.shape)); })
        .def_readonly("type", &TensorSpan::type)
        .def_readonly("offset", &TensorSpan::offset)
        .def_readonly("n_bytes", &TensorSpan::n_bytes);
    py::class_<Header>(m, "Header")
        .def_readonly("version", &Header::version)
        .def_readonly("alignment", &Header::alignment)
        .def_readonly("info_offset", &Header::info_offset)
        .def_readonly("info_end", &Header::info_end)
        .def_readonly("data_offset", &Header::data_offset)
        .def_readonly("keys", &Header::keys)
        .def_readonly("tensors", &Header::tensors);
    m.def("scan_header", &scan, py::arg("buffer"), py::arg("n_file"), py::arg("types"),
          "Scan a GGUF header; None when it goes on beyond the buffer.");
}

}  // namespace ramgguf
