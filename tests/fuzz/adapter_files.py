"""Mutates adapter files and loads them, in a process whose memory is limited; prints what became of them as JSON.

Run by test_adapter_files.py: python adapter_files.py FOLDER SEED SCALE. Every outcome is one of

refused   AdapterFileError, no failed allocation behind it, and the model as it was, bit for bit and without adapters
equal     the weights, masks, buffers and adapters that the file had before it was mutated
legal     the digest was computed again: the model holds exactly the mutated tensors in exactly the mutated adapters;
          or a file of sparse adapters, which has none: its numbers are finite, and a model gives them back bit for bit
"""

from __future__ import annotations

import copy
import json
import pickletools
import random
import re
import resource
import signal
import struct
import sys
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import (
    AdapterCheckpoint,
    AdapterFileError,
    AdapterInjection,
    DynamicDoRA,
    LoRA,
    SparseAdapter,
    SparseSwitch,
    load,
    read_sparse,
)
from lightning_peft.checkpoint import ENTRY, adapter_state_dict, digest, recipe
from lightning_peft.functional.sparse_arithmetic import SparseDelta
from lightning_peft.inspection import report
from lightning_peft.interop import to_hf_peft
from lightning_peft.interop.host import trained_beside, whole_modules
from lightning_peft.interop.targets import find_targets
from lightning_peft.interop.verify import CONFIG, WEIGHTS, by_reading
from lightning_peft.surgery import adapters, eject

MEMORY = 64 * 2**20
SECONDS = 20.0  # for one mutation, on a machine that is busy with other things; a usual one takes milliseconds
# What to make of a number, a name or a list.
ODD = [
    None, True, False, -1, 0, 1, 2, 3, 2**31, 2**40, 10**12, 2**63, 10**30, 10**600, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "net.hidden", "\x1b[2J", "../../etc/passwd", "/etc/passwd", "a\x00b", "é" * 50, "os:system",
    "posix:system", "builtins:eval", "lightning_peft.adapters.lora:LoRA", "lightning_peft.adapters.low_rank:LowRank",
    "lightning_peft.adapters.base:Adapter", "torch.nn:Linear", ":", "torch:nn.Linear", b"bytes", 1j,
    [], {}, (), set(), [[]], {"": None}, {1: 2}, {None: 1}, ["net.hidden", "net.hidden"], torch.float32,
    torch.Size([2]),
]  # fmt: skip


class Net(L.LightningModule):
    """An embedding, a layer with a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.ModuleDict(
                {
                    "words": nn.Embedding(9, 6),
                    "hidden": nn.Linear(6, 8),
                    "norm": nn.BatchNorm1d(8),
                    "out": nn.Linear(8, 2),
                }
            )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        hidden = self.net["norm"](self.net["hidden"](self.net["words"](batch[0]).mean(1)))
        return nn.functional.cross_entropy(self.net["out"](hidden.relu()), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def train(folder: Path) -> list[Path]:
    """Checkpoints by the real callback: LoRA and DynamicDoRA, each whole and weights alone."""
    paths = []
    data = TensorDataset(torch.arange(36).view(12, 3) % 9, torch.arange(12) % 2)
    for kind in (LoRA, DynamicDoRA):
        trainer = L.Trainer(
            max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
            enable_model_summary=False,
            callbacks=[
                AdapterInjection(partial(kind, rank=2), targets=["words", "hidden"], train=["out"]),
                AdapterCheckpoint(),
            ],
        )  # fmt: skip
        trainer.fit(Net(), DataLoader(data, batch_size=6))
        for weights_only in (True, False):
            paths.append(folder / f"{kind.__name__}-{weights_only}.ckpt")
            trainer.save_checkpoint(paths[-1], weights_only=weights_only)
    return paths


class Late(BaseException):
    """Not an Exception, so that nothing can take it for a damaged file."""


def _late(*_: Any) -> None:
    raise Late


def bits(value: Tensor) -> bytes:
    return f"{value.dtype}{tuple(value.shape)}".encode() + bytes(
        value.detach().contiguous().flatten().view(torch.uint8)
    )


def snapshot(module: nn.Module, keys: Any = None) -> dict[str, bytes]:
    state = module.state_dict()
    return {key: bits(state[key]) for key in (state if keys is None else keys)}


class Subject:
    """One model, loaded into again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempts = 0
        self.original = path.read_bytes()
        self.checkpoint = torch.load(path, weights_only=True)
        self.net = Net()
        self.plain = copy.deepcopy(self.net.state_dict())
        self.before = self._everything()
        load(self.net, path)
        self.wanted = snapshot(self.net, adapter_state_dict(self.net))
        self.recipe = recipe(self.net)
        self.text = report(path).partition("bytes")[2]
        self.restore()

    def _everything(self) -> Any:
        return snapshot(self.net), [p.requires_grad for p in self.net.parameters()], sorted(self.net.__dict__)

    def restore(self) -> None:
        eject(self.net)
        self.net.load_state_dict(self.plain)
        assert self._everything() == self.before

    def attempt(self, path: Path, mutated: dict[str, Any] | None = None) -> str:
        """What comes of a file; `mutated` is its checkpoint, where the digest was computed again."""
        try:
            load(self.net, path)
        except AdapterFileError as error:
            refuse_hidden_failure(error)
            assert not adapters(self.net)
            assert self._everything() == self.before, "a failed load changed the model"
            outcome = "refused"
        else:
            got = snapshot(self.net, adapter_state_dict(self.net))
            if got == self.wanted and recipe(self.net)["adapters"] == self.recipe["adapters"]:
                outcome = "equal"
            else:
                assert mutated is not None, "a changed file was loaded under the old digest"
                entry, state = mutated[ENTRY], mutated["state_dict"]
                now = self.net.state_dict()
                assert got == {key: bits(state[key].to(now[key].dtype)) for key in adapter_state_dict(self.net)}
                assert recipe(self.net)["adapters"] == entry["recipe"]["adapters"]
                outcome = "legal"
            self.restore()
        self.attempts += 1
        if self.attempts % 8:
            return outcome
        try:
            text = report(path)
        except AdapterFileError as error:
            refuse_hidden_failure(error)
        else:
            assert mutated is not None or text.partition("bytes")[2].splitlines()[1:-3] == self.text.splitlines()[1:-3]
        return outcome


