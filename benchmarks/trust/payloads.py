"""Hostile content written by hand: pickles that would run code or grow, names that lead outside, bombs."""

from __future__ import annotations

import json
import pickle
import struct
import zlib
from functools import cache
from typing import Any

TOUCH = b"touch CANARY"
"""What payloads try to run; `hostile.py` puts the canary's path in."""


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


RUN = text(TOUCH.decode())
CODE = text(f"__import__('os').system('{TOUCH.decode()}')")


def running() -> dict[str, bytes]:
    """Return pickle fragments that leave one object and would run code under `pickle.load`."""
    inner = pickle.dumps(zlib.compress(b"x"))
    return {
        "os.system": _call("os", "system", RUN),
        "posix.system": _call("posix", "system", RUN),
        "eval": _call("builtins", "eval", CODE),
        "exec": _call("builtins", "exec", CODE),
        "__builtin__.eval": _call("__builtin__", "eval", CODE),
        "subprocess.Popen": _call("subprocess", "Popen", b"(" + text("touch") + text("CANARY") + b"l"),
        "STACK_GLOBAL": b"\x8c\x02os\x8c\x06system\x93(" + RUN + b"tR",
        "INST": b"(" + RUN + b"ios\nsystem\n",
        "OBJ": b"(cos\nsystem\n" + RUN + b"o",
        "NEWOBJ": b"csubprocess\nPopen\n(" + RUN + b"t\x81",
        "NEWOBJ_EX": b"csubprocess\nPopen\n(" + RUN + b"t}\x92",
        "getattr": _call("builtins", "getattr", b"cos\nsystem\n", text("__call__")),
        "load_from_bytes": _call("torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", len(inner)) + inner),
        "torch.load": _call("torch", "load", text("FORBIDDEN/secret.pth")),
        "torch.hub.load": _call("torch.hub", "load", text("owner/name"), text("model")),
        "runpy": _call("runpy", "run_path", text("FORBIDDEN/secret.py")),
        "import": _call("importlib", "import_module", text("antigravity")),
        "BUILD": b"ccollections\nOrderedDict\n)R}" + text("items") + b"cos\nsystem\nsb",
        "BUILD hides": b"ccollections\nOrderedDict\n)R}" + text("items") + b"K\x01sb",
        "extension": b"\x82\x01",
        "persistent": b"(" + text("module") + b"cos\nsystem\n" + text("a.py") + text("b") + b"tQ",
        "numpy": _call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n", b"K\x00\x85", text("b")),
        "codecs": _call("_codecs", "encode", RUN, text("idna")),
        "webbrowser": _call("webbrowser", "open", text("http://127.0.0.1:9/")),
    }


