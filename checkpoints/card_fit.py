"""What a model takes on a card, and on the machine that it passes through; where it goes, before an engine starts."""

from __future__ import annotations

from math import prod
from pathlib import Path

from glmchat.checkpoints import fit
from glmchat.checkpoints.device_plan import CONTEXT, CardNeed, DevicePlan, plan_device
from glmchat.checkpoints.families import is_quantisable, refuse_quantising
from glmchat.checkpoints.fit import Fit, Memory
from glmchat.checkpoints.recipe import Recipe
from glmchat.core.cards import Card, Cards, TorchBuild, card_obstacle, driver_obstacle, installed_torch, look
from glmchat.core.language import tr
from glmchat.core.machine import available_memory
from glmchat.core.text import human_bytes

_LIBRARIES = 700_000_000  # bytes of the machine's memory that CUDA takes in a process which computes on a card
_TOKENS = 2048  # rows of one piece of a prompt on a card
_USUAL_TENSOR = 130_000_000  # weights of a large embedding, where the largest tensor is not known


def card_memory(
    folder: Path, quant: int | None = None, dtype: str | None = None, context: int | None = None
) -> Memory | None:
    """What loading `folder` (or a GGUF file) takes on one card; None as `fit.estimate` says it.

    16-bit activations unless float32 is asked for. A matrix that is packed is unpacked for each piece of a prompt.
    """
    stored = fit.stored_bytes(folder)
    if not stored:
        return None
    config, spec = fit.config_at(folder), fit.spec_at(folder)
    if quant is not None and not is_quantisable(config):
        return None
    longest = fit.LONGEST_CONTEXT
    length = context or min(spec.context if spec is not None else longest, longest)
    counted, width = fit.counted_spec(spec, config, stored), 4 if dtype == "float32" else 2
    weights = fit.packed_weights(folder, config, stored, width)
    packed = weights is not None or quant is not None
    if weights is None:
        weights = counted.weight_bytes(Recipe(quant) if quant is not None else None, width) or 0
    feeding = min(_TOKENS, length) * 2 * (counted.ffn_size or 4096) * width
    largest = max((prod(shape) for shape in counted.shapes().values() if len(shape) == 2), default=0)
    scratch = feeding + (largest * width if packed else 0) + (counted.vocab_size or 65_000) * 4 * 4
    return Memory(weights, counted.cache_bytes(length, width), scratch, CONTEXT)


def card_need(
    folder: Path, quant: int | None = None, dtype: str | None = None, context: int | None = None
) -> CardNeed | None:
    """The same, layer by layer, for who divides them over cards."""
    memory = card_memory(folder, quant, dtype, context)
    if memory is None:
        return None
    spec = fit.spec_at(folder)
    if spec is None or spec.layout is None:  # what transformers computes stays in one piece
        return CardNeed(0, memory.weights + memory.cache, 1, 0, memory.scratch)
    layout, shapes, layers = spec.layout(spec), spec.shapes(), max(spec.layers, 1)
    width = 4 if dtype == "float32" else 2
    first = min(width * max(prod(shapes[name]) for name in layout.ends), memory.weights // 4)
    last = first if len(layout.ends) > 1 else 0
    share = (memory.weights - first - last + memory.cache) // layers
    return CardNeed(first, share, layers, last, memory.scratch)


def host_memory(folder: Path) -> int:
    """Bytes of the machine's memory that a load onto a card takes: the program, CUDA's libraries, and the largest
    tensor on its way, in its file's type, in float32 and packed. Mapped files do not count: the system drops them."""
    spec = fit.spec_at(folder)
    largest = max((prod(shape) for shape in spec.shapes().values()), default=0) if spec is not None else 0
    return fit.RUNTIME + fit.HELPER + _LIBRARIES + 8 * (largest or _USUAL_TENSOR)


def device_plan(
    device: str,
    folder: Path,
    quant: int | None = None,
    dtype: str | None = None,
    context: int | None = None,
    *,
    model: str = "",
    cards: Cards | None = None,
    build: TorchBuild | None = None,
) -> DevicePlan:
    """Where the model of `folder` goes: see `plan_device`. cards, build: None asks the driver and torch's own file."""
    if not device.startswith(("auto", "cuda")):
        return DevicePlan((device,))

    return plan_device(
        device,
        card_need(folder, quant, dtype, context),
        look() if cards is None else cards,
        installed_torch() if build is None else build,
        model or folder.name,
        lambda free: nearest(folder, quant, dtype, context, free),
    )


def nearest(folder: Path, quant: int | None, dtype: str | None, context: int | None, free: int) -> str:
    """Words for the nearest way to load it that fits into so many bytes of a card; "" where there is none."""
    ways = [(f"--quant {bits}", bits, context) for bits in (8, 4) if quant is None or bits < quant]
    for flags, bits, length in ways if context else [*ways, ("--quant 4 --context 2048", 4, 2048)]:
        need = card_need(folder, bits, dtype, length)
        if need is not None and need.total <= free:
            return tr("try `{flags}`, needs {size}", flags=flags, size=human_bytes(need.total))
    return ""


def check(
    model: str,
    folder: Path,
    quant: int | None = None,
    dtype: str | None = None,
    context: int | None = None,
    device: str = "cpu",
    cache_type: str | None = None,
) -> DevicePlan:
    """Refuse before anything loads what could not be loaded there; the plan that the engine will make too.

    A card's memory is counted for what lies on it, the machine's for what passes through. Raises Damaged, Hostile or
    Usage for what is no model or no device, DoesNotFit with the numbers and the nearest thing that fits (exit 4).
    """
    fit.check_folder(folder)
    if quant is not None:
        refuse_quantising(fit.config_at(folder))
    plan = device_plan(device, folder, quant, dtype, context, model=model)
    fit.refuse_cache_type(cache_type, fit.config_at(folder), plan.devices[0])
    if not plan.devices[0].startswith("cuda"):
        fit.check(model, folder, quant, dtype, context, cache_type)
        return plan
    needed, free = host_memory(folder), available_memory()
    if free is not None and needed > free:
        raise fit.memory_words(model, needed, free)
    return plan


def demand(
    folder: Path,
    quant: int | None,
    dtype: str | None,
    context: int | None,
    device: str,
    cache_type: str | None = None,
) -> tuple[str, int | None, int | None]:
    """(device, bytes needed there, bytes free there) of a load: who starts several asks before the first."""
    plan = device_plan(device, folder, quant, dtype, context)
    if not plan.devices[0].startswith("cuda"):
        memory = fit.estimate(folder, quant, dtype, context, cache_type)
        return "cpu", memory.total if memory is not None else None, available_memory()
    memory, cards = card_memory(folder, quant, dtype, context), look()
    free = sum(card.free for name in plan.devices if (card := cards.at(name)) is not None)
    return plan.name, memory.total if memory is not None else None, free


def fit_table(folder: Path) -> list[Fit]:
    """Every way to load `folder`: on the most free card that torch can use, if there is one, and on the CPU."""
    card = freest_card()
    rows = [
        Fit(label, context, memory, card.free, card.device)
        for quant, label, context in (fit.ways(folder) if card is not None else ())
        if card is not None and (memory := card_memory(folder, quant, context=context)) is not None
    ]
    return [*rows, *fit.fit_table(folder)]


def freest_card() -> Card | None:
    """The card with most free memory that the installed torch can use."""
    cards, build = look(), installed_torch()
    if build is None or driver_obstacle(cards, build) is not None:
        return None
    usable = [card for card in cards.visible if card_obstacle(card, build) is None]
    return max(usable, key=lambda card: card.free, default=None)
