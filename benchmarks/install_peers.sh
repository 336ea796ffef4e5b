#!/bin/sh
# The programs that glmchat is compared and tried with, in an environment of their own: .test-cache/peers-venv.
# llama-cpp-python is built from source (a C++ compiler is needed; some minutes). torch and transformers are borrowed by
# path from .venv, so `make chat` or `make test` comes first. `--with-chatglm-cpp` adds chatglm.cpp, where it builds.
set -eu
cd "$(dirname "$0")/.."
peers=${PEERS_VENV:-.test-cache/peers-venv}
[ -x .venv/bin/python ] || { echo "no .venv: run make test first" >&2; exit 1; }
[ -x "$peers/bin/python" ] || .venv/bin/python -m venv "$peers"
"$peers/bin/python" -P -m pip --disable-pip-version-check install --quiet 'llama-cpp-python[server]==0.3.36'
# What `pip install transformers[serving]` would add to what .venv has.
"$peers/bin/python" -P -m pip --disable-pip-version-check install --quiet fastapi uvicorn opentelemetry-api
if [ "${1:-}" = --with-chatglm-cpp ]; then
    "$peers/bin/python" -P -m pip --disable-pip-version-check install --quiet chatglm-cpp
fi
# Found after the environment's own packages. The path is a plain line, so .venv's editable glmchat stays out.
echo "$PWD/.venv/lib/$(ls .venv/lib)/site-packages" > "$(echo "$peers"/lib/python*/site-packages)/borrowed.pth"
"$peers/bin/python" -P -c 'import llama_cpp, transformers; print("llama-cpp-python", llama_cpp.__version__, "transformers", transformers.__version__)'
