"""NVIDIA cards as their driver tells of them, and what the installed torch can do with them. No torch, no context.

Asking torch takes a second and, for free memory, half a gigabyte on each card; the driver's own library (NVML) takes
neither. It counts cards in the order of the bus and knows nothing of CUDA_VISIBLE_DEVICES; `look` tells what a child
of ours will see, numbered as it will number them (`engine_environment` sets CUDA_DEVICE_ORDER).
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from glmchat.core.files import read_text
from glmchat.core.language import tr

Version = tuple[int, int]

# What PyTorch's wheels have code for, by the CUDA that they were built with (RELEASE.md of torch 2.12 to 2.14). Code
# runs on its own compute capability and on later ones of the same major number.
_ARCHITECTURES: tuple[tuple[Version, tuple[Version, ...]], ...] = (
    ((13, 0), ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0))),
    ((12, 8), ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0))),
    ((12, 0), ((5, 0), (6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0))),
)
# The oldest Linux driver of a CUDA's major number (CUDA Toolkit release notes, table 2).
_DRIVERS = {13: "580", 12: "525", 11: "450"}
# `--force-reinstall`: for pip a wheel of the same version for another CUDA is the one that is there already.
OLDER_WHEEL = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
NEWER_WHEEL = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"


@dataclass(frozen=True, slots=True)
class Card:
    """A card, or one instance of a card that is cut up (MIG). number: as in "cuda:1". total, free: bytes."""

    number: int
    name: str
    uuid: str
    capability: Version
    total: int
    free: int

    @property
    def device(self) -> str:
        return f"cuda:{self.number}"

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "name": self.name,
            "uuid": self.uuid,
            "capability": written(self.capability),
            "memory_bytes": self.total,
            "free_bytes": self.free,
        }


@dataclass(frozen=True, slots=True)
class Cards:
    """What an engine will see. driver: "550.54.15", None without one; cuda: the newest that it speaks.

    installed: cards in the machine, those that CUDA_VISIBLE_DEVICES leaves out too.
    """

    visible: tuple[Card, ...] = ()
    driver: str | None = None
    cuda: Version | None = None
    installed: int = 0

    def at(self, device: str) -> Card | None:
        """The card of "cuda" (the first) or "cuda:N"."""
        number = int(device.partition(":")[2] or 0)
        return self.visible[number] if number < len(self.visible) else None


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """version: "2.13.0+cu130". cuda: what it was built with. architectures: (8, 6) and so on, () if not known."""

    version: str
    cuda: Version | None
    architectures: tuple[Version, ...] = ()

    def runs_on(self, capability: Version) -> bool:
        return not self.architectures or any(
            major == capability[0] and minor <= capability[1] for major, minor in self.architectures
        )


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a card cannot be used, in one sentence, and what helps."""

    message: str
    hint: str

    @property
    def sentence(self) -> str:
        return f"{self.message}; {self.hint}"