def refuse_hidden_failure(error: BaseException | None) -> None:
    """An allocation that failed was tried: it is not the refusal that was wanted."""
    while error is not None:
        text = str(error).lower()
        assert not isinstance(error, MemoryError), error
        assert "allocate" not in text, error
        assert "bad_alloc" not in text, error
        error = error.__cause__


# Bytes ----------------------------------------------------------------------------------------------------------------


def flip(subject: Subject, rng: random.Random) -> bytes:
    data = bytearray(subject.original)
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncate(subject: Subject, rng: random.Random) -> bytes:
    data = subject.original
    return data[: rng.randrange(len(data))] if rng.random() < 0.8 else data[rng.randrange(1, len(data)) :]


def insert(subject: Subject, rng: random.Random) -> bytes:
    data, start = subject.original, rng.randrange(len(subject.original))
    if rng.random() < 0.3:
        return data[:start] + data[start + rng.randrange(1, 200) :]
    piece = rng.randbytes(rng.choice([1, 4, 64])) if rng.random() < 0.5 else data[-rng.choice([22, 98, 400]) :]
    return data[:start] + piece + data[start:] if rng.random() < 0.8 else data + piece


def directory(subject: Subject, rng: random.Random) -> bytes:
    """Lies in the zip archive's directory: sizes, offsets, methods, names."""
    data = bytearray(subject.original)
    start = data.find(b"PK\x01\x02")
    place = rng.randrange(start, len(data) - 8)
    if rng.random() < 0.6:  # at a field of a record that is there
        entries = [i for i in range(start, len(data) - 4) if data[i : i + 4] == b"PK\x01\x02"]
        place = rng.choice(entries) + rng.choice([8, 10, 16, 20, 24, 28, 30, 32, 42])
    value = rng.choice([0, 1, 8, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, rng.randrange(2**32)])
    struct.pack_into("<H" if value < 2**16 else "<I", data, place, value)
    return bytes(data)


# Records --------------------------------------------------------------------------------------------------------------


def records_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(BytesIO(data)) as archive:
        found = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return {name: value for name, value in found.items() if name not in ("version", ".data/serialization_id")}


def written(records: dict[str, bytes]) -> bytes:
    """An archive as torch writes it."""
    buffer = BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    for name, value in records.items():
        writer.write_record(name, value, len(value))
    writer.write_end_of_file()
    return buffer.getvalue()


