"""Where a model runs: which card, which cards together, or the CPU, and why. Pure: cards and needs in, a plan out.

The face plans before an engine starts, with what the driver tells; the engine plans again by the same functions, with
what its torch has code for. Memory of a card is counted for what lies on it, memory of the machine for what only
passes through (`checkpoints/fit.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glmchat.core.cards import Card, Cards, Obstacle, TorchBuild, card_obstacle, driver_obstacle
from glmchat.core.errors import DoesNotFit, Usage
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line

CONTEXT = 500_000_000  # bytes that CUDA's context and the code of torch's kernels take on a card


@dataclass(frozen=True, slots=True)
class CardNeed:
    """Bytes of a model on cards. first: the embedding; layer: weights and cache of one; last: head and norm.

    scratch: of each card, while it computes.
    """

    first: int
    layer: int
    layers: int
    last: int
    scratch: int

    @property
    def total(self) -> int:
        """On one card."""
        return self.first + self.layer * self.layers + self.last + self.scratch + CONTEXT


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Devices in the order in which a token passes them, and how many layers each computes.

    The first holds the embedding, the last the norm and the head. layers: () where there is one device, or where
    nobody counted them yet. reason: why these, for people.
    """

    devices: tuple[str, ...]
    layers: tuple[int, ...] = ()
    reason: str = ""

    @property
    def name(self) -> str:
        """As `--device` names it: "cpu", "cuda:1", "cuda:0,cuda:1"."""
        return ",".join(self.devices)

    def of_layer(self, number: int) -> str:
        """The device of a layer."""
        end = 0
        for device, count in zip(self.devices, self.layers, strict=False):
            end += count
            if number < end:
                return device
        return self.devices[-1]


ON_CPU = DevicePlan(("cpu",))


def plan_device(
    asked: str,
    need: CardNeed | None,
    cards: Cards,
    build: TorchBuild | None,
    model: str = "",
    smaller: Callable[[int], str] = lambda free: "",
) -> DevicePlan:
    """asked: "auto", "cpu", "mps", "cuda", "cuda:1" or "cuda:0,cuda:1". need: None where the files say too little.

    "auto" takes the most free card that fits, else several together, else the CPU; "cuda" does the same and never the
    CPU. Raises Usage for a card that is not there or cannot be used, and DoesNotFit with numbers for one that is full.
    smaller: free bytes -> words for what would fit into them, or "".
    """
    if not asked.startswith(("auto", "cuda")):
        return DevicePlan((asked,))
    obstacle = driver_obstacle(cards, build)
    if obstacle is not None or build is None:
        return _instead(asked, obstacle)
    names = asked.split(",")
    if any(":" in name for name in names):
        chosen = [_named(name, cards, build) for name in names]
    else:
        chosen = [card for card in cards.visible if card_obstacle(card, build) is None]
        if not chosen:
            return _instead(asked, card_obstacle(cards.visible[0], build))
    several = len(names) > 1 or ":" not in asked
    plan = _fitting(chosen, need, several, together=len(names) > 1)
    if plan is not None:
        return plan
    assert need is not None
    room = max(card.free for card in chosen)
    return _instead(asked, _full(chosen, need, model), full=True, smaller="" if asked == "auto" else smaller(room))


def _instead(asked: str, obstacle: Obstacle | None, *, full: bool = False, smaller: str = "") -> DevicePlan:
    assert obstacle is not None
    if asked == "auto":
        return DevicePlan(("cpu",), reason=obstacle.message)
    if full:
        raise DoesNotFit(obstacle.message, hint=smaller or obstacle.hint, code="memory.preflight")
    raise _unusable(asked, obstacle)


def _named(name: str, cards: Cards, build: TorchBuild) -> Card:
    card = cards.at(name)
    if card is None:
        raise Usage(
            tr("there is no device {device}", device=name),
            hint=tr("there are: {devices}", devices=", ".join(card.device for card in cards.visible)),
            code="device.missing",
        )
    if (obstacle := card_obstacle(card, build)) is not None:
        raise _unusable(name, obstacle)
    return card


def _unusable(device: str, obstacle: Obstacle) -> Usage:
    return Usage(
        tr("--device {device} cannot be used: {reason}", device=device, reason=obstacle.message),
        hint=obstacle.hint,
        code="device.missing",
    )


def _fitting(cards: Sequence[Card], need: CardNeed | None, several: bool, *, together: bool) -> DevicePlan | None:
    """One card if one is enough and not several were asked for, else several; None where the model does not fit."""
    freest = max(cards, key=lambda card: card.free)
    if need is None or (not together and need.total <= freest.free):
        return DevicePlan((freest.device,), reason=card_words(freest))
    return _together(cards, need) if several and len(cards) > 1 else None


def _together(cards: Sequence[Card], need: CardNeed) -> DevicePlan | None:
    counts = split_layers(need, [card.free for card in cards])
    if counts is None:
        return None
    shares = [(card, count) for card, count in zip(cards, counts, strict=True) if count]
    words = ", ".join(f"{card.device} {count}" for card, count in shares)
    return DevicePlan(
        tuple(card.device for card, _ in shares),
        tuple(count for _, count in shares),
        tr("layers by free memory: {shares}", shares=words) if len(shares) > 1 else card_words(shares[0][0]),
    )


def evenly(devices: Sequence[str], layers: int) -> DevicePlan:
    """Each device takes as many layers as the others, where nobody says what is free."""
    share, rest = divmod(layers, len(devices))
    return DevicePlan(tuple(devices), tuple(share + (index < rest) for index in range(len(devices))))


def split_layers(need: CardNeed, free: Sequence[int]) -> tuple[int, ...] | None:
    """How many layers each card takes, in proportion to what it has free; None where they do not fit together.

    A card that is too full takes none, and its neighbour then holds the embedding or the head.
    """
    holders = [index for index, size in enumerate(free) if size > need.scratch + CONTEXT + need.layer]
    while holders:
        room = []
        for index in holders:
            ends = (need.first if index == holders[0] else 0) + (need.last if index == holders[-1] else 0)
            room.append(max(0, (free[index] - need.scratch - CONTEXT - ends) // max(need.layer, 1)))
        if sum(room) < need.layers:
            return None
        exact = [need.layers * size / sum(room) for size in room]
        counts = [int(share) for share in exact]
        for place in sorted(range(len(room)), key=lambda place: counts[place] - exact[place])[
            : need.layers - sum(counts)
        ]:
            counts[place] += 1
        if 0 not in counts:
            found = dict(zip(holders, counts, strict=True))
            return tuple(found.get(index, 0) for index in range(len(free)))
        holders = [index for index, count in zip(holders, counts, strict=True) if count]
    return None


def _full(cards: Sequence[Card], need: CardNeed, model: str) -> Obstacle:
    freest = max(cards, key=lambda card: card.free)
    return Obstacle(
        tr(
            "{model} needs {needed} on a card, but {device} ({name}) has only {free} free",
            model=one_line(model, 60) or tr("the model"),
            needed=human_bytes(need.total),
            device=freest.device,
            name=freest.name,
            free=human_bytes(freest.free),
        ),
        tr("end what else runs on it (nvidia-smi shows it), or use --device cpu"),
    )


def card_words(card: Card) -> str:
    """ "RTX 3090, 22.1 GB free"."""
    return tr("{name}, {free} free", name=card.name, free=human_bytes(card.free))
