/* avx_vnni.h: executes vpdpbusd of AVX-VNNI, on registers, for a CPU without it, in a handler of the signal that the
 * CPU raises there. Only for tests: a signal takes a thousand times as long. */
#ifndef AVX_VNNI_H
#define AVX_VNNI_H

#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

/* The halves of register ymm `r` in the image that xsave wrote (Intel, Software Developer's Manual 1, 13.4). */
static char *ymm_low(char *image, int r) { return image + 160 + 16 * r; }
static char *ymm_high(char *image, int r) { return image + 576 + 16 * r; }

static void on_illegal(int number, siginfo_t *info, void *context)
{
    enum { IN_USE = 512, YMM_STATE = 1 << 2 }; /* the mask of parts that are not zero; bit of the high halves */
    ucontext_t *at = context;
    const uint8_t *code = (const uint8_t *)at->uc_mcontext.gregs[REG_RIP];
    char *image = (char *)at->uc_mcontext.fpregs;
    (void)number;
    (void)info;
    /* VEX.256.66.0F38.W0 50 /r between registers */
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x87) != 5 || code[3] != 0x50 || code[4] >> 6 != 3)
        _exit(3);
    const int sum = (code[4] >> 3 & 7) | (code[1] & 0x80 ? 0 : 8), x = ~code[2] >> 3 & 15,
              y = (code[4] & 7) | (code[1] & 0x20 ? 0 : 8);
    uint64_t in_use;
    memcpy(&in_use, image + IN_USE, sizeof in_use);
    if (!(in_use & YMM_STATE)) memset(ymm_high(image, 0), 0, 256);
    in_use |= YMM_STATE;
    memcpy(image + IN_USE, &in_use, sizeof in_use);
    for (int high = 0; high < 2; high++) {
        char *(*half)(char *, int) = high ? ymm_high : ymm_low;
        int32_t total[4];
        uint8_t a[16];
        int8_t b[16];
        memcpy(total, half(image, sum), 16);
        memcpy(a, half(image, x), 16);
        memcpy(b, half(image, y), 16);
        for (int i = 0; i < 16; i++) total[i / 4] += a[i] * b[i];
        memcpy(half(image, sum), total, 16);
    }
    at->uc_mcontext.gregs[REG_RIP] += 5;
}

static void emulate_avx_vnni(void)
{
    struct sigaction action = {.sa_sigaction = on_illegal, .sa_flags = SA_SIGINFO};
    sigaction(SIGILL, &action, NULL);
}
#endif

#endif
