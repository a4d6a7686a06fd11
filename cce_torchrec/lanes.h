// What the level that kernels are compiled for (setup.py) has: values of four bytes in a register.
#pragma once

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
