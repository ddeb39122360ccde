/* names.h: macros that the templates of kernels share. */
#ifndef DHSA_NAMES_H
#define DHSA_NAMES_H

#define K_GLUE2(a, b) a##_##b
#define K_GLUE(a, b) K_GLUE2(a, b)
#define K_INLINE static inline __attribute__((always_inline))
/* A panel need not be full. Calls f(..., per), where per is the number of vectors of `length` lanes that hold `rows`
 * lanes and is a constant after inlining. */
#define K_FOR_VECTORS(rows, length, f, ...)                                                                            \
    do {                                                                                                               \
        const int per_ = ((rows) + (length) - 1) / (length);                                                           \
        if (V_PER > 1 && V_PER <= 4 && per_ == 1)                                                                      \
            f(__VA_ARGS__, 1);                                                                                         \
        else if (V_PER > 2 && V_PER <= 4 && per_ == 2)                                                                 \
            f(__VA_ARGS__, 2);                                                                                         \
        else                                                                                                           \
            f(__VA_ARGS__, V_PER);                                                                                     \
    } while (0)

#endif
