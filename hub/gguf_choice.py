"""One GGUF file out of a repository that holds twenty: by its label (`Q6_K`), by its name, or the one taken by default.

A model that came in parts is one choice with several files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

_KIND = r"(?:iq\d\w*|q\d\w*|tq\d\w*|mxfp4\w*|bf16|f16|fp16|f32)"
LABEL = re.compile(rf"(?i)(?:ud-)?{_KIND}")  # as files are called
_IN_NAME = re.compile(rf"(?i)(?<![a-z0-9])(?:ud-)?{_KIND}(?=[-.])")
_PART = re.compile(r"-\d{5,}-of-\d{5,}(?=\.gguf$)")
# What the engine keeps quantised comes first.
_ORDER = ("q4_0", "q4_1", "q8_0", "q4_k_m", "q5_k_m", "q4_k_s", "q6_k", "f16", "bf16", "f32")


def choices(names: Iterable[str]) -> Mapping[str, list[str]]:
    """The models among GGUF files, name without its part -> its files; what sees for vision models is none."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith(".gguf") and "mmproj" not in name.lower():
            found.setdefault(_PART.sub("", name), []).append(name)
    return found


def label_of(name: str) -> str:
    """ "x.Q6_K.gguf" -> "Q6_K"; a file that bears no label is called by its name."""
    found: list[str] = _IN_NAME.findall(name.rpartition("/")[2])
    return found[-1].upper() if found else name


def default_choice(names: Sequence[str]) -> list[str]:
    """The files of the model that is taken where nobody says which; projectors where there is nothing else."""
    found = choices(names)

    def rank(name: str) -> tuple[int, str]:
        lower = name.lower()
        return next((i for i, word in enumerate(_ORDER) if word in lower), len(_ORDER)), name

    return found[min(found, key=rank)] if found else [name for name in names if name.endswith(".gguf")]


def matching(names: Iterable[str], wanted: str) -> list[list[str]]:
    """The models that `wanted` names: one label, whatever its case, or the name of a file. Of two with one label, the
    one that bears it alone ("Q4_K_M" before "UD-Q4_K_M")."""
    found = choices(names)
    word = wanted.upper()
    named = [files for name, files in found.items() if wanted in (name, *files)]
    return named or [files for name, files in found.items() if label_of(name) == word]


def chosen(names: Sequence[str], wanted: str) -> list[str]:
    """The files that `wanted` names among those of a repository. Raises Usage with what there is."""
    found = matching(names, wanted)
    if len(found) == 1:
        return found[0]
    if found:
        raise Usage(
            tr("several files of this repository are {label}", label=one_line(wanted, 60)),
            hint=tr("name one as OWNER/REPO/FILE: {names}", names=", ".join(one_line(f[0], 120) for f in found[:6])),
            code="pull.several",
        )
    here = ", ".join(one_line(label_of(name), 80) for name in choices(names))
    raise Usage(
        tr("this repository has no GGUF file {name}", name=one_line(wanted, 120)),
        hint=tr("it has {names}", names=here) if here else tr("it has no GGUF files"),
        code="pull.no_gguf",
    )


def others_note(repo: str, names: Sequence[str], taken: str) -> str | None:
    """Which of several is taken and how another one is named; None where there is only one."""
    found = choices(names)
    if len(found) < 2:
        return None
    own = _PART.sub("", taken)
    labels = {name: label_of(name) for name in found if name != own}
    others = [f"{repo}/{name}" if name == label else f"{repo}:{label}" for name, label in labels.items()]
    return tr("{name} is taken; there are also {others}", name=one_line(taken), others=one_line(", ".join(others), 600))
