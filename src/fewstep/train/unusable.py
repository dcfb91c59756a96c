"""Pictures that turn out to be no good, whichever process meets them: each is named once, and all of them count."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from accelerate.utils import gather_object

from fewstep.data.loader import Noted, Replaced, refuse_too_many


class Unusable:
    """What all processes of a run have met so far.

    Args:
        allowance: how many pictures may turn out to be no good, in all processes together.
        warn: told of each, in one line; that of the process that speaks for all.
    """

    def __init__(self, allowance: int, warn: Callable[[str], None]) -> None:
        self._allowance, self._warn = allowance, warn
        self._new: list[Replaced | Noted] = []
        self._known: dict[str, str] = {}
        self._said: set[str] = set()

    def meet(self, replaced: Iterable[Replaced | Noted]) -> None:
        """What this process has met: said at once, told to the others when all `share`."""
        for one in replaced:
            self._new.append(one)
            self._say(one)

    def share(self) -> None:
        """Hear what the others have met; to be called by all processes at the same place.

        Raises:
            DataError: it is more than is allowed; in every process.
        """
        everyones: list[Replaced | Noted] = gather_object(self._new)
        self._new = []
        for one in everyones:
            self._say(one)
            if isinstance(one, Replaced):
                self._known.setdefault(one.name, one.reason)
        refuse_too_many(self._known, self._allowance)

    def _say(self, one: Replaced | Noted) -> None:
        if str(one) not in self._said:
            self._said.add(str(one))
            self._warn(str(one))
