/* attend.h: attention of arguments that have been checked: for those above, which check a call once. */
#ifndef DHSA_ATTEND_H
#define DHSA_ATTEND_H

#include "core/internal.h"

/* Attention of a problem for which dhsa_problem_check says yes, over a selection for which dhsa_selection_check does, or with
 * selection NULL over every visible key. */
dhsa_status dhsa_attend_checked(const dhsa_problem *problem, const dhsa_selection *selection, dhsa_error *error);

#endif