def deflated(records: dict[str, bytes], which: str) -> bytes:
    """An archive that ends as torch's does, with one record compressed."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in records.items():
            archive.writestr(f"archive/{name}", value, zipfile.ZIP_DEFLATED if name == which else zipfile.ZIP_STORED)
        count, start = len(archive.namelist()), archive.fp.tell()  # type: ignore[union-attr]
    length = len(buffer.getvalue()) - 22 - start
    end = start + length
    zip64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    return buffer.getvalue()[:-22] + zip64 + struct.pack("<4sIQI", b"PK\6\7", 0, end, 1) + buffer.getvalue()[-22:]


def swap_records(subject: Subject, rng: random.Random) -> bytes:
    records = records_of(subject.original)
    one, other = rng.sample(sorted(records), 2)
    match rng.randrange(7):
        case 0:
            records[one], records[other] = records[other], records[one]
        case 1:
            records[one] = records[other]
        case 2:
            del records[one]
        case 3:
            records[one] = records[one] * rng.choice([0, 2, 1000])
        case 4:
            records[rng.choice(["data/99", "constants.pkl", "Data.pkl", "data/0x", "../../evil", "/evil"])] = b"x" * 64
        case 5:
            return deflated(records, one)
        case 6:
            return bomb(records, one)
    return written(records)


@cache
def packed_zeros() -> bytes:
    """200 MB of zeros in 200 kB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join([*(packer.compress(bytes(2**20)) for _ in range(200)), packer.flush()])


def bomb(records: dict[str, bytes], which: str) -> bytes:
    """An archive with a record that is 200 kB in the file and 200 MB when it is read."""
    data = bytearray(deflated(records | {which: packed_zeros()}, ""))
    name = f"archive/{which}".encode()
    for start, method, length in ((data.rfind(name) - 46, 10, 24), (data.find(name) - 30, 8, 22)):
        struct.pack_into("<H", data, start + method, 8)
        struct.pack_into("<I", data, start + length, 200 * 2**20)
    return bytes(data)


def flip_pickle(subject: Subject, rng: random.Random) -> bytes:
    """The archive stays whole: what comes to torch is a damaged pickle."""
    records = records_of(subject.original)
    data = bytearray(records["data.pkl"])
    for _ in range(rng.choice([1, 1, 2, 5])):
        data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b"rRbqhtJMK.}])e(sQ0c"])
    return written(records | {"data.pkl": bytes(data)})


FUNCTIONS = [
    "__builtin__.bytearray", "__builtin__.eval", "_codecs.encode", "collections.OrderedDict", "os.system", "torch.load",
    "torch.DoubleStorage", "torch.FloatTensor", "torch.QInt8Storage", "torch.Size", "torch.Tensor",
    "torch._tensor._rebuild_from_type_v2", "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_qtensor", "torch._utils._rebuild_sparse_tensor",
    "torch.storage.UntypedStorage",
]  # fmt: skip


def numbers_in_pickle(subject: Subject, rng: random.Random) -> bytes:
    """Sizes, strides, offsets, lengths of storages, places in the memo: other numbers; and other functions."""
    records = records_of(subject.original)
    data = records["data.pkl"]
    operations = list(pickletools.genops(data))
    ends = [place for _, _, place in operations[1:]] + [len(data)]
    if rng.random() < 0.8:
        wanted = ("BININT", "BININT1", "BININT2")
    else:
        wanted = ("GLOBAL", "BINGET", "BINPUT", "LONG_BINPUT", "BINUNICODE")
    found = [(op, place, end) for (op, _, place), end in zip(operations, ends, strict=True) if op.name in wanted]
    for op, place, end in sorted(rng.sample(found, rng.choice([1, 1, 2])), key=lambda each: -each[1]):  # type: ignore[arg-type,return-value]
        if op.name.startswith("BININT"):
            value = rng.choice([0, 1, 2, 7, 255, 65535, 2**31 - 1, -1, -(2**31), 2**40, 10**12, 2**62, 2**63, 2**80])
            new = b"\x8a\x0c" + value.to_bytes(12, "little", signed=True)
        elif op.name == "GLOBAL":
            module, _, name = rng.choice(FUNCTIONS).rpartition(".")
            new = f"c{module}\n{name}\n".encode()
        elif op.name == "BINUNICODE":
            text = rng.choice([b"", b"cpu", b"meta", b"cuda", b"storage", b"0", b"1", b"../0", b"x" * 1000])
            new = b"X" + struct.pack("<I", rng.choice([len(text), len(text), 2**31])) + text
        else:
            new = rng.choice([b"h\x00", b"q\x01", b"r\xff\xff\xff\xff", b"r\x00\x10\x00\x00", b"j\x00\x00\x00\x00"])
        data = data[:place] + new + data[end:]
    return written(records | {"data.pkl": data})


