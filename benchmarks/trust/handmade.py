"""Cases written by hand: every payload in every place it fits, and those that found defects. Tests run them all."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Iterator

from benchmarks.trust import payloads, seeds
from benchmarks.trust.guard import Case, Link
from benchmarks.trust.handmade_sizes import sized
from benchmarks.trust.mutations import zip_of


def handmade() -> list[Case]:
    """Return every case."""
    return [
        *_pickles(),
        *_documents(),
        *_links(),
        *_headers(),
        *_archives(),
        *_packed(),
        *_configurations(),
        *_images(),
        *_claims(),
        *_results(),
        *sized(),
    ]


def _pickles() -> Iterator[Case]:
    whole, legacy = seeds.pth(seeds.transformers_state()), seeds.pth(seeds.transformers_state(), legacy=True)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    front = _pickle_ends(legacy)
    for name, fragment in {**payloads.running(), **payloads.growing()}.items():
        inner = b"\x80\x02" + fragment + b"."
        changed = [(path, inner if path.endswith("data.pkl") else content) for path, content in members]
        yield Case("pth", name, {"model.pth": zip_of(changed)}, "model.pth")
        shadowed = [("archive/data.pkl", inner), *members]
        yield Case("pth", f"{name}, shadowing", {"model.pth": zip_of(shadowed)}, "model.pth")
        behind = [*members, (next(path for path, _ in members if path.endswith("data.pkl")), inner)]
        yield Case("pth", f"{name}, second of its name", {"model.pth": zip_of(behind)}, "model.pth")
        yield Case("legacy pickle", name, {"model.pth": legacy[: front[2]] + inner + legacy[front[3] :]}, "model.pth")
        yield Case("legacy pickle", f"{name}, alone", {"model.bin": inner}, "model.bin")
        if name in payloads.running():
            config = {**seeds.TIMM, "model_args": {**seeds.MODEL_ARGS, "checkpoint_path": "FORBIDDEN/secret.pth"}}
            files = {"config.json": json.dumps(config).encode(), "pytorch_model.bin": zip_of(changed)}
            yield Case("timm folder", name, files)
    for name in ("one list, many dictionaries", "one state, many objects", "collisions", "tuples"):
        inner = b"\x80\x02" + payloads.growing()[name] + b"."
        changed = [(path, inner if path.endswith("data.pkl") else content) for path, content in members]
        state = {**seeds.results(), "checkpoints/default-1.pt": zip_of(changed)}
        yield Case("results folder", f"checkpoint, {name}", state)
    prefixed = b"junk" + whole
    yield Case("pth", "prefix", {"model.pth": prefixed}, "model.pth")
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
        archive.addfile(tarfile.TarInfo("pickle"))
    yield Case("legacy pickle", "tar", {"model.tar": tar.getvalue()}, "model.tar")


def _pickle_ends(content: bytes) -> list[int]:
    """Return where each of the five pickles of the legacy format ends."""
    import pickletools

    stream, ends = io.BytesIO(content), []
    for _ in range(5):
        list(pickletools.genops(stream))
        ends.append(stream.tell())
    return ends


def _documents() -> Iterator[Case]:
    weights = seeds.safetensors(seeds.transformers_state())
    shards = seeds.index(seeds.transformers_state(), "safetensors")
    for name, text in payloads.DOCUMENTS.items():
        yield Case("timm folder", name, {"config.json": text, "model.safetensors": weights})
        yield Case("shard index", name, {**shards, "model.safetensors.index.json": text})
        yield Case("params.json", name, {"params.json": text}, "params.json")
        for place in ("config.json", "results.jsonl", "summary.json", "runs/default-0.json"):
            yield Case("results folder", f"{place}: {name}", {**seeds.results(), place: text})
        header = struct.pack("<Q", len(text)) + text
        yield Case("safetensors", name, {"model.safetensors": header}, "model.safetensors")


def _links() -> Iterator[Case]:
    config, weights = json.dumps(seeds.TRANSFORMERS).encode(), seeds.safetensors(seeds.transformers_state())
    shards = seeds.index(seeds.transformers_state(), "safetensors")
    first = next(name for name in shards if name.endswith(".safetensors"))
    outside = Link("FORBIDDEN/secret.safetensors")
    yield Case("transformers folder", "link to weights", {"config.json": config, "model.safetensors": outside})
    yield Case(
        "transformers folder",
        "link to config",
        {"config.json": Link("FORBIDDEN/secret.json"), "model.safetensors": weights},
    )
    yield Case("transformers folder", "circle", {"config.json": Link("config.json"), "model.safetensors": weights})
    yield Case("shard index", "link to a shard", {**shards, first: outside})
    yield Case(
        "shard index", "link to the index", {**shards, "model.safetensors.index.json": Link("FORBIDDEN/secret.json")}
    )
    listing = json.loads(shards["model.safetensors.index.json"])
    for name in (*payloads.NAMES, "linked/secret.safetensors", "circle/a.safetensors"):
        changed = {**listing, "weight_map": dict.fromkeys(listing["weight_map"], name)}
        links = {"linked": Link("FORBIDDEN"), "circle": Link("circle"), "link.safetensors": outside}
        yield Case(
            "shard index",
            f"shard {name[:40]!r}",
            {**shards, **links, "model.safetensors.index.json": json.dumps(changed).encode()},
        )
    for place in (
        "results.jsonl",
        "summary.json",
        "config.json",
        "runs",
        "checkpoints",
        "runs/default-0.json",
        "summary.csv",
    ):
        kept = {
            name: content
            for name, content in seeds.results().items()
            if name != place and not name.startswith(f"{place}/")
        }
        target = "FORBIDDEN" if "." not in place else "FORBIDDEN/secret.json"
        yield Case("results folder", f"link {place}", {**kept, place: Link(target)})
    yield Case("image folder", "link", {**seeds.images(), "cat/9.png": Link("FORBIDDEN/secret.png")})
    yield Case("text folder", "link", {"a.txt": b"words " * 20, "b.txt": Link("FORBIDDEN/secret.py")})
    yield Case("text folder", "bytes of value 0", {"a.txt": b"words\0" * 20})
    yield Case("image folder", "linked class", {**seeds.images(), "cow": Link("FORBIDDEN")})


def _headers() -> Iterator[Case]:
    def file(header: dict, body: bytes) -> bytes:
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body

    def tensor(shape, begin, end, dtype="F32"):
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    four = {role: tensor([8, 8], 256 * i, 256 * (i + 1)) for i, role in enumerate(("q", "k", "v", "o"))}
    for prefix in (
        *payloads.NAMES,
        "blocks.\u00b2.attn",
        f"blocks.{'1' * 5000}.attn",
        "a{head}",
        "{head:>999999999}{head}",
    ):
        named = {f"{prefix}.{role}.weight": value for role, value in four.items()}
        yield Case(
            "safetensors",
            f"prefix {prefix[:40]!r}",
            {"m.safetensors": file(named, bytes(range(256)) * 4)},
            "m.safetensors",
        )
    for what, shape in {
        "many axes": [1] * 100 + [0],
        "empty, long": [0, 2**62],
        "empty, longest": [0, 2**63, 2**63],
    }.items():
        yield Case("safetensors", what, {"m.safetensors": file({"a": tensor(shape, 0, 0)}, b"")}, "m.safetensors")
    many = {f"b{i}.{role}.weight": tensor([0, 0], 0, 0) for i in range(6000) for role in "qkvo"}
    yield Case("safetensors", "many empty layers", {"m.safetensors": file(many, b"")}, "m.safetensors")
    huge = b"\xff\xff\x7f\x7f" * 256
    yield Case(
        "safetensors",
        "largest numbers",
        {"m.safetensors": file({f"a.{r}.weight": v for r, v in four.items()}, huge)},
        "m.safetensors",
    )
    whole = {f"a.{role}.weight": tensor([4, 8], 256 * i, 256 * (i + 1), "C64") for i, role in enumerate("qkvo")}
    yield Case("safetensors", "complex numbers", {"m.safetensors": file(whole, bytes(1024))}, "m.safetensors")


def _archives() -> Iterator[Case]:
    big = (
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '|u1', 'fortran_order': False, 'shape': (268435328,), }".ljust(117)
        + b"\n"
    )
    yield Case("npz", "bomb", {"m.npz": payloads.zip_bomb("a.npy", prefix=big)}, "m.npz")
    yield Case("pth", "bomb", {"m.pth": payloads.zip_bomb("archive/data.pkl", prefix=b"X\x00\x00\x00\x10")}, "m.pth")
    declared = big.replace(b"268435328", b"999999999")
    for what, content in {
        "declared, not there": declared,
        "no array": b"plain text",
        "pickled": big.replace(b"|u1", b"|O "),
        "open bracket": big.replace(b"(268435328,)", b"( 268435328,"),
    }.items():
        yield Case("npz", what, {"m.npz": zip_of([("a.npy", content), ("b.txt", b"x")])}, "m.npz")
    literal = big.replace(b"(268435328,)", b"(" * 12 + b")" * 12)
    yield Case("npz", "nested literal", {"m.npz": zip_of([("a.npy", literal)])}, "m.npz")
    yield Case("decoded cache", "bomb", {"c.npz": payloads.zip_bomb("train.npy", prefix=big)}, "c.npz")
    yield Case("decoded cache", "one array", {"c.npz": b"\x93NUMPY\x01\x00\x76\x00" + big[10:]}, "c.npz")
    yield Case("decoded cache", "no arrays", {"c.npz": zip_of([("a.npy", b"x"), ("train.npy", b"x")])}, "c.npz")


def _packed() -> Iterator[Case]:
    """Yield archives that unpack to more than they should, lead out of their folder, or hold archives."""
    zeros, weights = bytes(64 << 20), seeds.safetensors(seeds.transformers_state())
    outside = "../../../FORBIDDEN/secret.pth"
    links = {"m.pth": (tarfile.SYMTYPE, outside), "n.pth": (tarfile.LNKTYPE, outside), "o.pth": (tarfile.FIFOTYPE, "")}
    for what, content in {
        "gzip bomb": gzip.compress(zeros),
        "bzip2 bomb": bz2.compress(zeros),
        "xz bomb": lzma.compress(zeros, preset=0),
        "xz dictionary": lzma.compress(b"a", filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]),
        "zip bomb": payloads.zip_bomb("model.safetensors", prefix=weights),
        "tar bomb": gzip.compress(seeds.tar({"model.pth": zeros})),
        "tar in tar": seeds.tar({"a.tar": seeds.tar({"model.safetensors": weights})}),
        "gzip in gzip": gzip.compress(gzip.compress(weights)),
        "names that lead out": seeds.tar({outside: weights}),
        "names with escapes": seeds.tar({"\x1b[2J\n.pth": b"x", "\x1b[3J.pth": b"y"}),
        "many members": seeds.tar({f"{i}.txt": b"" for i in range(20_000)}),
        "code": seeds.tar({"model.pth": b"\x80\x02" + payloads.running()["os.system"] + b"."}),
    }.items():
        yield Case("packed", what, {"m.tar.gz": content}, "m.tar.gz")
    for name, (kind, target) in links.items():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
        yield Case("packed", f"link {kind!r}", {"m.tar": buffer.getvalue()}, "m.tar")


def _configurations() -> Iterator[Case]:
    weights, own = seeds.safetensors(seeds.timm_state()), seeds.safetensors(seeds.transformers_state())
    for key, value in payloads.HOSTILE_KEYS.items():
        inside = {**seeds.TIMM, "model_args": {**seeds.MODEL_ARGS, key: value}}
        yield Case(
            "timm folder",
            f"model_args {key}",
            {"config.json": json.dumps(inside).encode(), "model.safetensors": weights},
        )
        metadata = {"architecture": seeds.TIMM["architecture"], "model_args": json.dumps(inside["model_args"])}
        named = seeds.safetensors(seeds.timm_state(), metadata)
        yield Case("safetensors", f"metadata {key}", {"m.safetensors": named}, "m.safetensors")
        beside = {**seeds.TIMM, key: value}
        yield Case(
            "timm folder", f"config {key}", {"config.json": json.dumps(beside).encode(), "model.safetensors": weights}
        )
        other = {**seeds.TRANSFORMERS, key: value}
        yield Case("transformers folder", key, {"config.json": json.dumps(other).encode(), "model.safetensors": own})
        gemma = json.dumps({**seeds.GEMMA, key: value}).encode()
        files = {"config.json": gemma, "model.safetensors": seeds.safetensors(seeds.gemma_state())}
        yield Case("transformers folder", f"gemma {key}", files)
    for name in payloads.NAMES:
        config = json.dumps({**seeds.TIMM, "architecture": name}).encode()
        yield Case("timm folder", f"architecture {name[:40]!r}", {"config.json": config, "model.safetensors": weights})
        config = json.dumps({**seeds.TRANSFORMERS, "model_type": name}).encode()
        yield Case(
            "transformers folder", f"model_type {name[:40]!r}", {"config.json": config, "model.safetensors": own}
        )
    large = {**seeds.TIMM, "model_args": {**seeds.MODEL_ARGS, "embed_dim": 8192, "depth": 48, "num_heads": 2}}
    jax = zip_of(
        [
            (
                "a/b.npy",
                zipfile.ZipFile(io.BytesIO(seeds.npz(seeds.transformers_state()))).read(
                    "encoder.layer.0.layernorm_before.weight.npy"
                ),
            )
        ]
    )
    yield Case(
        "timm folder",
        "large network, small file",
        {"config.json": json.dumps(large).encode(), "model.safetensors": weights},
    )
    yield Case("npz", "JAX names, large network", {"config.json": json.dumps(large).encode(), "m.npz": jax}, "m.npz")


def _images() -> Iterator[Case]:
    bombs = {f"{name}/{i}.png": payloads.png_bomb(4000) for name in ("cat", "dog") for i in range(4)}
    yield Case("image folder", "bombs", bombs)
    yield Case("image folder", "PostScript", {**seeds.images(), "cat/9.png": payloads.EPS})
    yield Case("image folder", "no text", {**seeds.images(), "cat/\udcff.png": seeds.image(5)})
    yield Case("image folder", "escapes", {**seeds.images(), "\x1b[2J\n/9.png": seeds.image(5)})
    # streams of xz and members of gzip may follow each other: a MiB of zeros, compressed once
    for pack, suffix in ((gzip.compress, "gz"), (lzma.compress, "xz")):
        head, mebibyte = bytearray(seeds.tar({"cat/0.png": b""})[:512]), pack(bytes(1 << 20))
        for what, kind, size in (("bomb", b"0", 60), ("skipped bomb", b"0", 2000), ("header bomb", b"x", 500)):
            head[124:136], head[156:157], head[148:156] = b"%011o\0" % (size << 20), kind, b" " * 8
            if what == "skipped bomb":
                head[:100] = b"cat/0.txt".ljust(100, b"\0")
            head[148:156] = b"%06o\0 " % sum(head)
            member = pack(bytes(head)) + mebibyte * size
            yield Case(
                "image tar",
                f"{what}, {suffix}",
                {f"data.tar.{suffix}": member * (8 if what == "bomb" else 1)},
                f"data.tar.{suffix}",
            )
    for kind in (b"x", b"L", b"K", b"g"):
        data = bytearray(seeds.tar(seeds.images()))
        data[124:136], data[156:157], data[148:156] = b"\x80" + b"\x00" * 3 + b"\xff" * 8, kind, b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        yield Case("image tar", f"length of a {kind.decode()} header", {"data.tar": bytes(data)}, "data.tar")


def _claims() -> Iterator[Case]:
    """Sizes that are claimed: of members of a tar that are skipped, of networks."""
    for size in (2**33, 2**40, 2**62):
        for name in ("readme.txt", "train/cat/0.png"):
            for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
                info = tarfile.TarInfo(name)
                info.size = size
                yield Case("image tar", f"{name} claims {size}", {"data.tar": info.tobuf(form)}, "data.tar")
    weights = seeds.safetensors(seeds.timm_state())
    for name in ("maxvit_tiny_tf_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "levit_128"):
        for arguments in ({"img_size": 65536}, {"img_size": [65536, 16]}):
            config = json.dumps({"architecture": name, "model_args": arguments}).encode()
            files = {"config.json": config, "model.safetensors": weights}
            yield Case("timm folder", f"{name} {arguments}", files)


def _results() -> Iterator[Case]:
    known = json.loads(seeds.results()["runs/default-0.json"])
    odd = (
        {"arm": "\x1b[2J"},
        {"arm": "x"},
        {"seed": "a"},
        {"status": "?"},
        {"streams": 7},
        {"provenance": {}},
        {"accuracy": None},
    )
    more = ({"structure": []}, {"epoch": 10**40}, {"lr": float("nan")}, {"models_in_stack": 0}, {"tuning": None})
    for change in (*odd, *more):
        changed = {**known, "records": [{**line, **change} for line in known["records"]]}
        text = seeds.state_file(changed)
        yield Case("results folder", f"record {change}"[:80], {**seeds.results(), "runs/default-0.json": text})
    escapes = {"device": "\x1b[2J", "command": "\x1b]0;x\x07\n| a |", "versions": {"\x1b": "\u202e"}}
    changed = {**known, "records": [{**line, "provenance": escapes} for line in known["records"]]}
    yield Case(
        "results folder",
        "escapes in the provenance",
        {**seeds.results(), "runs/default-0.json": seeds.state_file(changed)},
    )
    infinite = seeds.results()["results.jsonl"].replace(b'"test_loss": 2.0', b'"test_loss": 1e999')
    yield Case("results folder", "infinite losses", {**seeds.results(), "results.jsonl": infinite})
    for what, change in {
        "no stack": {"stack": {}},
        "records": {"records": "[[[["},
        "unit": {"unit": ["x"]},
        "epoch": {"epoch": "1"},
        "streams": {"streams": {}},
    }.items():
        from benchmarks.trust.readers import CONFIG, loaded_stack

        state = {
            "config": CONFIG.sha256(),
            "unit": ["default-1"],
            "epoch": 1,
            "step": 0,
            "seconds": 1.0,
            "streams": {1: ["10"]},
            "records": json.dumps([[seeds.record("default", 1, 0)]]),
            "stack": loaded_stack().snapshot(),
            **change,
        }
        yield Case(
            "results folder", f"checkpoint, {what}", {**seeds.results(), "checkpoints/default-1.pt": seeds.pth(state)}
        )
