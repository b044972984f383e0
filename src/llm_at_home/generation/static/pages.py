"""Whose each page of the cache is: bookkeeping on the host, without a tensor."""

from __future__ import annotations

PAGE = 256  # tokens of a page; a multiple of ``kernels.KEYS_AT_ONCE``, so that keys read at once lie in one page
SCRAP = 0  # where places write that have no page there


class Pages:
    """A pool of pages. Places hold them; what a finished sequence's place holds is kept until others need it.

    Args:
        count: of pages. The first is scrap where there are several places, since a step writes for every one, also for
            one that is empty; a place alone has no steps while it is empty, and all pages.
        places: that hold pages.
    """

    def __init__(self, count: int, places: int) -> None:
        self.count = count
        self.held: list[list[int]] = [[] for _ in range(places)]
        self.changed = False  # since the device's table was written
        self._free = list(range(count))[: 0 if places > 1 else None : -1]
        self._kept: list[int] = []  # places, the least recently used first

    @property
    def available(self) -> int:
        """Pages that are free, or kept and can be given up."""
        return len(self._free) + sum(len(self.held[place]) for place in self._kept)

    def keep(self, place: int) -> None:
        """A place's sequence is finished: others may take its pages, after those kept for longer."""
        self._kept.append(place)

    def use(self, place: int, most: int) -> None:
        """A place gets a sequence: at most the first so many of the pages that it kept stay its own."""
        if place in self._kept:
            self._kept.remove(place)
        self._give_back(place, most)

    def drop(self, place: int) -> None:
        """A place's pages are free, whatever they hold."""
        self.use(place, 0)

    def grow(self, place: int, count: int) -> list[int]:
        """Let a place in use hold so many pages.

        Returns:
            The places that what they had kept was taken from, for it.

        Raises:
            IndexError: when fewer are available.
        """
        given_up = []
        while len(self.held[place]) < count:
            if not self._free:
                given_up.append(self._kept[0])
                self.drop(self._kept[0])
                continue
            self.held[place].append(self._free.pop())
            self.changed = True
        return given_up

    def _give_back(self, place: int, most: int) -> None:
        while len(self.held[place]) > most:
            self._free.append(self.held[place].pop())
            self.changed = True


def pages_of(tokens: int) -> int:
    """How many pages so many tokens fill, the last perhaps in part."""
    return -(-tokens // PAGE)
