"""The real engine behind the server's face. torch is imported here, inside the engine's thread."""

from __future__ import annotations

from glmchat.serve.face import EngineFace, Load, Report
from glmchat.serve.options import ServeOptions


def engine_loader(options: ServeOptions) -> Load:
    def load(report: Report) -> EngineFace:
        report("import", 0.0)
        from glmchat.engine.engine import Engine

        report("import", 1.0)
        return Engine.load(
            options.folder,
            quant=options.quant,
            dtype=options.dtype,
            device=options.device,
            threads=options.threads,
            context=options.context,
            on_progress=report,
        )

    return load
