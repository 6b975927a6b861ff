"""Whatever Meta's files hold, they read as they were written, or end in one message that names the file or field."""

from __future__ import annotations

import functools
import io
import json
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from megalong.convert.meta_dir import MetaDirectory
from megalong.convert.table import hf_shapes
from megalong.convert.to_hf import meta_to_hf
from megalong.runtime.errors import CheckpointError, UserError
from megalong.runtime.json_file import shown
from tests.convert.test_from_meta import PARAMS, THETA, meta_tensors, write
from tests.hostile import RAW, as_bytes, damaged, mutated, read_or_refused

DOCUMENT = {**PARAMS, "rope_theta": THETA, "head_dim": 8, "use_scaled_rope": False, "vocab_size": 40}
NORM = "layers.1.ffn_norm.weight"


def read(folder: Path, rope_factor: float | None = 8.0) -> dict[str, torch.Tensor]:
    meta = MetaDirectory(folder, rope_factor=rope_factor)
    found = {name: meta.rows(name, 0, shape[0]).clone() for name, shape in hf_shapes(meta.model).items()}
    meta.finish()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("meta") / "whole", meta_tensors(), 2)


@functools.cache
def small() -> tuple[bytes, dict[str, torch.Tensor]]:
    """One file of a very small model, and its tensors."""
    tensors = {name: t[:2, :2] if t.dim() == 2 else t[:2] for name, t in meta_tensors().items()}
    tensors = {name: t.clone().bfloat16() for name, t in tensors.items() if not name.startswith("layers.1")}
    stream = io.BytesIO()
    torch.save(tensors, stream)
    return stream.getvalue(), tensors


SMALL = {"dim": 2, "n_heads": 1, "n_layers": 1, "norm_eps": 1e-5, "rope_theta": THETA}


def test_a_header_that_points_at_the_bytes_of_another_tensor_is_found(tmp_path):
    """With a name 256 bytes longer the first tensor begins where the third does, and that one's bytes are right."""
    content = bytearray(small()[0])
    header = zipfile.ZipFile(io.BytesIO(content)).getinfo("archive/data/0").header_offset
    content[header + 27] += 1
    (tmp_path / "params.json").write_text(json.dumps(SMALL))
    (tmp_path / "consolidated.00.pth").write_bytes(content)
    _, refused = read_or_refused(lambda: read(tmp_path))
    assert "was changed after it was written" in refused


@settings(max_examples=300, deadline=None)
@given(content=damaged(small()[0]))
def test_any_change_of_a_file_is_found_or_harmless(tmp_path_factory, content):
    folder = Path(tmp_path_factory.getbasetemp()) / "damaged_meta"
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(SMALL))
    (folder / "consolidated.00.pth").write_bytes(content)
    found, refused = read_or_refused(lambda: read(folder))
    if refused:
        assert "consolidated" in refused or str(folder) in refused
        return
    (folder / "consolidated.00.pth").write_bytes(small()[0])
    assert all(torch.equal(tensor, found[name]) for name, tensor in read(folder).items())


@settings(max_examples=100, deadline=None)
@given(document=mutated(DOCUMENT))
def test_any_params_give_a_llama_or_one_message(tmp_path_factory, document):
    folder = Path(tmp_path_factory.getbasetemp()) / "meta_params"
    if not folder.is_dir():
        write(folder, meta_tensors(), 1)
    (folder / "params.json").write_bytes(as_bytes(document))
    found, refused = read_or_refused(lambda: read(folder))
    assert refused or all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.0.attention.wq.weight", "norm.weight", "rope.freqs"])
def test_a_flipped_byte_of_any_tensor_ends_the_conversion(tmp_path, whole, name):
    shutil.copytree(whole, tmp_path / "meta")
    file = tmp_path / "meta" / "consolidated.01.pth"
    tensor = torch.load(file, weights_only=True)[name]
    content, raw = file.read_bytes(), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert content.count(raw) == 1 or name == "rope.freqs"
    at = content.index(raw) + len(raw) // 2
    file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: tensor .* was changed .*CRC-32"):
        meta_to_hf(tmp_path / "meta", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def sparse() -> torch.Tensor:
    return torch.ones(4, 4).to_sparse()


def quantized() -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):
        return torch.quantize_per_tensor(torch.ones(32), 0.1, 0, torch.qint8)


