"""What users get wrong, and what each mistake must print: one row each.

A command runs in a folder that holds, besides the checkout's `conf`, `examples` and `slurm`:

    base        Hugging Face Llama of the mini shape with one layer, window 32, with the tokenizer of examples/
    wide        the same with another width
    run         a run_dir: stage 65k at mini scale, trained for one step of two sequences
    data        data folder for a window of 256, 40 sequences, made with the tokenizer of examples/
    other       the same, made with another tokenizer
    short       a data folder for a window of 64
    texts       a text file
    empty       an empty folder
    file        a file
    half        a Hugging Face folder whose safetensors file is cut
    mine        a folder for --config-dir: stage/yaml (broken), stage/keyless, stage/typo
"""

from __future__ import annotations

from dataclasses import dataclass

TRAIN = "pretrain +stage=65k +scale=mini model.num_hidden_layers=1 run_dir=new"
OF_BASE = f"{TRAIN} init_from=base data.path=data train.steps=5"
PREPARE = "prepare_data +stage=65k +scale=mini data=slimpajama data.tokenizer=examples/tokenizer"
SIMPLE = "--tokenizer examples/tokenizer --seq-length 256"


@dataclass(frozen=True)
class Mistake:
    """A command that cannot be obeyed."""

    command: str
    """Tool, and its words; the tool may be a script of slurm/."""
    says: tuple[str, ...]
    """All of it stands in what is printed; under torchrun in the last lines."""
    lines: int = 2
    """Lines printed at most, empty ones aside."""
    code: int = 2
    torchrun: int = 0
    """Ranks that it is tried with, as processes of torchrun too; 0: not."""
    without: str = ""
    """A package that is not installed."""
    port: bool = False
    """The port where ranks meet is another program's."""
    file_limit: int = 0
    """Bytes that a file may have, as on a disk that fills up; 0: any."""


