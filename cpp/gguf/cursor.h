// Reads a GGUF header front to back: bounds-checked numbers and names, and the text of errors.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "gguf/header.h"

namespace ramgguf {

[[noreturn]] inline void fail(uint64_t offset, const std::string& what) {
    throw HeaderError(what + " (at byte " + std::to_string(offset) + ")");
}

// Length of the UTF-8 sequence that text starts with; 0 if it is invalid, or a control character,
// which could forge lines where the name is printed.
inline size_t printable_length(std::string_view text) {
    const auto byte = [&](size_t i) {
        return i < text.size() ? static_cast<uint8_t>(text[i]) : uint8_t{0};
    };
    const auto follows = [&](size_t i) { return (byte(i) & 0xC0) == 0x80; };
    const uint8_t lead = byte(0);
    if (lead < 0x80) return lead >= 0x20 && lead != 0x7F;
    if (lead >= 0xC2 && lead <= 0xDF)
        return follows(1) && (lead != 0xC2 || byte(1) >= 0xA0) ? 2 : 0;
    if (lead >= 0xE0 && lead <= 0xEF) {
        const bool overlong = lead == 0xE0 && byte(1) < 0xA0;
        const bool surrogate = lead == 0xED && byte(1) > 0x9F;
        return follows(1) && follows(2) && !overlong && !surrogate ? 3 : 0;
    }
    if (lead >= 0xF0 && lead <= 0xF4) {
        const bool overlong = lead == 0xF0 && byte(1) < 0x90;
        const bool beyond = lead == 0xF4 && byte(1) > 0x8F;
        return follows(1) && follows(2) && follows(3) && !overlong && !beyond ? 4 : 0;
    }
    return 0;
}

inline bool is_printable(std::string_view text) {
    while (!text.empty()) {
        const size_t length = printable_length(text);
        if (length == 0) return false;
        text.remove_prefix(length);
    }
    return true;
}

// Reads the file's bytes front to back; `what` in its errors says what was being read.
class Cursor {
  public:
    Cursor(const uint8_t* data, uint64_t n_data, uint64_t n_file)
        : data_(data), n_data_(std::min(n_data, n_file)), n_file_(n_file) {}

    uint64_t position() const { return position_; }

    // Steps over n bytes and returns where they are.
    const uint8_t* take(uint64_t n, const std::string& what) {
        if (n > n_file_ - position_) {
            fail(position_, what + " runs past the end of the file: it needs " + std::to_string(n) +
                                " bytes and " + std::to_string(n_file_ - position_) + " are left");
        }
        if (n > n_data_ - position_) throw NeedMoreBytes{position_ + n};
        const uint8_t* begin = data_ + position_;
        position_ += n;
        return begin;
    }

    template <typename T>
    T number(const std::string& what) {
        T value;
        std::memcpy(&value, take(sizeof(T), what), sizeof(T));
        return value;
    }

    // A name: printable UTF-8 of 1 to max_bytes bytes.
    std::string name(uint64_t max_bytes, const std::string& what) {
        const uint64_t start = position_;
        const uint64_t n = number<uint64_t>("the length of " + what);
        if (n == 0) fail(start, what + " has an empty name");
        const uint8_t* bytes = nullptr;
        if (n <= max_bytes || n > n_file_ - position_) bytes = take(n, "the name of " + what);
        if (n > max_bytes) {
            fail(start, "the name of " + what + " has " + std::to_string(n) + " bytes; at most " +
                            std::to_string(max_bytes) + " are allowed");
        }
        const std::string_view text(reinterpret_cast<const char*>(bytes), n);
        if (!is_printable(text)) fail(start, "the name of " + what + " is not printable UTF-8");
        return std::string(text);
    }

  private:
    const uint8_t* data_;
    uint64_t n_data_;
    uint64_t n_file_;
    uint64_t position_ = 0;
};

inline std::string quoted(const char* kind, const std::string& name) {
    constexpr size_t longest = 96;
    if (name.size() <= longest) return std::string(kind) + " '" + name + "'";
    size_t cut = longest;
    while (cut > 0 && (static_cast<uint8_t>(name[cut]) & 0xC0) == 0x80) --cut;
    return std::string(kind) + " '" + name.substr(0, cut) + "...'";
}

}  // namespace ramgguf
