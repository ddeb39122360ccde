/* target_end.h: ends the functions that target_begin.h begins. */
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
