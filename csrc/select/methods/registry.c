/* registry.c: the table of methods. */
#include "select/selector.h"

/* A new method is added here, to dhsa_method_kind in dhsa.h, and to dhsa/methods/__init__.py. */
extern const dhsa_method dhsa_method_rows, dhsa_method_dhsa, dhsa_method_window, dhsa_method_block, dhsa_method_power,
    dhsa_method_vertical_slash, dhsa_method_xattention, dhsa_method_proxy, dhsa_method_hisa, dhsa_method_oracle;

static const dhsa_method *const methods[] = {
    [DHSA_METHOD_ROWS] = &dhsa_method_rows,
    [DHSA_METHOD_DHSA] = &dhsa_method_dhsa,
    [DHSA_METHOD_WINDOW] = &dhsa_method_window,
    [DHSA_METHOD_BLOCK] = &dhsa_method_block,
    [DHSA_METHOD_VERTICAL_SLASH] = &dhsa_method_vertical_slash,
    [DHSA_METHOD_XATTENTION] = &dhsa_method_xattention,
    [DHSA_METHOD_PROXY] = &dhsa_method_proxy,
    [DHSA_METHOD_HISA] = &dhsa_method_hisa,
    [DHSA_METHOD_POWER] = &dhsa_method_power,
    [DHSA_METHOD_ORACLE] = &dhsa_method_oracle,
};

const dhsa_method *dhsa_method_find(dhsa_method_kind kind)
{
    return (int)kind >= 0 && (size_t)kind < sizeof methods / sizeof *methods ? methods[kind] : NULL;
}
