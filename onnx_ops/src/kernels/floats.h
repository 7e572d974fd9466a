// Conversions between float32 and the 16-bit floating-point formats, exact one way, round to nearest even the other.
#ifndef NM_KERNELS_FLOATS_H_
#define NM_KERNELS_FLOATS_H_

#include <stdint.h>

namespace nm {

float FloatOfBits(uint32_t bits);
float FloatOfHalf(uint16_t half);
float FloatOfBfloat16(uint16_t value);
uint16_t HalfOfFloat(float value);
uint16_t Bfloat16OfFloat(float value);

// count elements of dtype (float32, float16, bfloat16), at any alignment.
void ToFloat(int dtype, const void* source, int64_t count, float* destination);
void FromFloat(int dtype, const float* source, int64_t count, void* destination);
int64_t FloatBytes(int dtype);

}  // namespace nm

#endif  // NM_KERNELS_FLOATS_H_
