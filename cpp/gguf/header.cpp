#include "gguf/header.h"

#include <algorithm>
#include <cstring>

#include "gguf/cursor.h"

namespace ramgguf {
namespace {

enum ValueType : uint32_t { kUint32 = 4, kString = 8, kArray = 9, kNumTypes = 13 };

// Bytes of one scalar of each value type; 0 where the size is not fixed.
constexpr uint64_t kScalarBytes[kNumTypes] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

void read_magic_and_version(Cursor& in, Header& header) {
    const uint8_t* magic = in.take(4, "the magic");
    if (std::memcmp(magic, "GGUF", 4) != 0) fail(0, "this is no GGUF file: it lacks the magic");
    header.version = in.number<uint32_t>("the version");
    if (header.version != 0 && (header.version & 0xFFFF) == 0) {
        fail(4, "the file is big-endian; convert it to little-endian first");
    }
    if (header.version != 2 && header.version != 3) {
        fail(4,
             "GGUF version " + std::to_string(header.version) + " is not supported; 2 and 3 are");
    }
}

void skip_value(Cursor& in, KeySpan& span, const std::string& what) {
    if (span.type >= kNumTypes) {
        fail(in.position() - 4, what + " has an unknown value type " + std::to_string(span.type));
    }
    const std::string value = "the value of " + what;
    if (span.type == kString) {
        in.take(in.number<uint64_t>(value), value);
    } else if (span.type != kArray) {
        in.take(kScalarBytes[span.type], value);
    } else {
        span.item_type = in.number<uint32_t>(value);
        if (span.item_type >= kNumTypes || span.item_type == kArray) {
            fail(in.position() - 4,
                 what + " is an array of " +
                     (span.item_type == kArray ? "arrays" : "an unknown type ") +
                     (span.item_type == kArray ? std::string(", which ggml refuses")
                                               : std::to_string(span.item_type)));
        }
        const uint64_t start = in.position();
        span.n_items = in.number<uint64_t>(value);
        const uint64_t item_bytes = kScalarBytes[span.item_type];
        if (span.n_items > UINT64_MAX / 8) {
            fail(start, what + " declares " + std::to_string(span.n_items) + " items");
        }
        if (item_bytes != 0) {
            in.take(span.n_items * item_bytes, value);
        } else {
            for (uint64_t i = 0; i < span.n_items; ++i) in.take(in.number<uint64_t>(value), value);
        }
    }
}

KeySpan read_key(Cursor& in, uint64_t index) {
    KeySpan span{};
    span.begin = in.position();
    span.key = in.name(kMaxKeyBytes, "key " + std::to_string(index));
    const std::string what = quoted("key", span.key);
    span.type = in.number<uint32_t>("the type of " + what);
    span.value_begin = in.position();
    skip_value(in, span, what);
    span.end = in.position();
    return span;
}

uint64_t round_up(uint64_t n, uint64_t alignment) {
    return (n + alignment - 1) & ~(alignment - 1);
}

uint32_t read_alignment(const KeySpan& span, const uint8_t* data) {
    if (span.type != kUint32) fail(span.begin, "general.alignment must be a uint32");
    uint32_t alignment;
    std::memcpy(&alignment, data + span.value_begin, sizeof alignment);
    if (alignment == 0 || (alignment & (alignment - 1)) != 0) {
        fail(span.value_begin,
             "general.alignment is " + std::to_string(alignment) + ", which is no power of two");
    }
    return alignment;
}

std::vector<uint64_t> read_shape(Cursor& in, const std::string& what) {
    const uint64_t start = in.position();
    const uint32_t n_dims = in.number<uint32_t>("the shape of " + what);
    if (n_dims > kMaxDims) {
        fail(start, what + " has " + std::to_string(n_dims) + " dimensions; at most 4 are allowed");
    }
    std::vector<uint64_t> shape;
    uint64_t n_weights = 1;
    for (uint32_t i = 0; i < n_dims; ++i) {
        const uint64_t at = in.position();
        const uint64_t ne = in.number<uint64_t>("the shape of " + what);
        if (ne == 0) fail(at, what + " has a dimension of 0");
        if (ne > static_cast<uint64_t>(INT64_MAX) / n_weights) {
            fail(at, what + " has a shape whose number of weights overflows");
        }
        n_weights *= ne;
        shape.push_back(ne);
    }
    if (shape.empty()) shape.push_back(1);  // a scalar
    return shape;
}

uint64_t data_bytes(const TensorSpan& tensor, const BlockType& type, uint64_t at,
                    const std::string& what) {
    if (tensor.shape[0] % type.block_weights != 0) {
        fail(at, what + " has rows of " + std::to_string(tensor.shape[0]) +
                     " weights, no multiple of the " + std::to_string(type.block_weights) +
                     " of its type " + std::to_string(type.id));
    }
    uint64_t n_rows = 1;
    for (size_t i = 1; i < tensor.shape.size(); ++i) n_rows *= tensor.shape[i];
    const uint64_t n_blocks = tensor.shape[0] / type.block_weights;
    // A row is of at most INT64_MAX weights, which read_shape has seen to.
    const uint64_t most = static_cast<uint64_t>(INT64_MAX) / n_rows;
    if (n_blocks > most / type.block_bytes || type.row_bytes > most - n_blocks * type.block_bytes) {
        fail(at, what + " has a size in bytes that overflows");
    }
    return n_rows * (n_blocks * type.block_bytes + type.row_bytes);
}

TensorSpan read_tensor(Cursor& in, uint64_t index, uint32_t alignment,
                       const std::vector<BlockType>& types) {
    TensorSpan tensor{};
    tensor.name = in.name(kMaxNameBytes, "tensor " + std::to_string(index));
    const std::string what = quoted("tensor", tensor.name);
    tensor.shape = read_shape(in, what);
    const uint64_t at = in.position();
    tensor.type = in.number<uint32_t>("the type of " + what);
    const auto type = std::find_if(types.begin(), types.end(),
                                   [&](const BlockType& t) { return t.id == tensor.type; });
    if (type == types.end()) {
        fail(at, what + " is of an unknown type " + std::to_string(tensor.type));
    }
    tensor.n_bytes = data_bytes(tensor, *type, at, what);
    const uint64_t offset_at = in.position();
    // From data_offset on; place_tensors makes it absolute.
    tensor.offset = in.number<uint64_t>("the offset of " + what);
    if (tensor.offset % alignment != 0) {
        fail(offset_at, what + " has its data at offset " + std::to_string(tensor.offset) +
                            ", no multiple of the alignment " + std::to_string(alignment));
    }
    return tensor;
}

// Refuses the first name in the file that stood there before.
template <typename Span, typename Name>
void refuse_duplicates(const std::vector<Span>& spans, Name name_of, const char* kind) {
    std::vector<size_t> order(spans.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    // Sorting, unlike hashing, has no worst case that a file could provoke.
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
        const int c = name_of(spans[a]).compare(name_of(spans[b]));
        return c != 0 ? c < 0 : a < b;
    });
    size_t first = spans.size();
    for (size_t i = 1; i < order.size(); ++i) {
        if (name_of(spans[order[i]]) == name_of(spans[order[i - 1]])) {
            first = std::min(first, order[i]);
        }
    }
    if (first < spans.size()) {
        throw HeaderError(quoted(kind, name_of(spans[first])) +
                          " is there twice, again as number " + std::to_string(first));
    }
}

// Makes offsets absolute; refuses data outside the file or shared by two tensors.
void place_tensors(Header& header, uint64_t n_file) {
    std::vector<const TensorSpan*> by_offset;
    for (auto& tensor : header.tensors) {
        const uint64_t room = n_file - std::min(n_file, header.data_offset);
        if (tensor.offset > room || tensor.n_bytes > room - tensor.offset) {
            throw HeaderError(quoted("tensor", tensor.name) + " lies outside the file: its " +
                              std::to_string(tensor.n_bytes) + " bytes begin at byte " +
                              std::to_string(header.data_offset) + " + " +
                              std::to_string(tensor.offset) + " and the file has " +
                              std::to_string(n_file) + "; is it cut short?");
        }
        tensor.offset += header.data_offset;
        by_offset.push_back(&tensor);
    }
    std::sort(by_offset.begin(), by_offset.end(),
              [](const TensorSpan* a, const TensorSpan* b) { return a->offset < b->offset; });
    for (size_t i = 1; i < by_offset.size(); ++i) {
        const auto& before = *by_offset[i - 1];
        const auto& tensor = *by_offset[i];
        if (before.offset + before.n_bytes > tensor.offset) {
            fail(tensor.offset,
                 quoted("tensor", tensor.name) + " overlaps " + quoted("tensor", before.name));
        }
    }
}

uint64_t read_count(Cursor& in, uint64_t limit, const char* what) {
    const uint64_t at = in.position();
    const uint64_t n = in.number<uint64_t>(std::string("the number of ") + what);
    if (n > limit) {
        fail(at, "the file declares " + std::to_string(n) + " " + what + "; at most " +
                     std::to_string(limit) + " are supported");
    }
    return n;
}

}  // namespace

Header scan_header(const uint8_t* data, uint64_t n_data, uint64_t n_file,
                   const std::vector<BlockType>& types) {
    Cursor in(data, n_data, n_file);
    Header header;
    read_magic_and_version(in, header);
    const uint64_t n_tensors = read_count(in, kMaxTensors, "tensors");
    const uint64_t n_keys = read_count(in, kMaxKeys, "keys");
    for (uint64_t i = 0; i < n_keys; ++i) header.keys.push_back(read_key(in, i));
    refuse_duplicates(header.keys, [](const KeySpan& s) -> auto& { return s.key; }, "key");
    for (const auto& span : header.keys) {
        if (span.key == "general.alignment") header.alignment = read_alignment(span, data);
    }
    header.info_offset = in.position();
    for (uint64_t i = 0; i < n_tensors; ++i) {
        header.tensors.push_back(read_tensor(in, i, header.alignment, types));
    }
    refuse_duplicates(
        header.tensors, [](const TensorSpan& s) -> auto& { return s.name; }, "tensor");
    header.info_end = in.position();
    header.data_offset = round_up(header.info_end, header.alignment);
    place_tensors(header, n_file);
    return header;
}

}  // namespace ramgguf
