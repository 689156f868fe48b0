"""The terms of a step on the engine's device: on a GPU the next one is copied there while the one before is computed on.

    copies    copy 0 | copy 1           | copy 2           | ...
    computing        | term 0           | term 1           | ...

Copies run on a stream of their own, whose memory they reuse: that of a term is given to the second one after it, so that
this copy waits until the term has been computed on. Copying straight on the computing stream would begin only once that
stream had come to it, and the device would do nothing meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from minillm.methods.protocol import Term


class DeviceCopies:
    """See the module.

    Args:
        device: where the student computes, whose stream the copies overlap.
        device_of: where a term's tensors must be; None: all of them on `device`.
    """

    def __init__(self, device: torch.device, device_of: Callable[[Term], torch.device] | None = None):
        self.device = device
        self._device_of = device_of or (lambda _: device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def of(self, terms: Sequence[Term]) -> Iterator[Term]:
        """The terms in their order, their tensors where they must be. Whoever takes one launches its work before the next."""
        if self._stream is None or not terms:
            yield from (term.to(self._device_of(term)) for term in terms)
            return
        copying, computing = self._stream, torch.cuda.current_stream(self.device)
        copying.wait_stream(computing)  # the step before may be computing on what was copied for it
        computed = None
        coming = self._start(terms[0])
        for following in [*terms[1:], None]:
            term, arrived = coming
            computing.wait_event(arrived)
            yield term
            if following is None:
                return
            if computed is not None:  # the term before this one
                copying.wait_event(computed)
            computed = computing.record_event()
            coming = self._start(following)

    def _start(self, term: Term) -> tuple[Term, torch.cuda.Event]:
        """A term whose tensors are being copied, and the event of their arrival."""
        with torch.cuda.stream(self._stream):
            return term.to(self._device_of(term)), self._stream.record_event()