MISTAKES = {
    # words
    "unknown stage": Mistake(
        "pretrain +stage=66k +scale=mini", ("There is no stage/66k in conf/", "65k, 262k"), torchrun=2
    ),
    "unknown model": Mistake(f"{TRAIN} model=llama", ("There is no model/llama", "llama3-8b", "mini")),
    "unknown cluster": Mistake(f"{TRAIN} cluster=dgx", ("There is no cluster/dgx", "h100-8")),
    "unknown scale": Mistake("pretrain +stage=65k +scale=tiny", ("There is no scale/tiny", "choose one of mini")),
    "typing error in a key": Mistake(
        f"{TRAIN} train.lrr=1e-5", ("no setting 'train.lrr'. Did you mean train.lr",), torchrun=2
    ),
    "another trainer's key": Mistake(f"{TRAIN} learning_rate=1e-5", ("Did you mean", "train.lr")),
    "text for a number": Mistake(f"{TRAIN} train.steps=ten", ("train.steps=ten: a whole number is needed here.",)),
    "no key": Mistake("pretrain 65k +scale=mini", ("'65k' sets nothing: write key=value",)),
    "flag of another tool": Mistake("pretrain --stage 65k", ("'--stage' sets nothing: write key=value",), lines=3),
    "no stage": Mistake("pretrain", ("Which stage? Add one of", "+stage=65k", "+scale=mini"), lines=16),
    "no steps": Mistake(f"{TRAIN} stage.steps=0", ("stage.steps=0: must be at least 1.",)),
    "--config-dir is nowhere": Mistake("pretrain --config-dir nowhere +stage=65k", ("there is no such folder",)),
    # files of one's own
    "broken YAML": Mistake(
        "pretrain --config-dir mine +stage=yaml +scale=mini", ("mine/stage/yaml.yaml", "line 3"), torchrun=2
    ),
    "a key is missing": Mistake(
        "pretrain --config-dir mine +stage=keyless +scale=mini",
        ("mine/stage/keyless.yaml is no stage: it does not say global_batch_size, lr",),
    ),
    "a key too many": Mistake(
        "pretrain --config-dir mine +stage=typo +scale=mini", ("mine/stage/typo.yaml", "'sequence_length'")
    ),
    # layouts
    "too few processes": Mistake("pretrain +stage=65k", ("wants 8 GPUs", "+scale=mini", "topology=auto"), lines=4),
    "a size without its ranks": Mistake(
        f"{TRAIN} topology.cp=3",
        ("take 3 ranks together", "divisible by 2*cp = 6", "topology.tp=1 topology.cp=1 topology.pp=1 topology.dp=1"),
    ),
    "ranks that do not divide": Mistake(
        f"{TRAIN} topology.cp=4",
        ("take 4 ranks together, which does not divide the 2 started", "torchrun --nproc-per-node 4"),
        lines=3,
        torchrun=2,
    ),
    "window that does not divide": Mistake(
        f"{TRAIN} stage.seq_length=65000", ("stage.seq_length=61440 and stage.seq_length=65536",)
    ),
    "window of another theta": Mistake("plan +stage=65k stage.seq_length=131072", ("stage.theta=null",)),
    "batch that does not divide": Mistake(
        f"{TRAIN} topology.dp=2 train.global_batch_size=3",
        ("dp=2 does not divide the global batch of 3", "topology.tp="),
        torchrun=2,
    ),
    "heads that do not divide": Mistake(
        "plan +stage=65k topology.tp=3", ("tp=3 does not divide 32 attention heads", "Ranks that can: ")
    ),
    # where it starts from
    "init_from is nowhere": Mistake(f"{TRAIN} init_from=nowhere", ("init_from=nowhere: there is no such folder",)),
    "init_from is empty": Mistake(f"{TRAIN} init_from=empty", ("init_from=empty", "config.json")),
    "init_from is no model": Mistake(f"{TRAIN} init_from=data", ("init_from=data", "config.json")),
    "init_from has another shape": Mistake(
        f"{TRAIN} init_from=wide", ("hidden_size 64 (configured 128)", "model.<field>=")
    ),
    "init_from of another stage": Mistake(
        f"{TRAIN.replace('65k', '524k')} init_from=base", ("has theta 10000", "checkpoint of the stage before")
    ),
    "init_from is damaged": Mistake(f"{OF_BASE} init_from=half", ("half/model.safetensors is cut short",), lines=4),
    "resumed with another seed": Mistake(
        "pretrain +stage=65k +scale=mini model.num_hidden_layers=1 train.steps=1 train.global_batch_size=2 "
        "run_dir=run seed=3",
        ("seed 1234 -> 3", "'checkpoint.allow_changed=[seed]'"),
    ),
    "resumed with another window": Mistake(
        "pretrain +stage=65k +scale=mini model.num_hidden_layers=1 train.steps=1 train.global_batch_size=2 "
        "run_dir=run stage.seq_length=131072",
        ("stage.seq_length 256 -> 512", "another run_dir"),
    ),
    # where it writes
    "run_dir is a file": Mistake(
        f"{TRAIN} run_dir=file", ("run_dir=file cannot be used", "Choose another"), torchrun=2
    ),
    "run_dir cannot be written": Mistake(f"{TRAIN} run_dir=/proc/new", ("run_dir=/proc/new cannot be used",)),
    "full disk": Mistake(
        f"{OF_BASE} data.eval_sequences=0",
        ("cannot be written: File too large",),
        lines=12,
        file_limit=2000,
    ),
    "busy port": Mistake(f"{OF_BASE} topology.dp=2", ("port", "cannot be used"), lines=4, port=True),
    # what it is asked
    "a question that there is none of": Mistake(
        f"{OF_BASE} evaluation.tasks=[needle,nedle]",
        ("evaluation.tasks=['needle', 'nedle']: choose some of needle, multi_key", "mrcr"),
    ),
    "a question beyond the window": Mistake(
        f"{OF_BASE} evaluation.lengths=[512]", ("[512] lie beyond the window of 256 tokens", "tools/evaluate.py")
    ),
    "no depth": Mistake(f"{OF_BASE} evaluation.depths=[]", ("give at least one", "evaluation.tasks=[]")),
    "evaluated on nothing": Mistake(
        f"{OF_BASE} evaluation.every_steps=2 data.eval_sequences=0", ("no effect with data.eval_sequences=0",)
    ),
    "a haystack that is nowhere": Mistake(
        f"{OF_BASE} evaluation.haystack=nowhere", ("evaluation.haystack=nowhere: there is no such file or folder.",)
    ),
    # data
    "data is nowhere": Mistake(f"{TRAIN} init_from=base data.path=nowhere", ("no data folder nowhere",)),
    "data is no data": Mistake(f"{TRAIN} init_from=base data.path=base", ("base has no manifest.json",)),
    "data of another tokenizer": Mistake(
        f"{OF_BASE} data.path=other", ("tokenizer counting", "data.allow_tokenizer=counting")
    ),
    "data of another window": Mistake(f"{TRAIN} init_from=base data.path=short", ("64", "256", "prepare_data")),
    "too little data": Mistake(
        f"{OF_BASE} train.steps=15",
        ("has 40 sequences", "20 are missing", "+stage=65k", "data.max_passes=2"),
        torchrun=2,
    ),
    # packages
    "Triton for a deterministic run": Mistake(
        f"{TRAIN} train.elementwise=triton train.deterministic=true", ("may differ from run to run", "elementwise=auto")
    ),
    "no Transformer Engine": Mistake(
        f"{OF_BASE} attention=transformer_engine", ("pip install 'megalong[gpu]'", "backend=megalong"), torchrun=2
    ),
    "no DALI": Mistake(f"{OF_BASE} data=dali", ("pip install 'megalong[dali]'", "memmap"), without="nvidia"),
    "no apex": Mistake(f"{OF_BASE} train.adam=apex", ("https://github.com/NVIDIA/apex", "train.adam=auto")),
    "no sbatch": Mistake(
        "stage.sbatch --account=lab +stage=65k +scale=mini init_from=base data.path=data run_dir=new",
        ("no sbatch on PATH", "--dry-run"),
    ),
    # data folders
    "source is nowhere": Mistake(f"prepare_data nowhere new {SIMPLE}", ("There is no source nowhere",)),
    "source is empty": Mistake(
        f"prepare_data empty new {SIMPLE}", ("empty holds nothing that is read as documents: .txt", "There: nothing")
    ),
    "target exists": Mistake(f"{PREPARE} data.source=examples/slimpajama data.out=data", ("data exists already",)),
    "target cannot be written": Mistake(
        f"{PREPARE} data.source=examples/slimpajama data.out=/proc/new", ("/proc/new cannot be made", "another folder")
    ),
    "no tokenizer there": Mistake(
        "prepare_data texts new --tokenizer empty --seq-length 64", ("no tokenizer at empty",)
    ),
    "too little text": Mistake(
        f"{PREPARE} data.source=examples/slimpajama data.out=new data.sequences=1000000",
        ("Too little data for the stage", "79,817,749 missing", "data.max_passes"),
        lines=4,
    ),
    # conversion
    "not the format": Mistake("convert hf-to-megatron run new", ("run/config.json is missing",)),
    "a checkpoint of nothing": Mistake("convert megatron-to-hf empty new", ("empty holds no whole checkpoint",)),
    "converted already": Mistake("convert megatron-to-hf run base", ("base exists already", "--overwrite")),
    "damaged source": Mistake("convert hf-to-megatron half new", ("half/model.safetensors",), lines=3),
    # plans, evaluation, search
    "plan of no stage": Mistake("plan +stage=66k", ("There is no stage/66k",)),
    "negative memory": Mistake("plan +stage=65k cluster.memory_gib=-4", ("memory_gib.value=-4.0: must be above 0",)),
    "picture cannot be written": Mistake("plan +stage=65k picture=/proc/a.png", ("picture=/proc/a.png cannot be",)),
    "no such checkpoint": Mistake("evaluate nowhere", ("nowhere: there is no such folder",)),
    "context too short": Mistake("evaluate base --tasks needle --lengths 8", ("8",), lines=3),
    "budget too small": Mistake(
        "find_theta +stage=65k +scale=mini model.num_hidden_layers=1 init_from=base data.path=data budget=1000 out=new",
        ("A budget of 1,000 tokens is too small", "at least 59,060", "Raise budget="),
        lines=4,
    ),
    "verify what cannot run": Mistake(
        "verify +stage=65k +scale=mini topology.cp=3", ("divisible by 2*cp = 6", "Ranks that can: 2 with")
    ),
}