def growing() -> dict[str, bytes]:
    """Return pickle fragments that are short and would take much memory or time."""
    doubling = b"".join(b"c_codecs\nencode\n" for _ in range(28)) + text("ab") + b""
    chain = text("a") + b"".join(text("hex") + b"\x86R" for _ in range(28))
    tuples = b"K\x01" + b"".join(b"q%c" % i + b"h%c" % i + b"\x86" for i in range(60))
    collide = (
        b"}(" + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 60_000)) + b"u"
    )
    view = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\nFloatStorage\n" + text("0")
        + text("cpu") + b"K\x10tQK\x00(J\x40\x42\x0f\x00J\x40\x42\x0f\x00t(K\x00K\x00t\x89"
        + b"ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip
    small = (
        view.replace(b"K\x10tQ", b"K\x40tQ")
        .replace(b"J\x40\x42\x0f\x00", b"K\x08")
        .replace(b"K\x00K\x00t", b"K\x08K\x01t")
    )
    module = b"c__main__\nM\n)\x81}("
    kinds = [text(kind) for kind in ("_modules", "_buffers", "_parameters")]
    modules = b"Nq\x00" + b"".join(
        b"0" + module + b"".join(kind + b"h%c" % i for kind in kinds) + b"ubq%c" % (i + 1) for i in range(90)
    )
    doubled = b"]q\x00" + b"".join(b"0](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
    pairs = b"](" + b"".join(b"K%c" % (i % 250) + b"N\x86" for i in range(2000)) + b"e\x85q\x000"
    ordered = b"ccollections\nOrderedDict\n"
    copies = b"](" + (ordered + b"h\x00R") * 30_000 + b"e"
    state = b"}(" + b"".join(text(f"a{i}") + b"N" for i in range(2000)) + b"uq\x000"
    built = b"](" + (ordered + b")Rh\x00b") * 30_000 + b"e"
    key = text("k" * 20_000) + b"q\x00" + small + b"q\x010"
    keys = b"}(" + b"".join(b"J" + struct.pack("<i", i) + b"}h\x00h\x01s" for i in range(20_000)) + b"u"
    return {
        "modules in modules": b"}(" + text("w") + small + text("m") + modules + b"u",
        "lists that double": b"}("
        + text("w")
        + small
        + text("args")
        + b"cargparse\nNamespace\n)\x81}("
        + text("model")
        + text("vit_tiny_patch16_224")
        + text("model_kwargs")
        + b"}"
        + text("a")
        + doubled
        + b"subu",
        "one list, many dictionaries": pairs + copies,
        "one state, many objects": state + built,
        "one key, many names": key + keys,
        "one shape, many tensors": _axes(small),
        "bytearray": _call("builtins", "bytearray", b"J\x00\x00\x00\x70"),
        "encode chain": doubling + chain,
        "tensor": _call("torch", "Tensor", b"J\x40\x42\x0f\x00", b"J\x40\x42\x0f\x00"),
        "memo": b"Nr\xff\xff\xff\x7f",
        "tuples": b"}" + tuples + b"Ns",
        "collisions": collide,
        "view": view,
        "deep": b"(" * 50_000 + b"t" * 50_000,
        "lists": b"]" * 20_000 + b"a" * 19_999,
        "long string": b"X\xff\xff\xff\xff",
        "long bytes": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
        "itself": b"]q\x05h\x05a",
        "counter": _call("collections", "Counter", text("a" * 50)),
        "sparse": b"ctorch._utils\n_rebuild_sparse_tensor\n(NN" + b"tR",
        "weights": b"}" + text("\x1b[2J\x1b]0;title\x07 \u202e name\n") + view + b"s",
        "lone surrogate": b"}X\x03\x00\x00\x00\xed\xa0\x80" + view + b"s",
        "huge key": b"}\x8b\x00\x20\x00\x00" + b"\x7f" * 8192 + view + b"s",
    }


def _axes(view: bytes) -> bytes:
    """Return many tensors of one shape of very many axes."""
    shape = b"(" + b"K\x01" * 100_000 + b"tq\x000"
    start = view.partition(b"K\x00(")[0]
    one = start + b"K\x00h\x00h\x00\x89ccollections\nOrderedDict\n)RtR"
    return shape + b"](" + one * 3000 + b"e"


NAMES = [
    *("../secret.safetensors", "../../forbidden/secret.safetensors", "FORBIDDEN/secret.safetensors", "/etc/passwd"),
    *("..\\secret.safetensors", "C:\\secret.safetensors", "a\x00b.safetensors", "x" * 5000 + ".safetensors", ""),
    *(
        "\x1b[2J\x1b]0;owned\x07.safetensors",
        "a\nb.bin",
        "\u202etxt.bin",
        "link.safetensors",
        "linked/secret.safetensors",
    ),
    *("~/x.bin", "file:///etc/passwd", "http://127.0.0.1:9/x.bin", "hf-hub:owner/name", "local-dir:FORBIDDEN"),
    *(
        "{head}.q_proj.weight",
        "{head:>999999999}",
        "%n%s",
        "$(touch CANARY)",
        "[bold]x[/red]",
        "<script>alert(1)</script>",
    ),
    *("vit_tiny_patch16_224.augreg_in21k", "timm/vit_tiny_patch16_224", "os.system", "²", "1" * 5000, "../..", "."),
]
"""Strings for names of files, tensors, architectures and arms."""

HOSTILE_KEYS = {
    "auto_map": {"AutoModel": "modeling_evil.Model"},
    "trust_remote_code": True,
    "custom_pipelines": {"x": {"impl": "os"}},
    "checkpoint_path": "FORBIDDEN/secret.pth",
    "pretrained_cfg": {"file": "FORBIDDEN/secret.pth"},
    "pretrained": True,
    "cache_dir": "FORBIDDEN",
    "model_name": "x",
    "scriptable": True,
    "depth": 10**9,
    "embed_dim": 10**12,
    "img_size": 10**6,
    "num_heads": 0,
    "patch_size": 0,
    "depths": [10**9],
    "norm_layer": "os.system",
    "act_layer": "eval",
    "block_fn": "eval",
    "weight_init": "\x1b[2J",
    "drop_path_rate": float("nan"),
    "num_classes": -1,
    "class_token": "eval",
    "mlp_layer": "os",
    "num_hidden_layers": 10**9,
    "hidden_size": 10**30,
    "num_attention_heads": 3,
    "head_dim": 10**7,
    "architectures": 7,
    "num_key_value_heads": 7,
    "query_pre_attn_scalar": 0,
    "quantization_config": {"x": 1},
    "model_type": "../x",
    "vision_config": [],
    "text_config": 7,
    "torch_dtype": "os.system",
    "_name_or_path": "FORBIDDEN",
}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**30, -(10**18), 0.5, 1e308, -0.0, 1e-320, float("nan")),
    *(float("inf"), "", "x", "\x1b[31m", "\ud800", "a" * 10_000, [], {}, [[]], [0] * 1000, {"": ""}, "NaN", "1e999"),
    *NAMES,
]


