// Registers as structures of bytes, and what the emulated intrinsics do to their lanes.
#ifndef NM_TESTS_EMULATED_REGISTERS_H_
#define NM_TESTS_EMULATED_REGISTERS_H_

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

template <int size>
struct EmulatedRegister {
  alignas(size) uint8_t bytes[size];
};
struct __m128i : EmulatedRegister<16> {};
struct __m128 : EmulatedRegister<16> {};
struct __m256i : EmulatedRegister<32> {};
struct __m256 : EmulatedRegister<32> {};
struct __m512i : EmulatedRegister<64> {};
struct __m512 : EmulatedRegister<64> {};
using __m512bh = __m512i;
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;
using __mmask64 = uint64_t;

#define _MM_HINT_T0 3
#define _MM_HINT_T1 2

namespace nm_emulated {

template <class Lane, class Register>
Lane Get(const Register& v, int lane) {
  Lane value;
  memcpy(&value, v.bytes + lane * static_cast<int>(sizeof(Lane)), sizeof(Lane));
  return value;
}

template <class Lane, class Register>
void Set(Register& v, int lane, Lane value) {
  memcpy(v.bytes + lane * static_cast<int>(sizeof(Lane)), &value, sizeof(Lane));
}

template <class Lane, class Register>
constexpr int kLanes = sizeof(Register) / sizeof(Lane);

// A register whose lane i is f(i).
template <class Register, class Lane, class F>
Register Fill(const F& f) {
  Register result;
  for (int i = 0; i < kLanes<Lane, Register>; ++i) Set<Lane>(result, i, f(i));
  return result;
}

// f on the lanes of some registers.
template <class Lane, class F, class Register, class... Others>
Register Map(const F& f, const Register& first, const Others&... others) {
  return Fill<Register, Lane>(
      [&](int i) { return static_cast<Lane>(f(Get<Lane>(first, i), Get<Lane>(others, i)...)); });
}

// f on the lanes of b and c where the mask is set, the lane of a elsewhere.
template <class Lane, class F, class Register>
Register MapMasked(uint64_t mask, const F& f, const Register& a, const Register& b, const Register& c) {
  return Fill<Register, Lane>([&](int i) {
    return (mask >> i & 1) != 0 ? static_cast<Lane>(f(Get<Lane>(b, i), Get<Lane>(c, i))) : Get<Lane>(a, i);
  });
}

template <class Lane, class F, class Register>
uint16_t Compare(const F& f, const Register& a, const Register& b) {
  uint16_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<uint16_t>(f(Get<Lane>(a, i), Get<Lane>(b, i)) << i);
  return mask;
}

template <class Register>
Register Load(const void* p) {
  Register result;
  memcpy(result.bytes, p, sizeof(Register));
  return result;
}

// Reads nothing but the lanes whose bit is set; the others are zero.
template <class Register, class Lane>
Register LoadMasked(uint64_t mask, const void* p) {
  Register result = {};
  for (int i = 0; i < kLanes<Lane, Register>; ++i) {
    if ((mask >> i & 1) == 0) continue;
    memcpy(result.bytes + i * static_cast<int>(sizeof(Lane)),
           static_cast<const uint8_t*>(p) + i * static_cast<int>(sizeof(Lane)), sizeof(Lane));
  }
  return result;
}

template <class Register>
const void* Aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(Register) == 0) return p;
  fprintf(stderr, "an aligned access of %zu bytes at %p\n", sizeof(Register), p);
  abort();
}

template <class Register>
void Store(void* p, const Register& v) {
  memcpy(p, v.bytes, sizeof(Register));
}

inline float Flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// Lanes of a, in order, to the places whose bit is set.
template <class Lane, class Register>
Register Expand(const Register& source, uint64_t mask, const Register& a) {
  int next = 0;
  return Fill<Register, Lane>(
      [&](int i) { return Get<Lane>((mask >> i & 1) != 0 ? a : source, (mask >> i & 1) != 0 ? next++ : i); });
}

// The low bytes of another register; where it is the shorter one, the rest is undefined.
template <class To, class From>
To Cast(const From& v) {
  To result;
  memset(result.bytes, 0xff, sizeof(To));
  memcpy(result.bytes, v.bytes, sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
  return result;
}

}  // namespace nm_emulated

#endif  // NM_TESTS_EMULATED_REGISTERS_H_
