"""The real llama.cpp, in a process of its own: what it makes of a text, and of tokens.

The library is that of the wheel `xllamacpp`; its server is llama.cpp's, and speaks HTTP to this machine alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="there is no llama.cpp here: pip install xllamacpp (extra dev; Linux on x86-64, macOS)",
)

_SCRIPT = """
import sys
import xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_ctx = sys.argv[1], int(sys.argv[2])
p.n_batch = p.n_ubatch = 512
p.n_parallel, p.n_gpu_layers, p.warmup, p.fit_params, p.ui, p.verbosity = 1, 0, False, False, False, -1
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it would compute in f16
server = x.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    """A GGUF, loaded by llama.cpp on one thread with everything in fp32. Use as a context manager."""

    def __init__(self, model: Path, context: int) -> None:
        command = [sys.executable, "-c", _SCRIPT, str(model), str(context)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert self._process.stdout is not None
        self._address = ""
        for line in self._process.stdout:
            if line.startswith("http://"):
                self._address = line.strip()
                break
        else:
            raise AssertionError(f"llama.cpp does not load {model}: {self._process.communicate()[1][-3000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()

    def post(self, path: str, **body: Any) -> Any:
        """What the server answers."""
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self._address + path, data, kind)) as answer:
            return json.load(answer)

    def get(self, path: str) -> Any:
        """What the server answers."""
        with urllib.request.urlopen(self._address + path) as answer:
            return json.load(answer)

    def ids(self, text: str) -> list[int]:
        """The ids of a text, with what is added in front and behind, special tokens understood."""
        return self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def log_probabilities(self, tokens: list[int], vocab_size: int) -> np.ndarray:
        """Of the token behind `tokens`, fp64 [vocab_size]."""
        answer = self.post(
            "/completion",
            **{"prompt": tokens, "n_predict": 1, "n_probs": vocab_size, "temperature": 0, "samplers": []},
            # nothing is said about a chosen token that ends the text or is half a letter; probabilities are not biased
            logit_bias=[[self.ids("x")[-1], 1000.0]],
        )
        found = np.full(vocab_size, np.nan)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        assert not np.isnan(found).any()
        return found


def quantize_chunk(values: np.ndarray, kind: int, nbytes: int) -> bytes:
    """Rows of fp32 as llama.cpp's own quantizer (`ggml_quantize_chunk`) stores them.

    Args:
        kind: number of the GGML type.
    """
    import xllamacpp.xllamacpp as extension

    library = ctypes.CDLL(extension.__file__)
    function = library.ggml_quantize_chunk
    size, count = ctypes.c_size_t, ctypes.c_int64
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, count, count, count, ctypes.c_void_p]
    function.restype = size
    values = np.ascontiguousarray(values, dtype=np.float32)
    out = ctypes.create_string_buffer(nbytes)
    assert function(kind, values.ctypes.data, out, 0, *values.shape, None) == nbytes
    return out.raw