# Contents -------------------------------------------------------------------------------------------------------------


def slots(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Every place that can be written to: container and key."""
    found: list[tuple[Any, Any]] = []
    if depth < 8 and isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += [(value, key), *slots(item, depth + 1)]
    return found


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def doubled(depth: int) -> list[Any]:
    """2^depth entries that are `depth` lists in the file."""
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def odd_tensor(value: Tensor, rng: random.Random) -> Any:
    flat = value.detach().clone()
    makers: list[Callable[[], Any]] = [
        lambda: flat + 1,
        lambda: flat * float("nan"),
        lambda: torch.full_like(flat, 1e38) if flat.is_floating_point() else flat * 0 - 1,
        lambda: flat.to(rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.float32])),
        lambda: flat.to(rng.choice([torch.int8, torch.int64, torch.bool, torch.uint16, torch.complex64, torch.uint8])),
        lambda: flat.float().to(torch.float8_e4m3fn),
        lambda: flat.flatten(),
        lambda: flat[None],
        lambda: flat.mT if flat.dim() > 1 else flat.flip(0),
        lambda: torch.zeros(0),
        lambda: torch.zeros(1).expand(10**12),
        lambda: torch.zeros(1).as_strided(flat.shape, [0] * flat.dim()),
        lambda: torch.zeros(1).as_strided((10**6, 10**6, 10**6), (0, 0, 0)),
        lambda: torch.zeros(3).expand(1000, 3),
        lambda: torch.zeros(1000)[:1],
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.sparse_coo_tensor(torch.zeros(2, 1).long(), torch.ones(1), (10**9, 10**9)),
        lambda: torch.eye(2).to_sparse_csr(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
        lambda: torch.empty(10**9, 10**3, device="meta"),
        lambda: torch.empty_like(flat, device="meta"),
        lambda: torch.view_as_complex(torch.ones(4, 2)).conj(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: nn.Parameter(flat) if flat.is_floating_point() else flat,
        lambda: flat.numpy().tolist(),
        lambda: flat[(0,) * flat.dim()],
    ]
    return rng.choice(makers)()


def contents(subject: Subject, rng: random.Random) -> dict[str, Any]:
    """The checkpoint with something else in it."""
    mutated = copy.deepcopy(subject.checkpoint)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        part = mutated.get(ENTRY) if rng.random() < 0.7 else mutated.get("state_dict")
        if part is mutated.get(ENTRY) and isinstance(part, dict) and rng.random() < 0.5:
            part = part.get("recipe")  # where the small fields are that decide what is built
        places = slots(part) or slots(mutated)
        container, key = rng.choice(places)
        value = container[key]
        match rng.randrange(8):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[rng.choice([f"{key}x", "net.hidden.A", "", 3, None, "\x1b[2J", "../up", "rank"])] = (
                    container.pop(key)
                )
            case 2 if isinstance(container, dict):
                container[rng.choice(["more", "net.new.A", "rank", "bias", 7])] = copy.deepcopy(value)
            case 3 if isinstance(container, list):
                container.insert(key, rng.choice([copy.deepcopy(value), rng.choice(ODD)]))
            case 4:
                container[key] = copy.deepcopy(rng.choice(places)[0])
            case 5:
                container[key] = rng.choice(
                    [nested(rng.choice([3, 40, 200])), doubled(rng.choice([4, 60])), ["x" * 100_000] * 1000]
                )
            case 6 if isinstance(value, Tensor):
                container[key] = odd_tensor(value, rng)
            case 7 if isinstance(value, (int, float)) and not isinstance(value, bool):
                container[key] = type(value)(value + rng.choice([-1, 1, 7, 1000]))
            case _:
                container[key] = odd_tensor(value, rng) if isinstance(value, Tensor) else copy.deepcopy(rng.choice(ODD))
    return mutated


def sealed(mutated: dict[str, Any]) -> bool:
    """Compute the digest again, as somebody would who knows the format; whether it could be."""
    try:
        for tensors in (mutated["state_dict"], mutated[ENTRY]["base"]):
            for value in tensors.values():
                if value.numel() > 10**6:
                    return False
        parts = list(islice(_walk(mutated[ENTRY]), 10**4))
        if len(parts) == 10**4 or sum(len(part) for part in parts if isinstance(part, str)) > 10**6:
            return False  # it would take too long here; under the old digest such files are tried
        mutated[ENTRY]["digest"] = digest(mutated["state_dict"], mutated[ENTRY])
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        return False
    return True


def _walk(value: Any) -> Any:
    yield value
    if isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _walk(item)


BYTES: dict[str, tuple[Callable[[Subject, random.Random], bytes], int]] = {
    "byte flips": (flip, 2600),
    "truncations": (truncate, 700),
    "insertions and cuts": (insert, 700),
    "lies in the zip directory": (directory, 900),
    "records swapped, compressed, renamed": (swap_records, 600),
    "bytes of the pickle": (flip_pickle, 1300),
    "numbers and functions of the pickle": (numbers_in_pickle, 1400),
}
CONTENTS = {"contents under the old digest": (False, 800), "contents under a new digest": (True, 1600)}


class Folder:
    """An exported folder, which is read back before it takes its name."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        net = Net()
        load(net, subject.path)
        to_hf_peft(net, folder, check="files")
        self.folder, self.targets = folder, find_targets(net)
        kept, _ = whole_modules(net, trained_beside(net))
        self.head = {name: dict(module.state_dict()) for name, module in kept.items()}
        self.files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        self.tensors = load_file(folder / WEIGHTS)

    def mutate(self, rng: random.Random) -> None:
        files = dict(self.files)
        name = rng.choice([CONFIG, WEIGHTS])
        data = bytearray(files[name])
        match rng.randrange(4):
            case 0:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                data = data[: rng.randrange(len(data))]
            case 2 if name == CONFIG:
                config = json.loads(data)
                container, key = rng.choice(slots(config))
                container[key] = rng.choice(
                    [None, -1, 0, 10**12, 1e300, "../..", "(a+)+$", [], {}, {"(x+x+)+y": 3}, {"a": 1}]
                )
                data = bytearray(json.dumps(config).encode())
            case 2:
                struct.pack_into("<Q", data, 0, rng.choice([0, 7, 2**20, 2**31, 2**40, 2**63]))
            case _ if name == WEIGHTS:
                length = struct.unpack_from("<Q", data)[0]
                header = data[8 : 8 + length].decode().rstrip()
                digits = list(re.finditer(r"\d+", header))
                found = rng.choice(digits)
                new = rng.choice(["0", "1", "7", "1000000000000", "18446744073709551615", "-1"])
                header = header[: found.start()] + new + header[found.end() :]
                data = bytearray(struct.pack("<Q", len(header)) + header.encode() + data[8 + length :])
            case _:
                data = bytearray(b"[" * rng.choice([10, 100_000]))
        for each, content in (files | {name: bytes(data)}).items():
            (self.folder / each).write_bytes(content)

    def attempt(self) -> str:
        try:
            difference, _ = by_reading(self.folder, self.targets, self.head)
        except RuntimeError as error:
            refuse_hidden_failure(error)
            ours = str(error).startswith("the export was checked and is not right")
            if not ours:
                raise
            return "refused"
        read = load_file(self.folder / WEIGHTS)
        assert {name: value.shape for name, value in read.items()} == {n: t.shape for n, t in self.tensors.items()}
        assert difference <= 1e-5
        return "equal"


class Sparse:
    """Files of sparse adapters, ours and in the authors' layout, which a plain model takes on and gives back."""

    def __init__(self, folder: Path) -> None:
        self.path, self.net = folder / "sparse.safetensors", Net()
        self.plain = snapshot(self.net)
        entries = SparseDelta(torch.tensor([1, 7, 30]), torch.tensor([0.5, -1.0, 2.0]), (8, 6))
        head = {"net.out.bias": torch.tensor([1.0, 2.0])}
        SparseAdapter({"net.hidden.weight": entries}, head, {"seed": 1}).save(self.path)
        with safe_open(self.path, framework="pt") as file:
            ours = {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()  # noqa: SIM118
        theirs = {
            "indices.net.hidden.weight": torch.tensor([[5, 0], [0, 1], [1, 1]], dtype=torch.int32),
            "deltas.net.hidden.weight": torch.tensor([2.0, 0.5, -1.0]),
            **head,
        }
        self.layouts = [ours, (theirs, None)]

    def mutate(self, rng: random.Random) -> None:
        tensors, metadata = rng.choice(self.layouts)
        tensors, metadata = dict(tensors), metadata and dict(metadata)
        kind = rng.randrange(6)
        if kind == 0:
            key = rng.choice(list(tensors))
            flat = tensors[key].clone()
            numbers = (
                [float("nan"), float("inf"), -float("inf"), 3e38, 0.0] if flat.is_floating_point() else [-1, 9, 2**30]
            )
            flat.view(-1)[rng.randrange(flat.numel())] = rng.choice(numbers)
            tensors[key] = flat
        elif kind == 1:
            key = rng.choice(list(tensors))
            new = odd_tensor(tensors[key], rng)
            plain = isinstance(new, Tensor) and new.layout == torch.strided and not (new.is_meta or new.is_nested)
            if plain and not new.is_quantized and new.numel() < 10**4:  # what the format can hold
                tensors[key] = new.detach().resolve_conj().contiguous()
        elif kind == 2:
            key = rng.choice(list(tensors))
            value = tensors.pop(key)
            if rng.random() < 0.5:
                tensors[rng.choice([f"{key}x", "head.", "deltas.", ".indices", "net.out.weight"])] = value
        elif kind == 3 and metadata:
            key = rng.choice(list(metadata))
            odd = ["", "{}", "[]", "NaN", "[" * 5000, '{"net.hidden.weight": [-8, -6]}', '{"net.hidden.weight": 48}']
            odd += ['{"net.hidden.weight": [1000000000000, 1000000000000]}', '{"net.out.weight": [2, 8]}', "1"]
            metadata[key] = rng.choice(odd)
        data = bytearray(save(tensors, metadata))
        if kind == 4:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 5:
            data = data[: rng.randrange(len(data))]
        self.path.unlink()  # tensors that were read of it may still be in its memory
        self.path.write_bytes(bytes(data))

    def attempt(self) -> str:
        switch = SparseSwitch(self.net)
        try:
            read = read_sparse(self.path, self.net)
        except AdapterFileError as error:
            refuse_hidden_failure(error)
            return "refused"
        tensors = [delta.delta for delta in read.values()] + list(read.head.values())
        assert all(tensor.float().isfinite().all() for tensor in tensors if tensor.dtype != torch.float64)
        switch.to(read)
        changed = {key for key, value in snapshot(self.net).items() if value != self.plain[key]}
        assert changed <= {*read, *read.head}
        assert all(p.isfinite().all() for p in self.net.parameters())
        switch.to(None)
        assert snapshot(self.net) == self.plain
        return "legal"


def chosen(subjects: list[Subject], i: int) -> Subject:
    """Mostly a file of weights alone: one of a whole run is four times as long, and much of it is not ours."""
    return subjects[(i % 2) * 2 + (i % 10 in (4, 9))]


def main(folder: Path, seed: int, scale: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    subjects = [Subject(path) for path in train(folder)]
    rng = random.Random(seed)
    target = folder / "mutated.ckpt"
    signal.signal(signal.SIGALRM, _late)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    outcomes: dict[str, Counter[str]] = {}

    def run(kind: str, subject: Subject, data: bytes, mutated: dict[str, Any] | None) -> None:
        target.write_bytes(data)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            outcomes.setdefault(kind, Counter())[subject.attempt(target, mutated)] += 1
        except BaseException:
            target.rename(folder / "fault.ckpt")
            (folder / "fault.json").write_text(json.dumps({"kind": kind, "of": str(subject.path)}))
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    for kind, (again, count) in CONTENTS.items():
        done = 0
        while done < round(count * scale):
            subject = chosen(subjects, done)
            buffer = BytesIO()
            try:
                mutated = contents(subject, rng)
                if again and not sealed(mutated):
                    continue
                torch.save(mutated, buffer)
            except (RuntimeError, TypeError, ValueError):
                continue  # torch itself cannot make it or write it
            run(kind, subject, buffer.getvalue(), mutated if again else None)
            done += 1
    for kind, (mutate, count) in BYTES.items():
        for i in range(round(count * scale)):
            subject = chosen(subjects, i)
            run(kind, subject, mutate(subject, rng), None)
    kind = "exported folders"
    export = Folder(subjects[2], folder / "export")
    for _ in range(round(600 * scale)):
        export.mutate(rng)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        try:
            outcomes.setdefault(kind, Counter())[export.attempt()] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sparse = Sparse(folder)
    for _ in range(round(900 * scale)):
        sparse.mutate(rng)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        try:
            outcomes.setdefault("sparse adapters", Counter())[sparse.attempt()] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {kind: dict(counts) for kind, counts in outcomes.items()}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))))
