"""Optional packages are found without being imported, take the work where they can, and are named when missing."""

import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import optimizer
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from megalong.model.norm import RMSNorm, norm_class
from megalong.recipe.parts import check_packages, parts
from megalong.recipe.resolve import run_of
from megalong.runtime import fused, packages
from megalong.runtime.errors import ConfigError
from megalong.runtime.ranks import RankPool
from megalong.topology.groups import initialize
from megalong.topology.layout import Layout
from megalong.training.adam import choose_adam
from megalong.training.verify import relative_distance

REPO = Path(__file__).parents[2]
MINI = ("+stage=65k", "+scale=mini")
L40S = (8, 9)
APEX = REPO / "tests" / "fakes" / "apex"
"""With the signatures of apex's own sources."""


@pytest.fixture
def apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files where apex's would lie."""
    for name, text in {
        "apex/__init__.py": "raise AssertionError('looked for, not imported')",
        "apex/optimizers.py": "",
        "apex/normalization.py": "",
        "amp_C.py": "",
        "fused_layer_norm_cuda.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_without_apex_torch_does_the_work_and_the_run_says_so() -> None:
    config = run_of(MINI, 1).config
    missing, not_there = "triton not installed", "triton needs a GPU"
    for gpu, kernel, why in (((9, 0), "cudnn", missing), (L40S, "cuda_flash", missing), (None, "cpu_flash", not_there)):
        assert parts(config, gpu).startswith(
            "optimizer: torch AdamW (apex not installed); norm: torch RMSNorm (apex not installed); "
            f"attention kernel: {kernel}; elementwise: torch operators ({why}"
        )
        assert parts(config, gpu).endswith("; data: memmap")


def test_chains_of_operators_are_compiled_on_a_gpu_with_triton_and_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "triton.py").write_text("raise AssertionError('looked for, not imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    there = ["gcc"]
    monkeypatch.setattr(packages.shutil, "which", lambda name: name if name in there else None)

    def said(gpu: tuple[int, int] | None, *words: str) -> str:
        return re.search("elementwise: (.*);", parts(run_of([*MINI, *words], 1).config, gpu)).group(1)

    assert said(L40S) == said(L40S, "train.elementwise=triton") == "Triton kernels by torch.compile"
    assert said(None) == "torch operators (triton needs a GPU)"
    assert said(L40S, "train.elementwise=torch") == "torch operators"
    assert said(L40S, "train.deterministic=true") == "torch operators (train.deterministic)"
    there.clear()
    assert said(L40S) == "torch operators (triton needs gcc or clang)"
    assert fused.choose("auto", False) is torch.cuda.is_available()


def test_the_kernel_that_was_measured_or_that_deterministic_leaves_is_named() -> None:
    config = run_of(MINI, 1).config
    measured = replace(config, cluster=replace(config.cluster, attention_kernel="cuda_flash"))
    deterministic = replace(config, train=replace(config.train, deterministic=True))
    for one in (measured, deterministic):
        assert "attention kernel: cuda_flash;" in parts(one, (9, 0))


def test_where_apex_is_installed_a_gpu_uses_it_and_a_cpu_does_not(apex: Path) -> None:
    config = run_of([*MINI, "data.loader=dali", "attention.kernel=cudnn"], 1).config
    assert parts(config, L40S) == (
        "optimizer: apex FusedAdam; norm: apex FusedRMSNorm; attention kernel: cudnn; "
        "elementwise: torch operators (triton not installed); data: dali"
    )
    assert parts(config, None).startswith("optimizer: torch AdamW (apex needs a GPU); norm: torch RMSNorm (apex needs")
    torchs = run_of([*MINI, "train.adam=torch", "train.norm=torch"], 1).config
    assert parts(torchs, L40S).startswith("optimizer: torch AdamW; norm: torch RMSNorm;")
    assert "apex" not in sys.modules


def test_apex_without_its_extensions_does_not_count(apex: Path) -> None:
    (apex / "amp_C.py").unlink()
    assert packages.adam("auto", True) == "torch"
    assert packages.norm("auto", True) == "apex"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("train.adam=apex", "train.adam=apex needs apex, which is not installed: build it from https://github.com/NVI"),
        ("train.elementwise=triton", "needs Triton, which is not installed: it comes with .* or use train.elem"),
        ("train.norm=apex", "train.norm=apex needs apex, .* or use train.norm=auto"),
        ("train.adam=transformer_engine", r"pip install 'megalong\[gpu\]' .* or use train.adam=auto"),
        ("attention=transformer_engine", "or use attention.backend=megalong"),
    ],
)
def test_what_is_chosen_and_missing_is_named_with_what_installs_it(words: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_packages(run_of([*MINI, words], 1).config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_fused_part_without_a_gpu_is_refused(apex: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.adam=apex train\.norm=apex needs a GPU.*use train\.adam=auto train"):
        check_packages(run_of([*MINI, "train.adam=apex", "train.norm=apex"], 1).config)


def adams_on_rank(folder: str) -> list[tuple[str, bool, bool]]:
    """For apex, and for torch after it: the class that megatron-core builds, and where it looks for the step count."""
    config = OptimizerConfig(optimizer="adam", lr=1e-3, adam_beta1=0.9, adam_beta2=0.95)
    found, adams = [], (optimizer.Adam, distrib_optimizer.Adam)
    initialize(Layout())
    sys.path.insert(0, folder)
    try:
        for wanted in ("apex", "torch"):
            assert choose_adam(wanted) == wanted
            group = [{"params": [torch.nn.Parameter(torch.ones(2))], "is_expert_parallel": False}]
            made = optimizer._get_megatron_optimizer_based_on_param_groups(config, [], group)
            uses = (distrib_optimizer.HAVE_APEX_OR_TE, distrib_optimizer.USING_APEX_OPTIMIZER)
            found.append((type(made.optimizer).__name__, *uses))
    finally:
        choose_adam("torch")
        optimizer.Adam, distrib_optimizer.Adam = adams
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
            del sys.modules[name]
    return found


def norms_on_rank(folder: str) -> list[tuple[float, bool]]:
    """Distance of apex's norm from ours, forward and backward, and whether megatron will sum its gradient over tp."""
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1, sequence_parallel=False)
    found: list[tuple[float, bool]] = []
    sys.path.insert(0, folder)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            config.params_dtype, config.sequence_parallel = dtype, dtype == torch.bfloat16
            ours, fused = (cls(config=config, hidden_size=16, eps=1e-5) for cls in (RMSNorm, norm_class("apex")))
            x = torch.randn(7, 1, 16, dtype=dtype)
            made = []
            for norm in (ours, fused):
                with torch.no_grad():
                    norm.weight.copy_(torch.linspace(0.5, 2, 16))
                given = x.clone().requires_grad_()
                out = norm(given)
                made.append((out, *torch.autograd.grad(out.square().sum(), (given, norm.weight))))
            worst = max(relative_distance(b.float(), a.float()) for a, b in zip(*made, strict=True))
            found.append((worst, fused.weight.sequence_parallel))
            assert fused.weight.dtype == dtype
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
            del sys.modules[name]
    return found


def test_apexs_norm_is_ours(ranks: RankPool) -> None:
    (exact, whole), (rounded, summed) = ranks.run(norms_on_rank, 1, str(APEX))[0]
    assert (exact, whole, summed) == (0.0, False, True)
    assert rounded == 0.0


def test_megatron_builds_the_adam_that_was_chosen(ranks: RankPool) -> None:
    assert ranks.run(adams_on_rank, 1, str(APEX))[0] == [("FusedAdam", True, True), ("AdamW", False, False)]


def test_every_extra_that_a_text_names_can_be_installed() -> None:
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [REPO / "README.md", *REPO.glob("docs/*.md"), *REPO.glob("megalong/**/*.py")]
    named = {name for path in texts for name in re.findall(r"(?:megalong|\.)\[(\w+)\]'?[^\w(]", path.read_text())}
    assert {"gpu", "dali"} <= named <= set(extras)