def written(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def look(environ: Mapping[str, str] | None = None) -> Cards:
    """The cards that a process with this environment sees. Empty without a driver; never raises."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) or _is_nvml(error):
            return Cards()
        raise
    try:
        return _read(nvml, os.environ if environ is None else environ)
    except Exception as error:
        if not _is_nvml(error):
            raise
        return Cards()
    finally:
        nvml.nvmlShutdown()


def _is_nvml(error: Exception) -> bool:
    """pynvml makes its error classes at run time, all under NVMLError."""
    return type(error).__module__.partition(".")[0] == "pynvml"


def _read(nvml: Any, environ: Mapping[str, str]) -> Cards:
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    seen = list(_visible(nvml, handles, environ.get("CUDA_VISIBLE_DEVICES")))
    return Cards(
        tuple(_card(nvml, number, card, part) for number, (card, part) in enumerate(seen)),
        nvml.nvmlSystemGetDriverVersion(),
        _spoken(nvml),
        len(handles),
    )


def _spoken(nvml: Any) -> Version | None:
    try:
        number = nvml.nvmlSystemGetCudaDriverVersion_v2()  # 12040
    except Exception as error:  # a driver older than 410 does not say
        if not _is_nvml(error):
            raise
        return None
    return number // 1000, number % 1000 // 10


def _card(nvml: Any, number: int, card: Any, part: Any) -> Card:
    memory = nvml.nvmlDeviceGetMemoryInfo(part)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(card)
    name, uuid = nvml.nvmlDeviceGetName(part), nvml.nvmlDeviceGetUUID(part)
    return Card(number, name, uuid, (major, minor), int(memory.total), int(memory.free))


def _visible(nvml: Any, handles: list[Any], asked: str | None) -> Iterator[tuple[Any, Any]]:
    """(card, the card or its instance) in the order of CUDA_VISIBLE_DEVICES, which ends at the first bad entry.

    Of cards that are cut up CUDA sees one instance in all (NVIDIA's MIG guide): the one named, else the first.
    """
    uuids = [nvml.nvmlDeviceGetUUID(handle) for handle in handles]
    for entry in visible_entries(asked):
        if isinstance(entry, str) and entry.startswith("MIG-"):
            parts = [(handle, part) for handle in handles for part in _instances(nvml, handle) or ()]
            named = [(handle, part) for handle, part in parts if nvml.nvmlDeviceGetUUID(part) == entry]
            yield from named[:1]
            return
        if isinstance(entry, int):
            chosen = handles[entry : entry + 1]
        else:
            chosen = [handle for handle, uuid in zip(handles, uuids, strict=True) if uuid.startswith(entry)]
        if len(chosen) != 1:
            return
        if (instances := _instances(nvml, chosen[0])) is None:
            yield chosen[0], chosen[0]
        else:
            yield from ((chosen[0], part) for part in instances[:1])
            return


def _instances(nvml: Any, handle: Any) -> Any:
    """The instances of a card that is cut up; None for a whole one, which most cards cannot but be."""
    try:
        if not nvml.nvmlDeviceGetMigMode(handle)[0]:
            return None
        count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except Exception as error:
        if not _is_nvml(error):
            raise
        return None
    found = []
    for index in range(count):
        try:
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
        except Exception as error:
            if not _is_nvml(error):
                raise
    return found


_MOST = 64  # cards of one machine, as torch counts


def visible_entries(text: str | None) -> list[int] | list[str]:
    """CUDA_VISIBLE_DEVICES as CUDA reads it: numbers, or beginnings of UUIDs; what follows a bad entry is ignored, and
    one that comes twice hides all. None: everything."""
    if text is None:
        return list(range(_MOST))
    prefix = next((prefix for prefix in ("GPU-", "MIG-") if text.startswith(prefix)), None)
    names: list[str] = []
    numbers: list[int] = []
    for entry in text.split(","):
        if prefix is not None:
            if entry in names:
                return []
            if not entry.startswith(prefix):
                break
            names.append(entry)
            continue
        digits = re.match(r"[+-]?\d+", entry.strip())
        number = int(digits[0]) if digits else -1
        if number in numbers:
            return []
        if number < 0:
            break
        numbers.append(number)
    return numbers if prefix is None else names


def installed_torch() -> TorchBuild | None:
    """What the file version.py of the torch beside us says, which is read and not run; None without torch."""
    found = PathFinder.find_spec("torch")
    if found is None or found.origin is None:
        return None
    try:
        text = read_text(Path(found.origin).parent / "version.py")
    except (OSError, UnicodeDecodeError):
        return None
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda(?:: [^=]+)? = '(\d+)\.(\d+)'", text, re.MULTILINE)
    built = (int(cuda[1]), int(cuda[2])) if cuda else None
    known = next((archs for least, archs in _ARCHITECTURES if built is not None and built >= least), ())
    return TorchBuild(version[1] if version else "?", built, known)


def driver_obstacle(cards: Cards, build: TorchBuild | None) -> Obstacle | None:
    """Why no card of this machine can be used, or None. What helps comes with it."""
    if cards.driver is None:
        return Obstacle(tr("no NVIDIA driver responds"), tr("leave out --device, and the CPU computes"))
    if not cards.visible:
        if cards.installed:
            return Obstacle(tr("CUDA_VISIBLE_DEVICES hides every NVIDIA card"), tr("unset it, or name a card in it: 0"))
        return Obstacle(tr("the machine has no NVIDIA card"), tr("leave out --device, and the CPU computes"))
    wheel = NEWER_WHEEL if cards.cuda is not None and cards.cuda >= (13, 0) else OLDER_WHEEL
    if build is None or build.cuda is None:
        return Obstacle(tr("the installed torch was built without CUDA"), wheel)
    if cards.cuda is not None and cards.cuda[0] < build.cuda[0]:
        return Obstacle(
            tr(
                "the NVIDIA driver {driver} supports CUDA {spoken}, but the installed torch needs CUDA {built}",
                driver=cards.driver,
                spoken=written(cards.cuda),
                built=written(build.cuda),
            ),
            tr(
                "update the driver to {version} or later, or install another torch: {command}",
                version=_DRIVERS.get(build.cuda[0], "the latest"),
                command=wheel,
            ),
        )
    return None


def card_obstacle(card: Card, build: TorchBuild) -> Obstacle | None:
    """Why torch cannot run on this card, or None."""
    if build.runs_on(card.capability):
        return None
    least, most = min(build.architectures), max(build.architectures)
    if card.capability > most:
        hint = tr("install a newer torch: {command}", command=NEWER_WHEEL)
    elif card.capability >= _ARCHITECTURES[-1][1][0]:
        hint = tr("install another torch: {command}", command=OLDER_WHEEL)
    else:
        hint = tr("use --device cpu: no torch of today runs on it")
    return Obstacle(
        tr(
            "{name} has compute capability {capability}, but the installed torch has code for {least} to {most}",
            name=card.name,
            capability=written(card.capability),
            least=written(least),
            most=written(most),
        ),
        hint,
    )


def compiler_obstacle(environ: Mapping[str, str] | None = None) -> Obstacle | None:
    """Why Triton cannot build the small C file that launches its kernels, or None. Without it torch decodes."""
    environ = os.environ if environ is None else environ
    compilers = [environ["CC"]] if environ.get("CC") else ["clang", "gcc", "cc"]
    if not any(shutil.which(name, path=environ.get("PATH")) for name in compilers):
        return Obstacle(
            tr("there is no C compiler, which the kernels for a card need"), tr("install one, for example gcc")
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return Obstacle(
            tr("Python.h is missing, which the kernels for a card need"),
            tr("install the headers of this Python, for example python{version}-dev", version=version),
        )
    return None
