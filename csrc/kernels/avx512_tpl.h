/* avx512_tpl.h: the AVX-512 kernels (F, BW, DQ, VL): vectors of 16. avx512.c and avx512narrow.c say how many of them a panel's row
 * has (V_PER) and what their table is called (K_ISA). */
#define DHSA_TARGET DHSA_TARGET_AVX512
#include "kernels/target_begin.h"

#include "kernels/ops512.h"

#define K_TEXT "avx512"
#define QK_ROWS 8
#define PV_ROWS 8

#include "kernels/tile_tpl.h"

#include "kernels/target_end.h"
