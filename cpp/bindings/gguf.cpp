// The GGUF header scanner in Python: takes a buffer, returns spans.
#include <pybind11/stl.h>

#include <tuple>
#include <variant>

#include "bindings/bindings.h"
#include "gguf/header.h"

namespace py = pybind11;

namespace ramgguf {
namespace {

using TypeRow = std::tuple<uint32_t, uint32_t, uint32_t, uint32_t>;

std::variant<Header, uint64_t> scan(const py::buffer& buffer, uint64_t n_file,
                                    const std::vector<TypeRow>& rows) {
    const py::buffer_info info = buffer.request();
    if (info.ndim != 1 || info.itemsize != 1 || info.strides[0] != 1) {
        throw py::value_error("the header must be a contiguous buffer of bytes");
    }
    std::vector<BlockType> types;
    for (const auto& [id, block_weights, block_bytes, row_bytes] : rows) {
        if (block_weights == 0 || block_bytes == 0) throw py::value_error("a type without size");
        types.push_back({id, block_weights, block_bytes, row_bytes});
    }
    const py::gil_scoped_release unlocked;
    try {
        return scan_header(static_cast<const uint8_t*>(info.ptr), static_cast<uint64_t>(info.size),
                           n_file, types);
    } catch (const NeedMoreBytes& more) {
        return more.end;
    }
}

// Plain tuples: a wrapped object for each span would take longer than the scan.
py::list key_rows(const Header& header) {
    py::list rows;
    for (const auto& s : header.keys) {
        rows.append(
            py::make_tuple(s.key, s.type, s.item_type, s.n_items, s.begin, s.value_begin, s.end));
    }
    return rows;
}

py::list tensor_rows(const Header& header) {
    py::list rows;
    for (const auto& t : header.tensors) {
        rows.append(
            py::make_tuple(t.name, py::tuple(py::cast(t.shape)), t.type, t.offset, t.n_bytes));
    }
    return rows;
}

}  // namespace

void bind_gguf(py::module_& m) {
    py::register_exception<HeaderError>(m, "HeaderError", PyExc_ValueError);
    py::class_<Header>(m, "Header")
        .def_readonly("version", &Header::version)
        .def_readonly("alignment", &Header::alignment)
        .def_readonly("info_offset", &Header::info_offset)
        .def_readonly("info_end", &Header::info_end)
        .def_readonly("data_offset", &Header::data_offset)
        .def_property_readonly("keys", &key_rows)
        .def_property_readonly("tensors", &tensor_rows);
    m.def(
        "scan_header", &scan, py::arg("buffer"), py::arg("n_file"), py::arg("types"),
        "Scan a GGUF header; where it goes on beyond the buffer, the bytes that it has at least.");
}

}  // namespace ramgguf
