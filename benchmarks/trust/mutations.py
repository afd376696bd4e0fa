"""From valid files to hostile ones: bytes, JSON, zip members, pickle operations and tar members are changed."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import pickletools
import random
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from attnlens.state import DIGEST, sealed
from benchmarks.trust import payloads
from benchmarks.trust.guard import Case, Link

_INTERESTING = (
    b"\x00",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff" * 8,
    b"\x00" * 8,
    b"\x80",
    b"9" * 12,
    b"-1",
    b"\x1b[2J",
    b"\n",
)

_HEADERS = {
    "'<f4'": ("'|O'", "'<f8'", "'|V999999999'", "'<U9999'", "'<M8[s]'", "'|V2'", "'<c16'", "[('a','<f4')]"),
    "(8,": ("(99999999999,", "(-1,", "(8,8,8,", "(2**60,", "(__import__('os').system('touch CANARY'),", "(True,"),
    "False": ("True", "None", "0", "open('CANARY','w')"),
    "}": ("", "}" + " " * 60_000, "(" * 5000, "[" * 90 + "]" * 90 + "}"),
}
"""What the header of a stored array says, and what is put in its place."""


class Mutator:
    """Draws hostile cases from valid ones; ``values`` are extra JSON values, such as hypothesis makes."""

    def __init__(self, seed: int | str, values: list[Any]) -> None:
        self.random = random.Random(seed)
        self.values = [*payloads.VALUES, *values]
        code, size = payloads.running(), payloads.growing()
        self.fragments = [*code.items(), *size.items()]

    def mutate(self, case: Case) -> Case:
        """Return a case with one file changed in one to three ways."""
        files, how = dict(case.files), []
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            plain = [name for name, content in files.items() if isinstance(content, bytes)]
            name = self.random.choice(plain) if plain else ""
            if not name:
                break
            change = self.random.choice(self._ways(name))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # zipfile's, of names that stand twice
                try:
                    changed = change(files[name])
                except Exception:  # noqa: BLE001  # too broken by now to be changed by its structure
                    changed = self.bytes(files[name])
            how.append(f"{name}: {change.__name__}")
            files[name] = changed
            if name != case.given and self.random.random() < 0.03:  # a link that a user names is followed
                files[name] = Link(self.random.choice(("FORBIDDEN/secret.safetensors", "/etc/passwd", name, "..")))
        return Case(case.format, f"{case.what}; {', '.join(how)}", files, case.given, made="mutated")

    def _ways(self, name: str) -> list[Callable[[bytes], bytes]]:
        if name.endswith((".json", ".jsonl")):
            return [self.bytes, self.json, self.json, self.json, self.document]
        if name.endswith(".safetensors"):
            return [self.bytes, self.header, self.header]
        if name.endswith((".pth", ".bin", ".pt")):
            return [self.bytes, self.archive, self.pickle, self.pickle]
        if name.endswith(".npz"):
            return [self.bytes, self.archive, self.array]
        if ".tar" in name:
            return [self.bytes, self.tar, self.tar]
        return [self.bytes, self.picture]

    def bytes(self, content: bytes) -> bytes:
        """Flip, overwrite, cut, double or insert bytes."""
        data, rng = bytearray(content), self.random
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else min(rng.randrange(200), len(data))
            way = rng.randrange(6)
            if way == 0 and at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            elif way == 1:
                piece = rng.choice(_INTERESTING)
                data[at : at + len(piece)] = piece
            elif way == 2:
                del data[at : at + rng.choice((1, 8, 100, len(data)))]
            elif way == 3:
                data[at:at] = rng.choice(_INTERESTING)
            elif way == 4:
                data[at:at] = data[at : at + rng.choice((1, 16, 256))]
            else:
                data[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((0, 1, 2**31, 2**32 - 1, len(data))))
        return bytes(data)

    def document(self, _content: bytes) -> bytes:
        """Put a whole hostile document in place."""
        return self.random.choice([*payloads.DOCUMENTS.values(), json.dumps(self.random.choice(self.values)).encode()])

    def json(self, content: bytes) -> bytes:
        """Change values and names of a JSON document, or of one of its lines."""
        lines = content.rstrip(b"\n").split(b"\n") if b"\n{" in content and content.startswith(b'{"') else [content]
        place = self.random.randrange(len(lines))
        lines[place] = self._changed(json.loads(lines[place]))
        return b"\n".join(lines)

    def _changed(self, data: Any) -> bytes:
        for _ in range(self.random.choice((1, 1, 2, 5))):
            data = self._change(data)
        if isinstance(data, dict) and DIGEST in data and self.random.random() < 0.9:  # what lies behind the digest
            data = sealed({name: value for name, value in data.items() if name != DIGEST})
        text = json.dumps(data)
        if self.random.random() < 0.1:
            text = text.replace("{", '{"architecture": 1, "a": 2, "a": 3,', 1).replace(",}", "}")
        return text.replace("0.5", "1e999").encode() if self.random.random() < 0.05 else text.encode()

    def _change(self, data: Any) -> Any:
        holders: list[Any] = [data]
        for holder in holders:
            inner = holder.values() if isinstance(holder, dict) else holder if isinstance(holder, list) else ()
            holders.extend(value for value in inner if isinstance(value, dict | list))
        holder, rng = rng_choice(self.random, holders), self.random
        if isinstance(holder, dict) and holder:
            key = rng.choice(list(holder))
            way = rng.randrange(5)
            if way == 0:
                del holder[key]
            elif way == 1:
                holder[str(rng.choice(payloads.NAMES))] = holder.pop(key)
            elif way == 2:
                extra = rng.choice(list(payloads.HOSTILE_KEYS))
                holder[extra] = deepcopy(payloads.HOSTILE_KEYS[extra])
            else:
                holder[key] = self._value()
        elif isinstance(holder, list) and holder:
            holder[rng.randrange(len(holder))] = self._value()
        else:
            return self._value()
        return data

    def _value(self) -> Any:
        """Return a value of one's own: one that is shared would be changed with the next document, or hold itself."""
        return deepcopy(self.random.choice(self.values))

    def header(self, content: bytes) -> bytes:
        """Change the header of a safetensors file."""
        (length,) = struct.unpack("<Q", content[:8])
        header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
        tensors = [value for name, value in header.items() if name != "__metadata__"]
        way, rng = self.random.randrange(6), self.random
        if way == 0 and tensors:
            rng.choice(tensors)["shape"] = rng.choice(
                ([0, 2**62], [10**9, 10**9], [-1], [1] * 100, [2**64], [8, 8, 1, 1], [])
            )
        elif way == 1 and tensors:
            rng.choice(tensors)["dtype"] = rng.choice(
                ("F64", "F4", "C64", "BOOL", "I64", "F8_E8M0", "BF16", "X", "\x1b[2J")
            )
        elif way == 2 and tensors:
            rng.choice(tensors)["data_offsets"] = rng.choice(([0, 8], [8, 0], [0, 2**63], [0, len(body)], [-8, 0], [0]))
        elif way == 3:
            name = rng.choice(list(header))
            header[rng.choice(payloads.NAMES)] = header.pop(name)
        elif way == 4:
            body = rng.choice((body[:-1], bytes(len(body)), b"\xff" * len(body), b"\x7f\x7f" * (len(body) // 2)))
        else:
            header["__metadata__"] = {
                "architecture": rng.choice(("vit_tiny_patch16_224", *payloads.NAMES)),
                "model_args": self._args(),
            }
        text = self._changed(header) if rng.random() < 0.3 else json.dumps(header).encode()
        return (
            struct.pack("<Q", len(text) if rng.random() < 0.9 else rng.choice((0, 2**63, 10**8, len(text) + 1)))
            + text
            + body
        )

    def _args(self) -> str:
        name = self.random.choice(list(payloads.HOSTILE_KEYS))
        return json.dumps(
            {
                "embed_dim": 8,
                "depth": 2,
                "num_heads": 2,
                "img_size": 16,
                "patch_size": 8,
                name: payloads.HOSTILE_KEYS[name],
            }
        )

    def archive(self, content: bytes) -> bytes:
        """Change a zip archive's members: shadowed, renamed, compressed, grown, or with sizes that lie."""
        rng = self.random
        if rng.random() < 0.03:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                name = rng.choice([*archive.namelist(), "archive/data.pkl", "a.npy"])
            return payloads.zip_bomb(
                name,
                prefix=rng.choice(
                    (
                        b"",
                        b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'fortran_order': False, 'shape': (67108864,), }\n",
                    )
                ),
            )
        members = members_of(content)
        at = rng.randrange(len(members))
        name, inner = members[at]
        way = rng.randrange(7)
        if way == 0:
            members.append((name, self.bytes(inner)))
        elif way == 1:
            members[at] = (rng.choice(payloads.NAMES) or "x", inner)
        elif way == 2:
            members.insert(0, (f"other/{name.partition('/')[2] or name}", inner))
        elif way == 3:
            del members[at]
        elif way == 4:
            members[at] = (name, self.bytes(inner))
        elif way == 5:
            members.append((rng.choice(payloads.NAMES) or "x", bytes(100_000)))
        method = (
            zipfile.ZIP_STORED
            if rng.random() < 0.7
            else rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        )
        found = zip_of(members, method)
        if way == 6:  # the directory lies about a size
            entry = found.rfind(b"PK\x01\x02") + rng.choice((8, 10, 20, 24, 28, 42))
            found = found[:entry] + struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1))) + found[entry + 4 :]
        return found

    def pickle(self, content: bytes) -> bytes:
        """Put hostile operations into the pickle of a checkpoint, in front of, inside or in place of what it holds."""
        if not zipfile.is_zipfile(io.BytesIO(content)):
            return self._operations(content, 3)
        members = members_of(content)
        return zip_of(
            [(name, self._operations(inner, 0) if name.endswith("data.pkl") else inner) for name, inner in members]
        )

    def _operations(self, content: bytes, number: int) -> bytes:
        """Change the pickle ``number`` of several in a row."""
        begin, stream = 0, io.BytesIO(content)
        for _ in range(number + 1):
            begin = stream.tell()
            places = [
                begin + 2 * (begin == 0),
                *(begin + position for _, _, position in pickletools.genops(stream) if position),
            ]
        end, rng = stream.tell(), self.random
        _, fragment = rng.choice(self.fragments)
        way = rng.randrange(4)
        if way == 0:
            changed = b"\x80\x02" + fragment + b"."
            return content[:begin] + changed + content[end:]
        at = min(max(rng.choice(places), begin), end - 1)
        if way == 1:
            return content[:at] + fragment + b"0" + content[at:]
        if way == 2:
            return content[:at] + fragment + content[at:]
        return content[:begin] + self.bytes(content[begin:end]) + content[end:]

    def array(self, content: bytes) -> bytes:
        """Change the header of a stored array."""
        members = members_of(content)
        rng = self.random
        at = rng.randrange(len(members))
        name, inner = members[at]
        length = struct.unpack("<H", inner[8:10])[0]
        text = inner[10 : 10 + length].decode("latin1")
        old, new = rng.choice([(old, new) for old, options in _HEADERS.items() for new in options])
        text = text.replace(old, new, 1)
        version = rng.choice((1, 1, 1, 2, 3, 9))
        size = struct.pack("<H", min(len(text), 65535)) if version == 1 else struct.pack("<I", len(text))
        members[at] = (name, b"\x93NUMPY" + bytes((version, 0)) + size + text.encode("latin1") + inner[10 + length :])
        return zip_of(members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))

    def picture(self, _content: bytes) -> bytes:
        """Put another kind of image, or a bomb, in place."""
        rng = self.random
        return rng.choice((payloads.EPS, payloads.png_bomb(rng.choice((3000, 8000))), b"P6 40000 40000 255\n", b"", b"GIF89a" + bytes(60), b"II*\x00" + bytes(90), b"BM" + b"\xff" * 60))  # fmt: skip  # noqa: E501

    def tar(self, content: bytes) -> bytes:
        """Change a tar's members, or what it is compressed with."""
        rng = self.random
        pack = {b"\x1f\x8b": gzip.compress, b"\xfd7": lzma.compress}.get(content[:2], lambda inner: inner)
        if b"GNU.sparse" in content[:4096] or len(content) > 1 << 20:
            return self.bytes(content)
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            members = [(member, archive.extractfile(member).read()) for member in archive if member.isreg()]  # type: ignore[union-attr]
        buffer = io.BytesIO()
        at, way = rng.randrange(len(members)), rng.randrange(7)
        with tarfile.open(
            fileobj=buffer, mode="w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
        ) as archive:
            for number, (member, content_of) in enumerate(members):
                inner = content_of
                if number == at:
                    if way == 0:
                        member.name = (
                            rng.choice(("../x/0.png", "/etc/x/0.png", "FORBIDDEN/x/0.png", *payloads.NAMES)) or "x"
                        )
                    elif way == 1:
                        member.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE))
                        member.linkname, member.size, inner = (
                            rng.choice(("/etc/passwd", "FORBIDDEN/secret.png", "../x")),
                            0,
                            b"",
                        )
                    elif way == 2:
                        inner = self.picture(inner)
                        member.size = len(inner)
                    elif way == 3:
                        inner = bytes(rng.choice((1, 1, 1, 1, 1, 1, 1, 65)) << 20)
                        member.size = len(inner)
                    elif way == 4:
                        member.pax_headers = {"GNU.sparse.size": str(2**40), "comment": "x" * rng.choice((10, 1 << 20))}
                member.name = member.name.replace("\0", "0").encode(errors="replace").decode()
                archive.addfile(member, io.BytesIO(inner))
        data = bytearray(buffer.getvalue())
        if way == 5:  # a size that lies, under a checksum that holds
            data[124:136] = rng.choice((b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12))
            if rng.random() < 0.5:
                data[156:157] = rng.choice((b"x", b"L", b"S", b"K"))
            data[148:156] = b" " * 8
            data[148:156] = b"%06o\0 " % sum(data[:512])
        return pack(bytes(data))


def rng_choice(rng: random.Random, items: list[Any]) -> Any:
    """Choose an item, the first ones (the outer ones) more often."""
    return items[min(int(rng.expovariate(0.5)), len(items) - 1)] if rng.random() < 0.5 else rng.choice(items)


def members_of(content: bytes) -> list[tuple[str, bytes]]:
    """Return the members of an archive that is no bomb. Raises `ValueError` for one."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(info.file_size for info in archive.infolist()) > 1 << 20:
            raise ValueError("a bomb")
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def zip_of(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip archive, of members that may share a name."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()
