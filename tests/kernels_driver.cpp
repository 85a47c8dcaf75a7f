// Prints what an ISA level makes of rows of floats, for levels that this machine only emulates:
// for every encoder and format the encoded bytes, the sums of measure and the decoded floats.
//
//   kernels_driver FLOATS ROW_LENGTH > OUT
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/codec.h"

namespace ramgguf::RAMGGUF_ISA {
extern const Codec codec;
}

namespace {

void put(const void* data, size_t n) {
    if (std::fwrite(data, 1, n, stdout) != n) std::exit(1);
}

void put_level(const ramgguf::Codec& codec, const ramgguf::Weights& w, int encoder, int format) {
    const auto id = static_cast<ramgguf::EncoderId>(encoder);
    const ramgguf::FormatInfo& info = codec.formats[format];
    std::vector<uint8_t> bytes((size_t)(w.n / info.block_size * info.block_bytes));
    codec.encode(w, id, format, bytes.data());
    put(bytes.data(), bytes.size());
    ramgguf::WeightSums sums;
    ramgguf::ErrorSums error;
    codec.measure(w, id, &format, 1, sums, &error);
    const double numbers[] = {sums.sum,
                              sums.squares,
                              sums.cubes,
                              sums.fourths,
                              sums.max_abs,
                              error.squares,
                              __builtin_sqrt(error.max_square)};
    put(numbers, sizeof numbers);
    std::vector<float> floats((size_t)w.n);
    codec.decode({format, bytes.data(), w.n, w.row_length, nullptr}, floats.data());
    put(floats.data(), floats.size() * sizeof(float));
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) return 2;
    std::vector<float> x(1 << 20);
    std::FILE* file = std::fopen(argv[1], "rb");
    if (!file) return 1;
    const auto n = (int64_t)std::fread(x.data(), sizeof(float), x.size(), file);
    std::fclose(file);
    const auto& codec = ramgguf::RAMGGUF_ISA::codec;
    const ramgguf::Weights w{0, (const uint8_t*)x.data(), n, std::atoll(argv[2]), nullptr};
    for (int encoder = 0; encoder < ramgguf::kEncoders; ++encoder) {
        for (int format = 0; format < codec.n_formats; ++format) {
            put_level(codec, w, encoder, format);
        }
    }
}
