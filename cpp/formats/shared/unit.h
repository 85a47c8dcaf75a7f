// What the format headers share: the unit of work and how an encoder's result is held.
//
// Every format works on a unit of 256 weights (16 vectors), one superblock or eight blocks of 32,
// so that the reductions and divisions of several blocks are done together. A format is a struct:
//
//   block_size, Block      weights per block; the packed bytes of one
//   Fit                    what an encoder chooses for a unit: scales, mins, as bytes and as floats
//   rtn(x, fit)            the encoder without a search: x points at 256 floats
//   quantize(fit, x, j)    codes of vector j (weights 16j..16j+15) of the unit: Lanes of whole
//                          numbers, or IntLanes where a block is one weight
//   reconstruct(fit, q, j) the weights that a decoder makes of these codes
//   pack(fit, q, out)      bytes of the unit: 256 / block_size blocks
//   unpack(in, fit, q)     the inverse; fills of the Fit what reconstruct needs
//
// Measuring is rtn, quantize, reconstruct; encoding is rtn, quantize, pack; decoding is unpack,
// reconstruct. Another encoder only replaces rtn.
#pragma once
#include "lanes/half.h"
#include "lanes/lanes.h"

namespace ramgguf::RAMGGUF_ISA {

constexpr int kUnit = 256;
constexpr int kVectors = kUnit / kLanes;

// One float for each of up to 16 blocks or sub-blocks of a unit.
struct alignas(64) PerBlock {
    float v[kLanes];

    RAMGGUF_INLINE void set(Lanes a) { store(v, a); }
    RAMGGUF_INLINE Lanes all() const { return load(v); }
    RAMGGUF_INLINE Lanes at(int block) const { return broadcast(v[block]); }
};

// v[b] reduces to block b of kBlock weights; with eight blocks of 32, v[8..15] repeats v[0..7].
template <int kBlock, class Op>
RAMGGUF_INLINE void fold_blocks(Op op, const float* x, Lanes (&v)[kLanes]) {
    static_assert(kBlock == 16 || kBlock == 32, "blocks of one or two vectors");
    if constexpr (kBlock == 16) {
#pragma GCC unroll 16
        for (int b = 0; b < 16; ++b) v[b] = load(x + 16 * b);
    } else {
#pragma GCC unroll 8
        for (int b = 0; b < 8; ++b) v[b] = v[b + 8] = op(load(x + 32 * b), load(x + 32 * b + 16));
    }
}

// Lane b of the result is the reduction of block b of kBlock weights; with eight blocks of 32,
// lanes 8..15 repeat lanes 0..7.
template <int kBlock, class Op>
RAMGGUF_INLINE Lanes reduce_blocks(Op op, const float* x) {
    Lanes v[kLanes];
    fold_blocks<kBlock>(op, x, v);
    return reduce_each(op, v);
}

// Lanes 0..7: the maxima of eight blocks of 32; lanes 8..15: their minima, negated. (The larger of
// two negated minima is the negated smaller one, so both share a tree.)
RAMGGUF_INLINE Lanes ranges_of_blocks32(const float* x) {
    Lanes v[kLanes];
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b) {
        const Lanes first_half = load(x + 32 * b), second_half = load(x + 32 * b + 16);
        v[b] = max(first_half, second_half);
        v[b + 8] = -min(first_half, second_half);
    }
    return reduce_each(Max{}, v);
}

// 1 / a, and 0 for 0.
RAMGGUF_INLINE Lanes inverse_or_zero(Lanes a) {
    const Lanes zero = broadcast(0.0f);
    return select(a == zero, zero, broadcast(1.0f) / a);
}

// Whether a lane holds the F16 (low 16 bits) of infinity: a scale that was too large.
RAMGGUF_INLINE bool any_overflow(IntLanes h) {
    return any((h & broadcast(0x7fff)) > broadcast(0x7bff));
}

RAMGGUF_INLINE bool is_infinite(uint16_t h) {
    return (h & 0x7c00) == 0x7c00;
}

RAMGGUF_INLINE IntLanes to_int(Lanes code) {
    return truncate(code);
}
RAMGGUF_INLINE IntLanes to_int(IntLanes code) {
    return code;
}

template <class T>
RAMGGUF_INLINE T read(const uint8_t* bytes) {
    T value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

template <class T>
RAMGGUF_INLINE void write(uint8_t* bytes, const T& value) {
    std::memcpy(bytes, &value, sizeof value);
}

}  // namespace ramgguf::RAMGGUF_ISA
