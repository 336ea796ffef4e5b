"""The real engine behind the server's face. torch is imported here, inside the engine's thread."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from glmchat.core.engine_options import EngineOptions
from glmchat.serve.face import EngineFace, Load, Report


def engine_loader(options: EngineOptions) -> Load:
    def load(report: Report) -> EngineFace:
        report("import", 0.0)
        from glmchat.engine.engine import Engine
        from glmchat.engine.placement import require_device

        require_device(options.device)
        report("import", 1.0)
        if options.quant is not None and options.copy is not None:
            from glmchat.engine.quantize.quantiser import kept_copy

            out = Path(options.copy["out"])
            kept_copy(options.require_folder(), options.quant, out, options.copy["manifest"], report)
            engine = Engine.load(out, **replace(options, quant=None).for_load(), on_progress=report)
        else:
            engine = Engine.load(options.require_folder(), **options.for_load(), on_progress=report)
        engine.identify()
        return engine

    return load
