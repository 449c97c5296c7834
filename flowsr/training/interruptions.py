"""Signals that end a training: answered by all processes after the same optimiser step."""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOPPED = 128 + signal.SIGTERM  # exit status after a signal, as shells have it


class Interruption:
    """Whether a signal has come to any of the processes.

    Processes tell each other on their hosts, and read after a step what was sent after the step before: so all of them
    read the same, and no device is waited for.
    """

    def __init__(self):
        self.received: list[int] = []
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_world_size() > 1 else None
        self.sent: tuple[torch.Tensor, dist.Work] | None = None
        for number in SIGNALS:  # a handler can interrupt itself, so it takes no lock
            signal.signal(number, lambda received, _: self.received.append(received))

    def agreed(self) -> bool:
        """Whether to stop now; to be called by all processes after each optimiser step."""
        if self.group is None:
            return bool(self.received)
        before = self.sent
        some = torch.tensor(len(self.received))
        self.sent = some, dist.all_reduce(some, dist.ReduceOp.MAX, self.group, async_op=True)
        if before is None:
            return False
        some, message = before
        message.wait()
        return bool(some)


def leave_signals_to_the_trainer(worker: int) -> None:
    """For loader processes: a signal to the whole group, as by Ctrl-C, must not end them before the last step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
