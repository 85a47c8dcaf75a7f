// The floating-point mode of the kernels. Their bytes must not depend on the caller's mode.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace ramgguf::RAMGGUF_ISA {

// Sets round to nearest even, denormals kept, no traps; restores the caller's mode when destroyed.
class FloatMode {
  public:
    FloatMode() : saved_(get()) { set_default(); }
    ~FloatMode() { set(saved_); }
    FloatMode(const FloatMode&) = delete;
    FloatMode& operator=(const FloatMode&) = delete;

  private:
#if defined(__x86_64__)
    using Word = uint32_t;
    static Word get() { return _mm_getcsr(); }
    static void set(Word word) { _mm_setcsr(word); }
    static void set_default() { set(0x1f80); }  // what a process starts with
#elif defined(__aarch64__)
    using Word = uint64_t;
    static Word get() {
        Word word;
        __asm__ volatile("mrs %0, fpcr" : "=r"(word));
        return word;
    }
    static void set(Word word) { __asm__ volatile("msr fpcr, %0" ::"r"(word) : "memory"); }
    static void set_default() { set(0); }
#else
    using Word = int;
    static Word get() { return 0; }
    static void set(Word) {}
    static void set_default() {}
#endif
    Word saved_;
};

}  // namespace ramgguf::RAMGGUF_ISA
