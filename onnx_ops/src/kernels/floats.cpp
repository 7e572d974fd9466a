#include "floats.h"

#include <string.h>

#include "nm_matmul.h"

namespace nm {
namespace {

uint32_t BitsOfFloat(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

uint16_t Load16(const uint8_t* source) {
  uint16_t value;
  memcpy(&value, source, sizeof(value));
  return value;
}

}  // namespace

float FloatOfBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

float FloatOfHalf(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t exponent = half >> 10 & 0x1f;
  const uint32_t fraction = half & 0x3ff;
  if (exponent == 0) {  // zero and subnormals: fraction · 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return FloatOfBits(BitsOfFloat(magnitude) | sign);
  }
  if (exponent == 31) return FloatOfBits(sign | 0x7f800000u | fraction << 13);
  return FloatOfBits(sign | (exponent + 112) << 23 | fraction << 13);
}

float FloatOfBfloat16(uint16_t value) { return FloatOfBits(uint32_t{value} << 16); }

uint16_t HalfOfFloat(float value) {
  const uint32_t bits = BitsOfFloat(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));  // NaN
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000) {  // subnormal: adding 1/2 aligns the last kept bit with the unit of 2^-24
    const float shifted = FloatOfBits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (BitsOfFloat(shifted) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000) >> 13);
}

uint16_t Bfloat16OfFloat(float value) {
  const uint32_t bits = BitsOfFloat(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

int64_t FloatBytes(int dtype) { return dtype == NM_FLOAT32 ? 4 : 2; }

void ToFloat(int dtype, const void* source, int64_t count, float* destination) {
  if (dtype == NM_FLOAT32) {
    if (count > 0) memcpy(destination, source, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const uint8_t* bytes = static_cast<const uint8_t*>(source);
  const bool half = dtype == NM_FLOAT16;
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t bits = Load16(bytes + 2 * i);
    destination[i] = half ? FloatOfHalf(bits) : FloatOfBfloat16(bits);
  }
}

void FromFloat(int dtype, const float* source, int64_t count, void* destination) {
  if (dtype == NM_FLOAT32) {
    if (count > 0) memcpy(destination, source, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  uint8_t* bytes = static_cast<uint8_t*>(destination);
  const bool half = dtype == NM_FLOAT16;
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t bits = half ? HalfOfFloat(source[i]) : Bfloat16OfFloat(source[i]);
    memcpy(bytes + 2 * i, &bits, sizeof(bits));
  }
}

}  // namespace nm
