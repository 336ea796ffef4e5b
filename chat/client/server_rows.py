"""What a server says of itself and of its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glmchat.core.errors import GlmchatError


@dataclass(frozen=True, slots=True)
class Health:
    """status "ok", "loading" (with stage and done, 0 to 1) or "failed" (with error)."""

    status: str
    stage: str | None = None
    done: float | None = None
    error: GlmchatError | None = None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One row of `/v1/models`. parent: the base model, for an adapter."""

    name: str
    parent: str | None = None
    context: int | None = None
    owner: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def health_of(data: Mapping[str, Any], status: int) -> Health:
    """Our server's `/health`; a foreign one is "ok" if it answers at all, and "loading" while it says 503."""
    said = data.get("status")
    if said not in ("loading", "failed"):
        return Health("loading" if status == 503 else "ok")
    stage, done, problem = data.get("stage"), data.get("done"), data.get("error")
    return Health(
        str(said),
        stage=stage if isinstance(stage, str) else None,
        done=float(done) if isinstance(done, int | float) else None,
        error=GlmchatError.from_json(problem) if isinstance(problem, dict) else None,
    )


def rows_of(data: Mapping[str, Any]) -> list[ModelRow]:
    """The rows of `/v1/models`; what is no row is passed over."""
    found, rows = [], data.get("data")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("id"), str):
            context = row.get("max_model_len")
            found.append(
                ModelRow(
                    row["id"],
                    parent=row.get("parent") if isinstance(row.get("parent"), str) else None,
                    context=context if isinstance(context, int) else None,
                    owner=row.get("owned_by") if isinstance(row.get("owned_by"), str) else None,
                    facts=row,
                )
            )
    return found
