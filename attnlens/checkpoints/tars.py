"""Untrusted tars: the headers that stand in front of a member are bounded before Python's reader takes them apart.

Its reader keeps every extended header whole, copies what a global one says into each member, calls itself for each
header in a row, and in some versions parses in a time (CVE-2024-6232) and a memory that grow with a header's square.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

LARGEST_HEADER = 1 << 13
"""Bytes of a header in front of a member, and of all that are of the whole archive; a path has at most 4096."""
_MOST_IN_A_ROW = 8
_USUAL = 1 << 10
"""Bytes of headers that any number of members may have in front"""
_SPARE = 1 << 31
"""Squared bytes of headers beyond the usual ones that an archive may have: some seconds of parsing."""
_GLOBAL = (tarfile.XGLTYPE,)
_IN_FRONT = (*_GLOBAL, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def bounded_members() -> type[tarfile.TarInfo]:
    """Return what `tarfile.open` makes the members of one archive of. Raises `tarfile.ReadError` beyond the bounds."""

    class Member(tarfile.TarInfo):
        __slots__ = ()
        in_a_row = 0
        everywhere = 0
        spent = 0

        def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
            """Look at a header before its content is read: tarfile's own place for subclasses to step in."""
            cls = type(self)
            in_front = self.type in _IN_FRONT
            cls.in_a_row = cls.in_a_row + 1 if in_front else 0
            cls.everywhere += self.size * (self.type in _GLOBAL)
            cls.spent += max(self.size**2 - _USUAL**2, 0) * in_front
            size = max(self.size * in_front, cls.everywhere)
            if size > LARGEST_HEADER or cls.in_a_row > _MOST_IN_A_ROW or cls.spent > _SPARE:
                raise tarfile.ReadError("it has headers larger or more than members have: pack it anew")
            return super()._proc_member(archive)  # type: ignore[misc]

    return Member


def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an archive without what extended headers say beside: a global one is copied into each."""
    for member in archive:
        member.pax_headers = {}
        yield member
