// Which instruction set and which kernel.
#include <stdlib.h>
#include <string.h>

#if defined(NM_HAVE_X86_KERNELS)
#include <cpuid.h>
#endif
#if defined(NM_HAVE_AMX_KERNELS)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(NM_HAVE_NEON_KERNELS) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels.h"

namespace nm {
namespace {

constexpr size_t kMostKernels = 64;

#if defined(NM_HAVE_NEON_KERNELS)
constexpr Isa kIsas[] = {Isa::kPortable, Isa::kNeon, Isa::kDotprod};
#else
constexpr Isa kIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx};
#endif

struct Registry {
  Kernel kernels[kMostKernels];
  size_t count = 0;
  Registry() {
#if defined(NM_HAVE_AMX_KERNELS) || defined(NM_EMULATE_AVX512)
    Append(AmxIntegerTiles());
    Append(AmxFloatTiles());
#endif
#if defined(NM_HAVE_X86_KERNELS) || defined(NM_EMULATE_AVX512)
    Append(Avx512IntegerTiles());
    Append(Avx512WholeRows());
    Append(Avx512IntegerRows());
    Append(Avx512FloatPanels());
    Append(Avx512FloatRows());
#endif
#if defined(NM_HAVE_X86_KERNELS)
    Append(Avx2WholeRows());
    Append(Avx2IntegerRows());
    Append(Avx2IntegerPanels());
    Append(Avx2FloatRows());
    Append(Avx2FloatPanels());
#endif
#if defined(NM_HAVE_NEON_KERNELS)
    Append(NeonDotprodRows());
    Append(NeonIntegerRows());
    Append(NeonFloatRows());
#endif
    Append(PortableKernels());
  }
  void Append(KernelList list) {
    for (size_t i = 0; i < list.count && count < kMostKernels; ++i) kernels[count++] = list.kernels[i];
  }
};

#if defined(NM_HAVE_X86_KERNELS)
// Clang 14 does not know "f16c" by name.
bool HasF16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// Tiles of bytes and of bfloat16, and AVX-512's conversions to it. Linux gives tile registers to a process that asks.
bool HasAmx() {
#if defined(NM_HAVE_AMX_KERNELS)
  constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25, kBfloat16 = 1u << 22, kConversions = 1u << 5;
  constexpr unsigned kAll = kTiles | kInt8 | kBfloat16;
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kAll) != kAll) return false;
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) == 0 || (eax & kConversions) == 0) return false;
  constexpr long kAskPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#if defined(NM_HAVE_NEON_KERNELS)
bool HasDotProducts() {
#if defined(__APPLE__)
  return true;  // all that run macOS
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return false;
#endif
}
#endif

Isa ReadIsa() {
  const char* name = getenv("OPTIMUM_NM_ISA");
  const Isa best = BestIsa();
  if (name == nullptr) return best;
  for (Isa isa : kIsas) {
    if (strcmp(name, IsaName(isa)) == 0 && isa < best) return isa;
  }
  return best;
}

}  // namespace

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kDotprod:
      return "dotprod";
    case Isa::kNeon:
      return "neon";
    default:
      return "portable";
  }
}

Isa BestIsa() {
#if defined(NM_EMULATE_AVX512)
  return Isa::kAmx;  // the tests' build: intrinsics are plain functions
#elif defined(NM_HAVE_X86_KERNELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c() &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && HasAmx()) return Isa::kAmx;
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kPortable;
#elif defined(NM_HAVE_NEON_KERNELS)
  return HasDotProducts() ? Isa::kDotprod : Isa::kNeon;
#else
  return Isa::kPortable;
#endif
}

Isa ActiveIsa() {
  static const Isa isa = ReadIsa();
  return isa;
}

KernelList AllKernels() {
  static const Registry registry;
  return {registry.kernels, registry.count};
}

const Kernel& ChooseKernel(const Layout& layout, int64_t rows, int accuracy_level, Isa isa) {
  const KernelList all = AllKernels();
  for (size_t i = 0; i < all.count; ++i) {
    const Kernel& kernel = all.kernels[i];
    if (kernel.isa <= isa && rows >= kernel.least_rows && rows <= kernel.most_rows &&
        (accuracy_level == 4 || !kernel.int8_activations) && kernel.supports(layout)) {
      return kernel;
    }
  }
  return all.kernels[all.count - 1];  // the portable one takes everything
}

}  // namespace nm

extern "C" const char* nm_isa(void) { return nm::IsaName(nm::ActiveIsa()); }
