"""Runs a function in several processes, the ranks of a gloo group. The processes are forked by a server that has
imported what they need, so that each begins at once."""

import multiprocessing
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch

PRELOAD = ["torch", "transformers", "torch.distributed", "dhsa.hf", "tiny"]


def run(size, function, folder, *args, limit=240, lost=()):
    """What `function(rank, size, *args)` returned in each of `size` processes, as torch.save can write it; where it
    raised an exception, that exception's type and message as a str. None of a process that ended otherwise. `lost`:
    ranks that need not end by themselves; they are killed once the others have ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folder = Path(folder)
    number = len(list(folder.iterdir()))
    store = folder / f"store{number}"
    outs = [folder / f"out{number}-{rank}" for rank in range(size)]
    workers = [
        context.Process(target=_rank, args=(rank, size, str(store), str(outs[rank]), function, args))
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    end = time.monotonic() + limit
    for rank, worker in enumerate(workers):
        if rank not in lost:
            worker.join(max(0.0, end - time.monotonic()))
    for rank in lost:
        workers[rank].kill()
        workers[rank].join()
    hung = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    for rank in hung:
        workers[rank].kill()
    assert not hung, f"ranks {hung} did not end"
    return [torch.load(out, weights_only=False) if out.exists() else None for out in outs]


def _rank(rank, size, store, out, function, args):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    import dhsa

    dhsa.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        with torch.no_grad():
            result = function(rank, size, *args)
    except Exception as error:
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    torch.save(result, out + ".part")
    os.replace(out + ".part", out)
    os._exit(0)  # without the barrier of destroying the group, which a rank that failed would wait for
