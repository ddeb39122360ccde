/* attend.h: attention on arguments that have been checked, for callers in the folders above, which check them once
 * in a call. */
#ifndef DHSA_ATTEND_H
#define DHSA_ATTEND_H

#include "core/internal.h"

/* Attention for a problem that dhsa_problem_check accepts, over a selection that dhsa_selection_check accepts or,
 * with selection NULL, over every visible key. */
dhsa_status dhsa_attend_checked(const dhsa_problem *problem, const dhsa_selection *selection, dhsa_error *error);

#endif
