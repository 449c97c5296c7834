"""Processes that a signal reaches at different times stop after the same step."""

import multiprocessing
import os
import signal

import torch.distributed as dist

from flowsr.training.interruptions import Interruption


def last_step(rank: int, place: str, signalled_in: int | None, answers) -> None:
    """Counts steps until it is time to stop; one process gets a signal within a step."""
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    interruption = Interruption()
    for step in range(1, 20):
        if step == signalled_in:
            os.kill(os.getpid(), signal.SIGTERM)
        if interruption.agreed():
            break
    answers.put(step)
    dist.barrier()
    dist.destroy_process_group()


def test_one_signal_stops_both_processes_one_step_later(tmp_path):
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    processes = [
        fork.Process(target=last_step, args=(rank, tmp_path / "meeting", 3 if rank else None, answers))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    assert [answers.get(timeout=60) for _ in processes] == [4, 4]
    for process in processes:
        process.join()


def test_a_process_alone_stops_after_the_step_of_the_signal(monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        interruption = Interruption()
        assert not interruption.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.agreed()
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
            signal.signal(number, handler)
