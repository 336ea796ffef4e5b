"""What a reading of data is told: by the words of a recipe.json, without a look into the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.tuning.recipes import RECIPES, Recipe, recipe_of
from glmchat.tuning.rendering import On, OverLength
from glmchat.tuning.settings import Settings

LENGTH = 2048  # tokens of a document, where nobody says another number and the model takes as many
_TOLD = ("on", "like", "over_length", "max_length", "format", "columns", "evaluation", "system", "seed", "stride")
_NAMES = {"evaluation": "eval"}  # where a recipe.json has another name for it


@dataclass(frozen=True, slots=True)
class DataOptions:
    """on, over_length None: by the data. max_length None: the recipe's, or 2,048. columns: part -> key.

    system: for rows that bring no system text. evaluation: a file, or a share of the rows as "5%". seed: of what is
    held out and mixed in. pairs: rows hold a better and a worse answer each, and both are wanted. stride: tokens from
    one window of a long text to the next; None: as many as it has. prefix: positions that learn before each document.
    """

    on: On | None = None
    like: str | None = None
    over_length: OverLength | None = None
    max_length: int | None = None
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    mixes: tuple[str, ...] = ()
    evaluation: str | None = None
    system: str | None = None
    seed: int = 0
    pairs: bool = False
    stride: int | None = None
    prefix: int = 0

    @staticmethod
    def of(recipe: Mapping[str, Any]) -> DataOptions:
        """Of what stands in a recipe.json; what was not asked for is a reading's own to choose."""
        asked = {name: recipe[_NAMES.get(name, name)] for name in _TOLD if _NAMES.get(name, name) in recipe}
        prefix, method = 0, recipe.get("method")
        if method in ("prefix", "prompt"):
            original = RECIPES.get(recipe.get("like", ""))
            usual = original.settings if original is not None else {}
            prefix = recipe.get("prefix_length") or usual.get("prefix_length") or Settings().prefix_length
        return DataOptions(**asked, pairs=method == "dpo", mixes=tuple(recipe.get("mix", ())), prefix=prefix)

    def limit(self, recipe: Recipe | None, context: int) -> int:
        """The most tokens of a document. context: the positions that the model has. Raises Usage for a number that
        leaves no room, or that the model does not have."""
        most = context - self.prefix
        if most < 2:
            raise Usage(
                tr("a prefix of {prefix:,} positions leaves no room for a text: the model has {context:,}",
                   prefix=self.prefix, context=context),
                hint=tr("take a shorter prefix: --prefix-length"),
                code="data.prefix",
            )  # fmt: skip
        if recipe is not None:
            return recipe.total
        if self.max_length is not None and not 2 <= self.max_length <= most:
            raise Usage(
                tr("a row of {length:,} tokens is not possible", length=self.max_length),
                hint=tr("behind a prefix of {prefix:,} positions this model takes 2 to {most:,}; --prefix-length makes "
                        "it shorter", prefix=self.prefix, most=most)
                if self.prefix
                else tr("this model takes 2 to {context:,}", context=most),
                code="data.max_length",
            )  # fmt: skip
        return self.max_length or min(LENGTH, most)

    def recipe(self, family: str) -> Recipe | None:
        """The original that is asked for. Raises Usage where something else is that a recipe fixes."""
        found = recipe_of(self.like, family)
        asked = {"--max-length": self.max_length, "--over-length": self.over_length, "--on": self.on,
                 "--system": self.system}  # fmt: skip
        fixed = [name for name, value in asked.items() if value is not None]
        if found is not None and fixed:
            raise Usage(
                tr("--like fixes what {options} would change", options=", ".join(fixed)),
                hint=tr("leave out one of them"),
                code="data.recipe_fixed",
            )
        if self.stride is not None and found is not None:
            if not found.is_text:
                raise Usage(
                    tr("--stride is of texts, and --like {name} learns questions and answers", name=found.name),
                    hint=tr("leave out one of them"),
                    code="data.stride",
                )
            return replace(found, stride=self.stride)
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> DataOptions:
        """The inverse of `to_json`. Raises TypeError for names that are none."""
        return DataOptions(**{**data, "mixes": tuple(data.get("mixes", ()))})
