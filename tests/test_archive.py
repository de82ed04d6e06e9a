"""A file is checked before torch reads it: each of these once took memory, or was read, that should not have been."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import AdapterFileError
from lightning_peft.archive import check_archive


def saved(value: Any) -> dict[str, bytes]:
    buffer = BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        found = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return {name: data for name, data in found.items() if name not in ("version", ".data/serialization_id")}


def write(path: Path, records: dict[str, bytes]) -> None:
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in records.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()


def refused(path: Path) -> str:
    with pytest.raises(
        AdapterFileError, match="cannot be read: it is cut short, damaged, or holds more than"
    ) as caught:
        check_archive(path)
    return str(caught.value)


def test_what_torch_saves_is_read(tmp_path: Path) -> None:
    tensor = torch.ones(3)
    tensor.note = "text"  # type: ignore[attr-defined]
    kinds = [torch.float64, torch.bfloat16, torch.uint16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int8]
    whole = {
        "empty": torch.zeros(0), "expanded": torch.ones(3).expand(4, 3), "part": torch.arange(9)[3:], "noted": tensor,
        "scalar": torch.tensor(1.0), "conjugated": torch.ones(2, dtype=torch.complex64).conj(), "bytes": b"\xff\x01",
        "parameter": torch.nn.Parameter(torch.ones(2)), "storage": torch.ones(3).untyped_storage(), "set": {1, 2},
        "complex": 1 + 2j, "dtype": torch.float32, "device": torch.device("cpu"), "size": torch.Size([1]),
        "big": 10**30,
        "kinds": [torch.ones(3).to(kind) for kind in kinds],
    }  # fmt: skip
    torch.save(whole, tmp_path / "whole.ckpt")
    check_archive(tmp_path / "whole.ckpt")
    assert torch.load(tmp_path / "whole.ckpt", weights_only=True).keys() == whole.keys()


@pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:The PyTorch API of nested tensors", "ignore:Sparse")
@pytest.mark.parametrize(("make", "kind"), [
    (lambda: torch.eye(2).to_sparse(), "sparse tensors"),
    (lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8), "quantized tensors"),
    (lambda: torch.empty(3, device="meta"), "meta tensors"),
    (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested tensors"),
    (lambda: bytearray(3), "bytearray"),
    (lambda: Path.touch, "getattr"),
])  # fmt: skip
def test_other_than_plain_tensors_is_refused(tmp_path: Path, make: Callable[[], Any], kind: str) -> None:
    torch.save({"a": make()}, tmp_path / "odd.ckpt")
    assert kind in refused(tmp_path / "odd.ckpt")


def test_a_file_of_the_older_format_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert "not a zip file" in refused(tmp_path / "old.ckpt")


def test_a_compressed_record_is_refused(tmp_path: Path) -> None:
    # 200 kB can become 200 MB.
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.ckpt")
    data = bytearray((tmp_path / "plain.ckpt").read_bytes())
    entry = data.rfind(b"plain/data/0") - 46
    struct.pack_into("<H", data, entry + 10, zipfile.ZIP_DEFLATED)
    (tmp_path / "packed.ckpt").write_bytes(data)
    assert "a compressed record" in refused(tmp_path / "packed.ckpt")


def test_records_longer_than_the_file_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "plain.ckpt")
    data = bytearray((tmp_path / "plain.ckpt").read_bytes())
    entry = data.rfind(b"plain/data/0") - 46
    struct.pack_into("<II", data, entry + 20, 2**31, 2**31)
    (tmp_path / "long.ckpt").write_bytes(data)
    assert "longer than the file" in refused(tmp_path / "long.ckpt")


@pytest.mark.parametrize("extra", [b"x", b"PK\x05\x06" + bytes(18)])
def test_a_second_directory_is_refused(tmp_path: Path, extra: bytes) -> None:
    # Two readers could find two directories: the check one, torch the other.
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes() + extra)
    assert "zip" in refused(tmp_path / "a.ckpt")


def test_a_directory_elsewhere_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.ckpt")
    data = bytearray((tmp_path / "a.ckpt").read_bytes())
    struct.pack_into("<Q", data, len(data) - 42 + 8, 100)  # where the locator says that the directory's end is
    (tmp_path / "a.ckpt").write_bytes(data)
    assert "not the end of a zip archive" in refused(tmp_path / "a.ckpt")


def test_a_storage_longer_than_its_record_is_refused(tmp_path: Path) -> None:
    records = saved(torch.zeros(1000))
    write(tmp_path / "short.ckpt", records | {"data/0": bytes(4)})
    assert "a storage of 1000 elements that is not in the file" in refused(tmp_path / "short.ckpt")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    # torch would make the storage longer.
    records = saved(torch.zeros(10, 20))
    data = records["data.pkl"].replace(b"K\nK\x14\x86", b"J\x00\x00\x00\x01K\x14\x86")
    assert data != records["data.pkl"]
    write(tmp_path / "large.ckpt", records | {"data.pkl": data})
    assert "a tensor that is larger than its storage" in refused(tmp_path / "large.ckpt")


@pytest.mark.parametrize(("pickled", "reason"), [
    (b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x7f\x85R.", "bytearray"),
    (b"\x80\x02ctorch\nTensor\nJ\x00\x00\x00\x7f\x85R.", "a call of a tensor's class"),
    (b"\x80\x02ctorch\nFloatTensor\nJ\x00\x00\x00\x7f\x85R.", "torch.FloatTensor"),
    (b"\x80\x02ctorch.storage\nUntypedStorage\nJ\x00\x00\x00\x7f\x85R.", "a call of a storage's class"),
    (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\nTensor\nctorch\nTensor\nJ\x00\x00\x00\x7f\x85}tR.",
     "a tensor with a constructor of its own"),
    (b"\x80\x02Nr\x00\x00\x00\x7f.", "a memo with gaps"),
    (b"\x80\x04\x95\x01\x00\x00\x00\x00\x00\x00\x00N.", "the operation FRAME"),
    (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", "os.system"),
    (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00bz2\x86R.", "bytes in a text encoding"),
])  # fmt: skip
def test_what_would_allocate_or_run_is_refused(tmp_path: Path, pickled: bytes, reason: str) -> None:
    write(tmp_path / "evil.ckpt", saved(1) | {"data.pkl": pickled})
    assert reason in refused(tmp_path / "evil.ckpt")


def test_names_that_differ_in_case_alone_are_refused(tmp_path: Path) -> None:
    # torch looks records up without regard to case, so one record could be read many times over.
    write(tmp_path / "case.ckpt", saved(torch.ones(3)) | {"DATA/0": bytes(12)})
    assert "two records of one name" in refused(tmp_path / "case.ckpt")


def test_a_class_that_the_user_allowed_is_left_to_torch(tmp_path: Path) -> None:
    torch.save({"a": Settings()}, tmp_path / "mine.ckpt")
    assert "Settings" in refused(tmp_path / "mine.ckpt")
    with torch.serialization.safe_globals([Settings]):
        check_archive(tmp_path / "mine.ckpt")


class Settings:
    pass