STRANGE: dict[str, tuple[Any, str]] = {
    "0-d": (torch.tensor(1.0), r"consolidated\.00\.pth: tensor layers\.1.* shape \[\]"),
    "3-d": (torch.ones(2, 4, 4), r"tensor layers\.1.* shape \[2, 4, 4\]"),
    "int8": (torch.ones(32, dtype=torch.int8), r"tensor layers\.1.* has dtype int8"),
    "float64": (torch.ones(32, dtype=torch.float64), r"tensor layers\.1.* has dtype float64"),
    "complex": (torch.ones(32, dtype=torch.complex64), r"tensor layers\.1.* has dtype complex64"),
    "float8": (torch.ones(32).to(torch.float8_e4m3fn), r"consolidated\.00\.pth cannot be read as plain tensors"),
    "sparse": (sparse(), r"_rebuild_sparse_tensor is not part"),
    "meta": (torch.ones(32, device="meta"), r"_rebuild_meta_tensor_no_storage is not part"),
    "quantized": (quantized(), r"_rebuild_qtensor is not part"),
    "other shape": (torch.ones(33), r"has shape \[33\]"),
    "empty": (torch.ones(0), r"has shape \[0\]"),
    "number": (3.0, "is a float, not a tensor"),
    "list": ([torch.ones(32)], "is a list, not a tensor"),
}


@pytest.mark.parametrize("strange", STRANGE)
def test_a_tensor_that_no_llama_has_is_refused(tmp_path, strange):
    value, said = STRANGE[strange]
    source = write(tmp_path / "meta", {}, 1)
    torch.save({**meta_tensors(), NORM: value}, source / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=said):
        meta_to_hf(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_views_parameters_and_shared_storages_read_as_torch_reads_them(tmp_path):
    tensors, source = meta_tensors(), write(tmp_path / "meta", {}, 1)
    expected = read(write(tmp_path / "plain", tensors, 1))
    both = torch.stack([tensors["layers.0.ffn_norm.weight"], tensors[NORM]], dim=1)
    tensors |= {"layers.0.ffn_norm.weight": both[:, 0], NORM: both[:, 1]}
    tensors["output.weight"] = torch.nn.Parameter(tensors["output.weight"])
    tensors["layers.0.attention.wq.weight"] = tensors["layers.0.attention.wq.weight"].t().contiguous().t()
    torch.save(tensors, source / "consolidated.00.pth")
    found = read(source)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    source = write(tmp_path / "meta", {}, 1)
    file = source / "consolidated.00.pth"
    torch.save({**meta_tensors(), NORM: torch.ones(64)[::2]}, file)
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:  # with right checksums
        for name, data in content.items():
            stride = b"K\x02\x85q"  # (2,)
            head, found, tail = data.rpartition(stride) if name.endswith("data.pkl") else (b"", b"", data)
            archive.writestr(name, head + found.replace(b"\x02", b"\x09") + tail)
    with pytest.raises(CheckpointError, match=rf"tensor {NORM} is damaged: .*stride \[9\].* does not fit"):
        meta_to_hf(source, tmp_path / "hf")


BAD_PARAMS: dict[str, list[Any]] = {
    "n_heads": ["4", 0, -4, 3, 4.0, True, None, [4], {}, 10**400, RAW[0], RAW[3]],
    "dim": ["32", 0, -32, 33, 2**40, RAW[1]],
    "n_layers": ["2", 0, -1, 3_000_000, 2.0, False],
    "n_kv_heads": ["2", 0, -2, 3, True, {}],
    "head_dim": ["8", 0, 7, 8.0],
    "norm_eps": ["1e-5", -1.0, None, RAW[0], RAW[2], True, 10**400],
    "rope_theta": ["500000", True, None, 0.5, -1.0, RAW[0], RAW[1], [5e5]],
    "use_scaled_rope": ["false", 1, {"a": 1}],
    "more": [RAW[4], RAW[5]],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in BAD_PARAMS.items() for value in values], ids=shown
)
def test_a_wrong_value_in_params_is_refused(tmp_path, whole, key, value):
    for file in whole.glob("*.pth"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "params.json").write_bytes(as_bytes({**DOCUMENT, key: value}))
    with pytest.raises(UserError, match=r"params\.json|asks for"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"[1]", b"3", b"\xff", b"", b'{"dim": 32, "dim": 64}'])
def test_params_that_are_no_json_object_are_refused(tmp_path, whole, content):
    (tmp_path / "params.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"params\.json is damaged"):
        read(tmp_path)
