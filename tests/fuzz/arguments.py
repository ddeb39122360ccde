"""The command line of the programs of this folder."""

import argparse
import time


def parsed(description):
    """The arguments; their seed, of the clock if none is given, is printed so that a run can be repeated."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--count", type=int, help="at most so many inputs")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    return given
