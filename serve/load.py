"""The real engine behind the server's face. torch is imported here, inside the engine's thread."""

from __future__ import annotations

from glmchat.serve.face import EngineFace, Load, Report
from glmchat.serve.options import ServeOptions


def engine_loader(options: ServeOptions) -> Load:
    def load(report: Report) -> EngineFace:
        report("import", 0.0)
        from glmchat.serve.native import NativeEngine

        return NativeEngine.load(options, report)

    return load
