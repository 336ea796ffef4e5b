"""The real engine behind the server's face. torch is imported here, inside the engine's thread."""

from __future__ import annotations

from pathlib import Path

from glmchat.serve.face import EngineFace, Load, Report
from glmchat.serve.options import ServeOptions


def engine_loader(options: ServeOptions) -> Load:
    def load(report: Report) -> EngineFace:
        report("import", 0.0)
        from glmchat.engine.engine import Engine
        from glmchat.engine.placement import require_device

        require_device(options.device)
        report("import", 1.0)
        folder, quant = options.folder, options.quant
        if quant is not None and options.copy is not None:
            from glmchat.engine.quantize.quantised_copy import kept_copy

            folder = kept_copy(folder, quant, Path(options.copy["out"]), options.copy["manifest"], report)
            quant = None
        engine = Engine.load(
            folder,
            quant=quant,
            dtype=options.dtype,
            device=options.device,
            threads=options.threads,
            context=options.context,
            on_progress=report,
        )
        engine.identify()
        return engine

    return load
