// libFuzzer target: whatever the bytes, scan_header refuses them or returns spans that hold.
// Built and run by tools/fuzz.sh.
#include <cstdlib>

#include "gguf/header.h"

namespace {

using namespace ramgguf;

constexpr uint64_t kBeyond = 4096;  // the file goes on: tensor data need not be in the input

const std::vector<BlockType> kTypes = {{0, 1, 4},      {1, 1, 2},     {2, 32, 18}, {8, 32, 34},
                                       {12, 256, 144}, {16, 256, 66}, {26, 1, 4},  {30, 1, 2}};

void require(bool holds) {
    if (!holds) std::abort();
}

bool scans(const uint8_t* data, uint64_t n_data, uint64_t n_file, Header& header) {
    try {
        header = scan_header(data, n_data, n_file, kTypes);
        return true;
    } catch (const HeaderError& e) {
        require(e.what()[0] != '\0');
    } catch (const NeedMoreBytes& more) {
        require(n_data < more.end && more.end <= n_file);
    }
    return false;
}

void check(const Header& header, uint64_t n_file) {
    uint64_t at = 24;
    for (const auto& key : header.keys) {
        require(key.begin == at && key.begin < key.value_begin && key.value_begin <= key.end);
        require(!key.key.empty() && key.key.size() <= kMaxKeyBytes);
        at = key.end;
    }
    require(header.info_offset == at && header.info_end >= at);
    require(header.data_offset >= header.info_end);
    require(header.data_offset - header.info_end < header.alignment);
    for (const auto& tensor : header.tensors) {
        require(!tensor.name.empty() && tensor.name.size() <= kMaxNameBytes);
        require(!tensor.shape.empty() && tensor.shape.size() <= kMaxDims);
        for (const uint64_t ne : tensor.shape) require(ne > 0);
        require(tensor.offset >= header.data_offset && tensor.offset % header.alignment == 0);
        require(tensor.n_bytes > 0 && tensor.n_bytes <= n_file);
        require(tensor.offset <= n_file - tensor.n_bytes);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const uint64_t n_file = size + kBeyond;
    Header header;
    Header again;
    scans(data, size, size, again);
    if (!scans(data, size, n_file, header)) return 0;
    check(header, n_file);
    // The header's own bytes are enough, and one byte less is not.
    require(scans(data, header.info_end, n_file, again));
    require(again.data_offset == header.data_offset && again.keys.size() == header.keys.size());
    require(!scans(data, header.info_end - 1, n_file, again));
    return 0;
}