@cache
def zeros(size: int) -> bytes:
    """Return so many zeros deflated, without an end: a block of a MiB, again and again, then the rest."""

    def packed(count: int) -> bytes:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        return packer.compress(bytes(count)) + packer.flush(zlib.Z_FULL_FLUSH)

    return packed(1 << 20) * (size >> 20) + packed(size & 0xFFFFF)


END = b"\x03\x00"
"""The last, empty block of a deflated stream."""


@cache
def zip_bomb(name: str, prefix: bytes = b"", size: int = 256 << 20) -> bytes:
    """Return a zip archive whose one member expands to a prefix and zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    content = packer.compress(prefix) + packer.flush(zlib.Z_FULL_FLUSH) + zeros(size) + END
    check = zlib.crc32(prefix)
    for _ in range(size >> 20):
        check = zlib.crc32(bytes(1 << 20), check)
    text = name.encode()
    fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0x21, check, len(content), size + len(prefix), len(text), 0)
    local = b"PK\x03\x04" + fields + text + content
    entry = b"PK\x01\x02" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + text
    return local + entry + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0)


@cache
def png_bomb(side: int) -> bytes:
    """Return a PNG of so many black pixels a side."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = side * (1 + 3 * side)
    rows = b"\x78\x9c" + zeros(size) + END + struct.pack(">HH", size % 65521, 1)
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(CANARY) (w) file closefile\nshowpage\n%%EOF\n"
"""PostScript, which Pillow would hand to Ghostscript."""

DOCUMENTS = {
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "many lists": b"[" + b"[]," * 700_000 + b"[]]",
    "many objects": b"[" + b"{}," * 700_000 + b"{}]",
    "long integer": b'{"schema": ' + b"9" * 1_000_000 + b"}",
    "twice": b'{"architecture": "a", "architecture": "b", "schema": "attnlens.params", "schema": 1}',
    "no text": b"\xff\xfe{\x00}\x00",
    "surrogate": json.dumps({"architecture": "\ud800", "model_type": "\udfff", "arm": "\ud800"}).encode(),
    "constants": b'{"a": NaN, "b": Infinity, "c": -Infinity, "d": 1e999}',
    "empty": b"",
    "null": b"null",
    "escapes": json.dumps({"architecture": "\x1b[2J\x1b]0;x\x07", "model_type": "\x1b[2J", "schema": "\x1b"}).encode(),
}
"""Whole documents, for any file that is JSON."""
