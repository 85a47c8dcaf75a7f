// Bounds-checked scanner of a GGUF header: where every key/value record and every tensor lies.
//
// Layout (little-endian; spec: ggml's docs/gguf.md, versions 2 and 3):
//
//   "GGUF"  u32 version  u64 n_tensors  u64 n_keys
//   n_keys    x  { string key, u32 type, value }            string = u64 length, bytes
//                  value of an array: u32 item type, u64 count, items
//   n_tensors x  { string name, u32 n_dims, u64 ne[n_dims], u32 type, u64 offset }
//   zeros up to a multiple of general.alignment (32 unless given): tensor data start here
//
// The scanner trusts no number in the file: it reserves no memory by a declared count, compares
// every length with the bytes that are left, and refuses what ggml refuses to load.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace ramgguf {

// These limits bound the memory that a hostile file costs. Real models have about 60 keys, names
// below 64 bytes and, with one tensor per expert, fewer than 50,000 tensors.
constexpr uint64_t kMaxKeys = 4096;
constexpr uint64_t kMaxKeyBytes = 1024;
constexpr uint64_t kMaxTensors = 65536;
constexpr uint64_t kMaxNameBytes = 63;  // ggml's: a name and its final zero fit 64 bytes
constexpr uint32_t kMaxDims = 4;

// A ggml type: its rows are whole blocks of block_weights weights in block_bytes bytes, and
// row_bytes more for the row itself (a scale per row, in types of ik_llama.cpp).
struct BlockType {
    uint32_t id;
    uint32_t block_weights;
    uint32_t block_bytes;
    uint32_t row_bytes = 0;
};

// One key/value record; offsets are into the file: [begin, end) is the whole record and
// [value_begin, end) its value. item_type and n_items are 0 unless the value is an array.
struct KeySpan {
    std::string key;
    uint32_t type;
    uint32_t item_type;
    uint64_t n_items;
    uint64_t begin;
    uint64_t value_begin;
    uint64_t end;
};

// One tensor; shape is in ggml's order (row length first), offset is absolute.
struct TensorSpan {
    std::string name;
    std::vector<uint64_t> shape;
    uint32_t type;
    uint64_t offset;
    uint64_t n_bytes;
};

struct Header {
    uint32_t version = 0;
    uint32_t alignment = 32;
    uint64_t info_offset = 0;  // where the tensor infos begin
    uint64_t info_end = 0;     // where they end
    uint64_t data_offset = 0;  // where the tensor data begin
    std::vector<KeySpan> keys;
    std::vector<TensorSpan> tensors;
};

// The header is malformed; the message names the key or tensor and the byte offset.
struct HeaderError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The bytes at hand are sound, but the header goes on to byte `end` at least: scan again with
// those.
struct NeedMoreBytes {
    uint64_t end;
};

// Scans a header from the first n_data bytes of a file of n_file bytes; throws HeaderError or
// NeedMoreBytes. `types` lists the ggml types that are known.
Header scan_header(const uint8_t* data, uint64_t n_data, uint64_t n_file,
                   const std::vector<BlockType>& types);

}  // namespace ramgguf
